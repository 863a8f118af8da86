"""Text data sets of TensorFlow Datasets, prepared as array_record or parquet and read without TensorFlow."""

import contextlib
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from default_moe.data.corpus import Split, decode_utf8, in_split, strings_below
from default_moe.errors import ConfigError, closest

READABLE = ("array_record", "parquet")
HELD_OUT_SPLITS = ("validation", "valid", "dev", "test")


class TfdsText:
    """The prepared TFDS data set `name` ("c4/en", say), found in `directory` or in TFDS's own. See `Corpus`.

    Its validation or test split is the validation split; without one, examples of train are held out by a hash.
    """

    def __init__(self, name: str, text_field: str, validation_fraction: float, directory: Path) -> None:
        """Raises ConfigError if the data set is unknown, not prepared, in another format, or has no such field."""
        self.name = name.replace("/", "-").replace(":", "-")
        self.replaced: Counter[str] = Counter()
        self._text_field = text_field
        self._validation_fraction = validation_fraction
        self._path = _find_prepared(name, directory)
        _check_info(self._path, name, text_field, directory)
        self._builder = open_prepared(self._path)
        splits = self._builder.info.splits
        if "train" not in splits:
            raise ConfigError(f"the data set {name!r} has no split 'train', but {', '.join(map(repr, splits))}")
        self._held_out = next((split for split in HELD_OUT_SPLITS if split in splits), None)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((1, str(self._path), self._text_field, self._validation_fraction)).encode())
        for path in sorted(self._path.iterdir()):
            stat = path.stat()
            digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[str]:
        source = self._held_out if split == "validation" and self._held_out else "train"
        for index, data in enumerate(read_text(self._builder, source, self._text_field)):
            if self._held_out or in_split(f"{source}#{index}", split, self._validation_fraction):
                text, replaced = decode_utf8(data)
                if replaced:
                    self.replaced[f"{self._path}:{source}"] += replaced
                if text:
                    yield text


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Without TFDS's progress bars, remarks and logging."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def open_prepared(directory: Path) -> Any:
    """The TFDS builder of a prepared data set. Raises ConfigError if its description is damaged."""
    import tensorflow_datasets as tfds

    try:
        with quiet_tfds():
            return tfds.builder_from_directory(str(directory))
    except Exception as error:  # whatever TFDS meets there
        raise _unreadable(directory, error) from error


def read_text(builder: Any, split: str, field: str) -> Iterator[bytes]:
    """The field's bytes in every example, holding one shard at most (TFDS reads parquet shards whole).

    Raises ConfigError if the files are damaged.
    """
    try:
        for shard in range(builder.info.splits[split].num_shards):
            with quiet_tfds():
                source = builder.as_data_source(split=f"{split}[{shard}shard]")
            for index in range(len(source)):
                text = source[index][field]
                yield text.encode() if isinstance(text, str) else bytes(text)
    except Exception as error:  # whatever TFDS and array_record meet there
        raise _unreadable(builder.data_dir, error) from error


def _unreadable(directory: Path | str, error: Exception) -> ConfigError:
    reason = str(error).strip().partition("\n")[0]
    return ConfigError(f"the data set in {directory} cannot be read; remove it and prepare it again ({reason})")


def _find_prepared(name: str, directory: Path) -> Path:
    """The folder of the newest prepared version. Looks only on the disk: TFDS itself would try to download."""
    from tensorflow_datasets.core import constants

    full, _, version = name.partition(":")
    own = Path(os.environ.get("TFDS_DATA_DIR") or constants.DATA_DIR).expanduser()
    for root in (directory, own):
        found = list((root / full).glob(f"{version or '*.*.*'}/dataset_info.json"))
        if not found and "/" not in full:
            found = list((root / full).glob(f"*/{version or '*.*.*'}/dataset_info.json"))
            configs = sorted({path.parent.parent.name for path in found})
            if len(configs) > 1:
                raise ConfigError(
                    f"data.name is {name!r}, but must say which of its configurations to read: "
                    f"{', '.join(repr(f'{full}/{config}') for config in configs)}"
                )
        if found:
            return max((path.parent for path in found), key=lambda path: _version_order(path.name))
    known = _known_names()
    base = full.partition("/")[0]
    if base not in known:
        raise ConfigError(
            f"data.name is {name!r}, but there is no such corpus and no data set of that name in "
            f"{directory} or {own}{closest(base, known)}"
        )
    raise ConfigError(f"the data set {name!r} is not prepared in {directory} or {own}; {_advice(name, directory)}")


def _version_order(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))


def _known_names() -> list[str]:
    import tensorflow_datasets.text  # noqa: F401  (adds c4, wikipedia and others to the known names)
    from tensorflow_datasets.core import registered

    return ["python_stdlib", "text_files", *registered.list_imported_builders()]


def _advice(name: str, directory: Path) -> str:
    return (
        f"prepare it with tfds.builder({name!r}, data_dir={str(directory)!r})"
        '.download_and_prepare(file_format="array_record")'
    )


def _check_info(path: Path, name: str, text_field: str, directory: Path) -> None:
    """Checks format and fields in the data set's JSON files before TFDS opens them."""
    try:
        info = json.loads((path / "dataset_info.json").read_text())
        features = json.loads((path / "features.json").read_text())
        formats = [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
        fields = features["featuresDict"]["features"]
        classes = list(strings_below("pythonClassName", features))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is not a data set that TFDS 4 prepared ({error!r})") from error
    if not set(formats) & set(READABLE):
        first = "move it away and " if path.is_relative_to(directory) else ""
        raise ConfigError(
            f"the data set {name!r} in {path} is prepared as {formats[0]}, which only TensorFlow reads, but must be "
            f"array_record or parquet; {first}{_advice(name, directory)}"
        )
    foreign = [cls for cls in classes if not cls.startswith("tensorflow_datasets.")]
    if foreign:  # TFDS would import the module that the file names
        raise ConfigError(f"{path / 'features.json'} names {foreign[0]!r}, but only TFDS's own features are read")
    if text_field not in fields:
        raise ConfigError(
            f"data.text_field is {text_field!r}, but {name!r} has the fields {', '.join(map(repr, sorted(fields)))}"
            f"{closest(text_field, list(fields))}"
        )
    if not str(fields[text_field].get("pythonClassName", "")).endswith(".Text"):
        raise ConfigError(f"data.text_field is {text_field!r}, but that field of {name!r} does not hold text")
