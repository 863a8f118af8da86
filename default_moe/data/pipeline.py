"""From `DataConfig` to batches: chooses the corpus and the tokenizer, prepares what is missing, opens the splits."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from default_moe.config import DataConfig
from default_moe.data import packing
from default_moe.data.corpus import Corpus, EvenlySplit, Split
from default_moe.data.packing import Rows
from default_moe.data.paths import expanded
from default_moe.data.planted import Planted, is_planted
from default_moe.data.sealed import Damaged, read_sealed, write_sealed
from default_moe.data.sources import RECORD, differences, find_record
from default_moe.data.token_store import StoreInfo, TokenStore, open_store
from default_moe.data.tokenizer import (
    Tokenizer,
    open_tokenizer_file,
    tokenizer_fingerprint,
    tokenizer_from_dict,
    train_bpe,
)
from default_moe.errors import ConfigError, shown

Log = Callable[[str], None]
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Data:
    """A corpus, tokenized. corpus_hash: SHA-256 over the text of both splits, wherever the files lie.

    train, validation: the splits' streams of tokens; their `info` has the counts of tokens, documents and bytes.
    changes_since: tells how the corpus of another hash differed, as far as that is recorded in the same data directory.
    """

    tokenizer: Tokenizer
    corpus_hash: str
    train: TokenStore
    validation: TokenStore
    changes_since: Callable[[str], list[str]]

    def train_rows(self, sequence_length: int, seed: int) -> Rows:
        """Endless rows of the train split, reshuffled each epoch. Raises ConfigError if it fills no sequence."""
        _check_long_enough("train", self.train.info, sequence_length)
        return packing.training_rows(
            self.train.tokens, sequence_length, seed, self.tokenizer.separator, self.tokenizer.token_bytes
        )

    def validation_rows(self, sequence_length: int) -> Rows:
        """The whole held-out split once. Raises ConfigError if it fills no sequence."""
        _check_long_enough("validation", self.validation.info, sequence_length)
        return packing.validation_rows(
            self.validation.tokens, sequence_length, self.tokenizer.separator, self.tokenizer.token_bytes
        )


def open_data(config: DataConfig, log: Log = print, tokenizer: Tokenizer | None = None) -> Data:
    """The data of a run, prepared now where it has not been before, with a line to `log` about it.

    tokenizer: to be used instead of the one that the config names, a checkpoint's for instance.
    Raises ConfigError if the corpus, the tokenizer or the data directory cannot be used.
    """
    directory = data_directory(config)
    with usable(directory):
        return _open_data(config, directory, log, tokenizer)


@contextlib.contextmanager
def usable(directory: Path) -> Iterator[None]:
    """Raises ConfigError for an OSError while prepared data in `directory` is read or written."""
    try:
        yield
    except OSError as error:
        reason = shown(error.strerror or error, 400)
        which = f" ({shown(error.filename)})" if error.filename else ""
        raise ConfigError(
            f"data.dir: {shown(directory)} cannot be used for prepared data: {reason}{which}; data.dir or "
            "$DEFAULT_MOE_DATA may name another place"
        ) from error


def data_directory(config: DataConfig) -> Path:
    """Where prepared data is kept. It need not exist yet. Raises ConfigError if it cannot be a path."""
    if config.dir:
        return expanded("data.dir", config.dir)
    if path := os.environ.get("DEFAULT_MOE_DATA"):
        return expanded("$DEFAULT_MOE_DATA", path)
    return expanded("the default of $DEFAULT_MOE_DATA", "~/.cache/default_moe")


def open_corpus(config: DataConfig, log: Log) -> Corpus:
    """The corpus that `config.name` names. Raises ConfigError if there is none."""
    if config.name == "python_stdlib":
        from default_moe.data.stdlib import StdlibCorpus

        return StdlibCorpus(config.validation_fraction, data_directory(config), log=log)
    if config.name == "text_files":
        from default_moe.data.text_files import TextFiles

        return TextFiles(config.files or "", config.text_field, config.validation_fraction)
    if is_planted(config.name):
        return Planted(config.name, config.validation_fraction)
    from default_moe.data.tfds_text import TfdsText

    return TfdsText(config.name, config.text_field, config.validation_fraction, data_directory(config))


def open_tokenizer(config: DataConfig, corpus: Corpus, cache: Path, log: Log) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names; a BPE is trained on the train split unless it lies in `cache`."""
    if config.tokenizer == "bytes":
        return tokenizer_from_dict({"kind": "bytes"})
    if not config.tokenizer.startswith("bpe:"):
        return open_tokenizer_file(Path(config.tokenizer))
    try:
        size = int(config.tokenizer.removeprefix("bpe:"))
    except ValueError as error:
        raise ConfigError(f"data.tokenizer is {shown(repr(config.tokenizer))}, but must be 'bpe:4096', say") from error
    path = cache / f"bpe-{size}.json"
    try:
        values = read_sealed(path)
        if values is not None:
            return tokenizer_from_dict(values)
    except (Damaged, ConfigError) as error:
        log(f"{error}; it is trained again")
    begin = time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = train_bpe(corpus.documents("train"), size)
    write_sealed(path, tokenizer.to_dict())
    log(f"Trained a BPE of {tokenizer.vocab_size:,} tokens on {corpus.name} in {time.monotonic() - begin:.1f} s")
    return tokenizer


