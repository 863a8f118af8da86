"""What a corpus is: documents in two splits, and the few rules that every kind of corpus shares."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, Protocol

Split = Literal["train", "validation"]


class Corpus(Protocol):
    """Text documents in a "train" and a "validation" split.

    name: for messages and folder names.
    replaced: in how many places of each file invalid Unicode became U+FFFD, added to whenever documents are read.
    """

    name: str
    replaced: Counter[str]

    def documents(self, split: Split) -> Iterator[str]:
        """The split's non-empty documents, always in the same order, streamed.

        Raises ConfigError where the source is missing, damaged or has no such text.
        """

    def fingerprint(self) -> str:
        """Hexadecimal key of the documents and their split, found without reading large files."""

    def sources(self) -> dict[str, Any]:
        """What the documents are read from, as `sources.describe` gives it."""


class EvenlySplit:
    """A corpus of `count` documents, all of which are in its split `full`, split at even distances instead."""

    def __init__(self, corpus: Corpus, full: Split, count: int, validation_fraction: float) -> None:
        self.name, self.replaced = corpus.name, corpus.replaced
        self.num_held_out = min(max(round(count * validation_fraction), 1), count - 1)
        self._held_out = {(2 * i + 1) * count // (2 * self.num_held_out) for i in range(self.num_held_out)}
        self._corpus, self._full = corpus, full

    def fingerprint(self) -> str:
        return hashlib.sha256(f"evenly split {self._corpus.fingerprint()}".encode()).hexdigest()

    def sources(self) -> dict[str, Any]:
        return self._corpus.sources()

    def documents(self, split: Split) -> Iterator[str]:
        for index, text in enumerate(self._corpus.documents(self._full)):
            if (index in self._held_out) == (split == "validation"):
                yield text


def in_split(document: str, split: Split, validation_fraction: float) -> bool:
    """Whether the document of that name falls in `split`: about validation_fraction of all names are held out."""
    digest = hashlib.sha256(os.fsencode(document)).digest()
    held_out = int.from_bytes(digest[:8], "big") < validation_fraction * 2**64
    return held_out == (split == "validation")


def strings_below(key: str, values: Any) -> Iterator[str]:
    """Every string that is called `key` somewhere in nested JSON values."""
    if isinstance(values, dict):
        if isinstance(values.get(key), str):
            yield values[key]
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        yield from strings_below(key, value)


def decode_utf8(data: bytes) -> tuple[str, int]:
    """The text of UTF-8 bytes, and in how many places invalid bytes were replaced by U+FFFD."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())
