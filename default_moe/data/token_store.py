"""A split as one flat file of token ids on the disk, made once for each corpus and tokenizer.

`NAME.tokens` holds the ids (uint16 where the vocabulary fits, else uint32), each document followed by the separator;
`NAME.json` what is known about it, with a digest over itself and over the tokens. Both appear under their names only
when whole. All that prepare one store write the same bytes, so it does not matter whose files a store consists of.
"""

import contextlib
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from default_moe.data.corpus import Corpus, Split
from default_moe.data.sealed import Damaged, read_sealed, replacing, write_sealed
from default_moe.data.tokenizer import Tokenizer
from default_moe.errors import check, shown
from default_moe.files import open_regular

BATCH_CHARACTERS = 1 << 20  # text that is encoded at a time
BATCH_DOCUMENTS = 1024
SAMPLE_CHARACTERS = 1 << 17  # that are decoded again, or a few more: to the end of a document
CHECKED_BYTES = 1 << 30  # stores up to this size are read through for their digest, larger ones checked by size
REPORT_SECONDS = 30


@dataclass(frozen=True)
class StoreInfo:
    """What is recorded beside the tokens.

    tokens: how many, separators included.  documents, bytes: of the text, bytes in UTF-8.
    content_hash: SHA-256 of the documents, whatever their tokenizer.  replaced: places of invalid Unicode.
    dtype: "uint16" or "uint32".  tokens_hash: SHA-256 of the file of tokens.
    sampled, lost: characters of text that were decoded again, and how many of them were missing; 0 in earlier versions.
    """

    tokens: int
    documents: int
    bytes: int
    content_hash: str
    replaced: int
    dtype: str
    tokens_hash: str
    sampled: int = 0
    lost: int = 0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "StoreInfo | None":
        """What `asdict` of an info gives, read again, or None if the values are no such thing."""
        counts = ("tokens", "documents", "bytes", "replaced", "sampled", "lost")
        values = {"sampled": 0, "lost": 0, **values}
        if (
            values.keys() == {field.name for field in fields(cls)}
            and all(type(values[name]) is int and 0 <= values[name] < 1 << 63 for name in counts)
            and values["dtype"] in ("uint16", "uint32")  # another would be mapped as Python objects, for instance
            and all(isinstance(values[name], str) for name in ("content_hash", "tokens_hash"))
            and all(re.fullmatch("[0-9a-f]{64}", values[name]) for name in ("content_hash", "tokens_hash"))
        ):
            return cls(**values)
        return None


@dataclass(frozen=True)
class TokenStore:
    """tokens: uint16 or uint32 [info.tokens], mapped from the disk and never loaded whole."""

    tokens: np.ndarray
    info: StoreInfo


def open_store(
    path: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, log: Callable[[str], None]
) -> TokenStore:
    """The split's tokens in `path`.tokens, tokenized now if they are missing or damaged, with a line to `log`."""
    try:
        store = _open_whole(path)
    except Damaged as damage:
        log(f"{damage}; it is made again")
        store = None
    if store is None:
        begin = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_temporaries(path.parent)
        _write(path, corpus, split, tokenizer, log)
        store = _open_whole(path)
        if store is None:
            raise Damaged(f"{shown(path)}.json was removed while it was written")
        log(
            f"Prepared {corpus.name} ({split}): {store.info.documents:,} documents, {store.info.bytes / 1e6:,.1f} MB, "
            f"{store.info.tokens / 1e6:,.2f} M tokens, in {time.monotonic() - begin:.1f} s"
        )
    return store


def _paths(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.tokens"), path.with_name(f"{path.name}.json")


def _open_whole(path: Path) -> TokenStore | None:
    """The store at `path`, or None if it isn't there. Raises Damaged if it is not as it was written."""
    tokens_path, info_path = _paths(path)
    values = read_sealed(info_path)
    if values is None:
        return None
    info = StoreInfo.from_json(values)
    if info is None:
        raise Damaged(f"{shown(info_path)} does not say what is known of its tokens")
    dtype = np.dtype(info.dtype)
    wanted = info.tokens * dtype.itemsize
    try:
        file = open_regular(tokens_path)
    except OSError as error:
        raise Damaged(f"{shown(tokens_path)} cannot be read: {error.strerror}") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if size != wanted:
            raise Damaged(f"{shown(tokens_path)} has {size:,} bytes, not the {wanted:,} written")
        if size <= CHECKED_BYTES and hashlib.file_digest(file, "sha256").hexdigest() != info.tokens_hash:
            raise Damaged(f"{shown(tokens_path)} does not hold what was written: its SHA-256 differs")
        tokens = np.memmap(file, dtype, mode="r") if size else np.empty(0, dtype)
    return TokenStore(tokens, info)


def _write(path: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    digest, tokens_digest = hashlib.sha256(), hashlib.sha256()
    tokens = documents = size = sampled = lost = 0
    replaced_before = corpus.replaced.total()
    reported = time.monotonic()
    tokens_path, info_path = _paths(path)
    with replacing(tokens_path) as file:
        for texts in _batches(corpus.documents(split)):
            for text in texts:
                data = text.encode()
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
                size += len(data)
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if sampled < SAMPLE_CHARACTERS:
                    lost += _lost(tokenizer, text, ids)
                    sampled += len(text)
                stored = np.append(ids, tokenizer.separator).astype(dtype).tobytes()
                file.write(stored)
                tokens_digest.update(stored)
                tokens += len(ids) + 1
            check(
                2 * lost <= sampled,
                f"data.tokenizer: {tokenizer.name!r} loses {100 * lost / sampled:.0f} % of the characters in a sample "
                "of the text, but must keep half: 'bytes' and 'bpe:4096' keep all",
            )
            documents += len(texts)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                log(f"Tokenizing {corpus.name} ({split}): {documents:,} documents, {size / 1e6:,.0f} MB so far")
    info = StoreInfo(
        tokens=tokens,
        documents=documents,
        bytes=size,
        content_hash=digest.hexdigest(),
        replaced=corpus.replaced.total() - replaced_before,
        dtype=dtype.name,
        tokens_hash=tokens_digest.hexdigest(),
        sampled=sampled,
        lost=lost,
    )
    write_sealed(info_path, asdict(info))


def _lost(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> int:
    """How many characters of a text do not come back from its tokens."""
    return (Counter(text) - Counter(tokenizer.decode(ids))).total()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _remove_old_temporaries(folder: Path) -> None:
    """Removes what killed processes left; a day is longer than any is still being written to without pause."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86_400:
                path.unlink()