def measure_reading(data: Data, sequence_length: int, batch_size: int, seconds: float) -> float:
    """Tokens per second at which training batches are made, measured over about that many seconds."""
    rows = data.train_rows(sequence_length, seed=0)
    rows.batch(0, batch_size)
    begin = time.perf_counter()
    batches = 0
    while (elapsed := time.perf_counter() - begin) < seconds or not batches:
        batches += 1
        rows.batch(batches * batch_size, batch_size)
    return batches * batch_size * sequence_length / elapsed


def _open_data(config: DataConfig, directory: Path, log: Log, tokenizer: Tokenizer | None) -> Data:
    corpus = open_corpus(config, log)
    data = _prepared(config, corpus, directory, log, tokenizer)
    documents = data.train.info.documents + data.validation.info.documents
    if documents > 1 and not (data.train.info.documents and data.validation.info.documents):  # by chance, if few
        full: Split = "train" if data.train.info.documents else "validation"
        corpus = EvenlySplit(corpus, full, documents, config.validation_fraction)
        log(
            f"note: all {documents:,} documents fall in the {full} split; {corpus.num_held_out:,} of them, at even "
            "distances, are held out instead"
        )
        data = _prepared(config, corpus, directory, log, tokenizer)
    _check_has_documents(config, documents)
    tell_losses([data.train.info, data.validation.info], corpus, log)
    return data


def tell_losses(infos: Sequence[StoreInfo], corpus: Corpus, log: Log) -> None:
    """A line to `log` for each way in which stores do not hold what their text was."""
    if lost := sum(info.lost for info in infos):
        share = 100 * lost / sum(info.sampled for info in infos)
        log(f"note: the tokenizer loses {share:.2g} % of the characters in a sample of the text")
    if places := sum(info.replaced for info in infos):
        example = f", {shown(next(iter(corpus.replaced)))} for one" if corpus.replaced else ""
        log(f"note: invalid Unicode in {places:,} places of the text became U+FFFD{example}")


def _prepared(config: DataConfig, corpus: Corpus, directory: Path, log: Log, tokenizer: Tokenizer | None) -> Data:
    cache = directory / f"{corpus.name}-{corpus.fingerprint()[:16]}-tokens"
    tokenizer = tokenizer or open_tokenizer(config, corpus, cache, log)
    folder = cache / f"{tokenizer.name}-{tokenizer_fingerprint(tokenizer)[:16]}"
    prepared_before = all((folder / f"{split}.json").exists() for split in SPLITS)
    train = open_store(folder / "train", corpus, "train", tokenizer, log)
    validation = open_store(folder / "validation", corpus, "validation", tokenizer, log)
    if not prepared_before:
        write_sealed(folder / RECORD, corpus.sources())

    def changes_since(corpus_hash: str) -> list[str]:
        before = find_record(directory, lambda found: _hash_of_stored(found) == corpus_hash)
        now = find_record(directory, lambda found: found == folder) or corpus.sources()
        return differences(before, now)

    return Data(tokenizer, _corpus_hash(train.info, validation.info), train, validation, changes_since)


def _corpus_hash(train: StoreInfo, validation: StoreInfo) -> str:
    return hashlib.sha256((train.content_hash + validation.content_hash).encode()).hexdigest()


def _hash_of_stored(folder: Path) -> str | None:
    """The corpus hash of prepared tokens, None if they are not there. Raises Damaged."""
    train, validation = (StoreInfo.from_json(read_sealed(folder / f"{split}.json") or {}) for split in SPLITS)
    return _corpus_hash(train, validation) if train and validation else None


def _check_has_documents(config: DataConfig, documents: int) -> None:
    setting, value = ("files", config.files) if config.name == "text_files" else ("name", config.name)
    held = "no text" if not documents else "one document"
    if documents < 2:
        raise ConfigError(
            f"data.{setting} = {shown(repr(value))} holds {held}, but must have documents to train on and to hold out"
        )


def _check_long_enough(split: Split, info: StoreInfo, sequence_length: int) -> None:
    if info.tokens < sequence_length + 1:
        change = "lower" if split == "train" else "raise"
        raise ConfigError(
            f"the {split} split has {info.tokens} tokens, but train.sequence_length = {sequence_length} needs "
            f"{sequence_length + 1}; lower that, give data.files more text, or {change} data.validation_fraction"
        )
