"""A split as one flat file of token ids on the disk, made once for each corpus and tokenizer.

`NAME.tokens` holds the ids (uint16 where the vocabulary fits, else uint32), each document followed by the separator;
`NAME.json` what is known about it. Both appear under their names only when whole.
"""

import contextlib
import hashlib
import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from default_moe.data.corpus import Corpus, Split
from default_moe.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20  # text that is encoded at a time
BATCH_DOCUMENTS = 1024
CHECKED_BYTES = 1 << 30  # stores up to this size are read through for their checksum, larger ones checked by size
REPORT_SECONDS = 30


@dataclass(frozen=True)
class StoreInfo:
    """What is recorded beside the tokens.

    tokens: how many, separators included.  documents, bytes: of the text, bytes in UTF-8.
    content_hash: SHA-256 of the documents, whatever their tokenizer.  replaced: places of invalid Unicode.
    dtype: "uint16" or "uint32".  checksum: CRC-32 of the file of tokens.
    """

    tokens: int
    documents: int
    bytes: int
    content_hash: str
    replaced: int
    dtype: str
    checksum: int


@dataclass(frozen=True)
class TokenStore:
    """tokens: uint16 or uint32 [info.tokens], mapped from the disk and never loaded whole."""

    tokens: np.ndarray
    info: StoreInfo


def open_store(
    path: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, log: Callable[[str], None]
) -> TokenStore:
    """The split's tokens in `path`.tokens, tokenized now if they are missing, cut short or altered."""
    store = _open_whole(path)
    if store is None:
        begin = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_temporaries(path.parent)
        _write(path, corpus, split, tokenizer, log)
        store = _open_whole(path)
        if store is None:
            raise OSError(f"{path}.tokens was altered while it was written")
        log(
            f"Prepared {corpus.name} ({split}): {store.info.documents:,} documents, {store.info.bytes / 1e6:,.1f} MB, "
            f"{store.info.tokens / 1e6:,.2f} M tokens, in {time.monotonic() - begin:.1f} s"
        )
    return store


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends, or vanishes when it fails."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _paths(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.tokens"), path.with_name(f"{path.name}.json")


def _open_whole(path: Path) -> TokenStore | None:
    """The store at `path`, or None if it isn't there or not as it was written."""
    tokens_path, info_path = _paths(path)
    try:
        info = StoreInfo(**json.loads(info_path.read_text()))
        dtype = np.dtype(info.dtype)
        size = tokens_path.stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    if size != info.tokens * dtype.itemsize:
        return None
    if size == 0:
        return TokenStore(np.empty(0, dtype), info)
    if size <= CHECKED_BYTES and _checksum(tokens_path) != info.checksum:
        return None
    return TokenStore(np.memmap(tokens_path, dtype, mode="r"), info)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            checksum = zlib.crc32(data, checksum)
    return checksum


def _write(path: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    digest = hashlib.sha256()
    tokens = documents = size = checksum = 0
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
            for ids in tokenizer.encode_batch(texts):
                stored = np.append(ids, tokenizer.separator).astype(dtype).tobytes()
                file.write(stored)
                checksum = zlib.crc32(stored, checksum)
                tokens += len(ids) + 1
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
        checksum=checksum,
    )
    with replacing(info_path) as file:
        file.write(json.dumps(asdict(info), indent=2).encode())


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
