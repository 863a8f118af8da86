"""Text data sets of TensorFlow Datasets, prepared as array_record or parquet and read without TensorFlow."""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from default_moe.data.corpus import Split, decode_utf8, in_split
from default_moe.data.paths import expanded
from default_moe.data.sources import describe
from default_moe.errors import ConfigError, closest, shown
from default_moe.files import read_json

READABLE = ("array_record", "parquet")
HELD_OUT_SPLITS = ("validation", "valid", "dev", "test")

# The features of text data sets. TFDS imports whatever module the description of a data set names.
FEATURES = "tensorflow_datasets.core.features."
TEXT = f"{FEATURES}text_feature.Text"
KNOWN_FEATURES = (
    TEXT,
    f"{FEATURES}class_label_feature.ClassLabel",
    f"{FEATURES}dataset_feature.Dataset",
    f"{FEATURES}features_dict.FeaturesDict",
    f"{FEATURES}scalar.Scalar",
    f"{FEATURES}sequence_feature.Sequence",
    f"{FEATURES}tensor_feature.Tensor",
    f"{FEATURES}translation_feature.Translation",
    f"{FEATURES}translation_feature.TranslationVariableLanguages",
)
CLASS_KEYS = ("type", "pythonClassName", "python_class_name")  # both spellings of a protocol buffer's field are read
TEMPLATE_KEYS = ("filepathTemplate", "filepath_template")


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
            found = shown(", ".join(map(repr, splits)))
            raise ConfigError(f"the data set {shown(repr(name))} has no split 'train', but {found}")
        self._held_out = next((split for split in HELD_OUT_SPLITS if split in splits), None)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((1, str(self._path), self._text_field, self._validation_fraction)).encode())
        for path in sorted(self._path.iterdir()):
            stat = path.stat()
            digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()

    def sources(self) -> dict[str, Any]:
        files = ((path.name, path) for path in sorted(self._path.iterdir()) if path.is_file())
        return describe(files, **{"data set": self._path.name})

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
    """The TFDS builder of a prepared data set.

    Raises ConfigError if its description is damaged, or names code to import or files elsewhere.
    """
    import tensorflow_datasets as tfds

    _check_harmless(directory)
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
    reason = shown(str(error).strip().partition("\n")[0] or type(error).__name__)
    return ConfigError(f"the data set in {shown(directory)} cannot be read; remove it and prepare it again ({reason})")


def _check_harmless(directory: Path) -> None:
    """Checks that opening a prepared data set imports nothing, waits for nothing and stays in its folder."""
    try:
        info, features = (read_json(directory / name) for name in ("dataset_info.json", "features.json"))
        classes = sorted(set(_strings(CLASS_KEYS, features)))
        outside = [template for template in _strings(TEMPLATE_KEYS, info) if "/" in template]
        special = [path for path in directory.iterdir() if not (path.is_file() or path.is_dir())]
    except (OSError, ValueError, RecursionError) as error:
        raise _not_prepared(directory, error) from error
    for name in classes:
        if name not in KNOWN_FEATURES:  # TFDS would import its module
            raise ConfigError(
                f"{shown(directory / 'features.json')} names {shown(repr(name))}, but only these features are read: "
                f"{', '.join(known.rpartition('.')[2] for known in KNOWN_FEATURES)}"
            )
    if outside:
        raise ConfigError(f"{shown(directory)} must hold its own files, but names {shown(repr(outside[0]))}")
    if special:
        raise ConfigError(f"{shown(special[0])} is not a regular file, but must be")


def _strings(keys: tuple[str, ...], values: Any) -> Iterator[str]:
    """Every string under one of the keys, somewhere in nested JSON values or in JSON that these hold as text."""
    if isinstance(values, str) and values.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            yield from _strings(keys, json.loads(values))
    elif isinstance(values, dict):
        yield from (values[key] for key in keys if isinstance(values.get(key), str))
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        yield from _strings(keys, value)


def _not_prepared(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{shown(path)} is not a data set that TFDS 4 prepared ({shown(repr(error))})")


def _find_prepared(name: str, directory: Path) -> Path:
    """The folder of the newest prepared version. Looks only on the disk: TFDS itself would try to download."""
    from tensorflow_datasets.core import constants

    if len(name) > 200 or not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*(:[\w.*]+)?", name):
        raise ConfigError(f"data.name is {shown(repr(name))}, but must be called as 'c4/en' or 'c4/en:3.1.0' is")
    full, _, version = name.partition(":")
    asked = os.environ.get("TFDS_DATA_DIR")
    own = expanded("$TFDS_DATA_DIR", asked) if asked else Path(constants.DATA_DIR)  # a user may have no home
    places = f"{shown(directory)} or {shown(own)}"
    for root in (directory, own):
        found = list((root / full).glob(f"{version or '*.*.*'}/dataset_info.json"))
        if not found and "/" not in full:
            found = list((root / full).glob(f"*/{version or '*.*.*'}/dataset_info.json"))
            configs = sorted({path.parent.parent.name for path in found})
            if len(configs) > 1:
                raise ConfigError(
                    f"data.name is {shown(repr(name))}, but must say which of its configurations to read: "
                    f"{shown(', '.join(repr(f'{full}/{config}') for config in configs))}"
                )
        if found:
            return max((path.parent for path in found), key=lambda path: _version_order(path.name))
    known = _known_names()
    base = full.partition("/")[0]
    if base not in known:
        raise ConfigError(
            f"data.name is {shown(repr(name))}, but there is no such corpus and no data set of that name in {places}"
            f"{closest(base, known)}"
        )
    raise ConfigError(f"the data set {shown(repr(name))} is not prepared in {places}; {_advice(name, directory)}")


def _version_order(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else -1 for part in version.split("."))


def _known_names() -> list[str]:
    import tensorflow_datasets.text  # noqa: F401  (adds c4, wikipedia and others to the known names)
    from tensorflow_datasets.core import registered

    return ["python_stdlib", "text_files", "planted", *registered.list_imported_builders()]


def _advice(name: str, directory: Path) -> str:
    return (
        f"prepare it with tfds.builder({shown(repr(name))}, data_dir={shown(repr(str(directory)))})"
        '.download_and_prepare(file_format="array_record")'
    )


def _check_info(path: Path, name: str, text_field: str, directory: Path) -> None:
    """Checks format and fields in the data set's JSON files before TFDS opens them."""
    try:
        info = read_json(path / "dataset_info.json")
        formats = [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
        fields = dict(read_json(path / "features.json")["featuresDict"]["features"])
        kind = fields[text_field].get("pythonClassName") if text_field in fields else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _not_prepared(path, error) from error
    if not any(form in READABLE for form in formats):
        first = "move it away and " if path.is_relative_to(directory) else ""
        raise ConfigError(
            f"the data set {shown(repr(name))} in {shown(path)} is prepared as {shown(formats[0], 40)}, which only "
            f"TensorFlow reads, but must be array_record or parquet; {first}{_advice(name, directory)}"
        )
    if text_field not in fields:
        raise ConfigError(
            f"data.text_field is {shown(repr(text_field))}, but {shown(repr(name))} has the fields "
            f"{shown(', '.join(map(repr, sorted(fields))))}{closest(text_field, list(fields))}"
        )
    if kind != TEXT:
        raise ConfigError(
            f"data.text_field is {shown(repr(text_field))}, but that field of {shown(repr(name))} does not hold text"
        )
