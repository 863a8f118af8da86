"""More held-out text by name, `eval.sets`: files that are evaluated whole, and never trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from default_moe.config import DataConfig
from default_moe.data import packing
from default_moe.data.packing import Rows
from default_moe.data.pipeline import Log, data_directory, tell_losses, usable
from default_moe.data.sealed import read_sealed, write_sealed
from default_moe.data.sources import RECORD, differences, find_record
from default_moe.data.text_files import TextFiles
from default_moe.data.token_store import StoreInfo, open_store
from default_moe.data.tokenizer import Tokenizer, tokenizer_fingerprint
from default_moe.errors import ConfigError, quoted

_STORE = "validation"


@dataclass(frozen=True)
class HeldOutSet:
    """The text of a set, tokenized.

    rows: all of it, once.  content_hash: SHA-256 of its documents, wherever the files lie.
    changes_since: tells how text of another hash differed, as far as that is recorded in the same data directory.
    """

    rows: Rows
    content_hash: str
    changes_since: Callable[[str], list[str]]


def open_sets(
    globs: Mapping[str, str], config: DataConfig, tokenizer: Tokenizer, sequence_length: int, log: Log = print
) -> dict[str, HeldOutSet]:
    """The sets of files that `globs` names, in the run's tokens, prepared now where they have not been before.

    Raises ConfigError, which names the set, if files cannot be read or fill no sequence.
    """
    sets = {}
    for name, glob in globs.items():
        try:
            sets[name] = _open_set(name, glob, config, tokenizer, sequence_length, log)
        except ConfigError as error:
            reason = str(error).removeprefix("data.files: ")
            raise ConfigError(f"eval.sets: the set {quoted(name)}: {reason}") from error
    return sets


def _open_set(
    name: str, glob: str, config: DataConfig, tokenizer: Tokenizer, sequence_length: int, log: Log
) -> HeldOutSet:
    corpus = TextFiles(glob, config.text_field, validation_fraction=1.0)
    directory = data_directory(config)
    cache = directory / f"{corpus.name}-{corpus.fingerprint()[:16]}-tokens"
    folder = cache / f"{tokenizer.name}-{tokenizer_fingerprint(tokenizer)[:16]}"
    corpus.name = f"eval.sets {name}"
    with usable(directory):
        store = open_store(folder / _STORE, corpus, "validation", tokenizer, log)
        if not (folder / RECORD).exists():
            write_sealed(folder / RECORD, corpus.sources())
    tell_losses([store.info], corpus, lambda line: log(f"{line} (set {name!r})"))
    if store.info.tokens < sequence_length + 1:
        raise ConfigError(
            f"it has {store.info.tokens} tokens, but train.sequence_length = {sequence_length} needs "
            f"{sequence_length + 1}: give it more text"
        )

    def changes_since(content_hash: str) -> list[str]:
        before = find_record(directory, lambda found: found != folder and _stored_hash(found) == content_hash)
        return differences(before, corpus.sources())

    rows = packing.validation_rows(store.tokens, sequence_length, tokenizer.separator, tokenizer.token_bytes)
    return HeldOutSet(rows, store.info.content_hash, changes_since)


def _stored_hash(folder: Path) -> str | None:
    info = StoreInfo.from_json(read_sealed(folder / f"{_STORE}.json") or {})
    return info.content_hash if info else None
