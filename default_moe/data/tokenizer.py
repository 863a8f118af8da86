"""Text to token ids and back, and how many bytes each token stands for.

Every tokenizer is described by plain JSON values (`to_dict`), which is all that a checkpoint keeps of it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from default_moe.data.json_tokenizer import JsonTokenizer, train_byte_level_bpe
from default_moe.data.paths import expanded
from default_moe.errors import ConfigError, closest, shown
from default_moe.files import read_json


class Tokenizer(Protocol):
    """name: short, for folder names.  vocab_size: V, ids are 0 to V-1.  separator: the id that ends every document.

    token_bytes: int32 [V], UTF-8 bytes of the text that each token stands for; 0 for separator and special tokens.
    """

    name: str
    vocab_size: int
    separator: int
    token_bytes: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """int32 [length]; text that spells a special token is encoded as text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the tokenizer can."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; invalid bytes become U+FFFD, separators line ends."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for `tokenizer_from_dict`."""


class ByteTokenizer:
    """The 256 byte values and a separator. See `Tokenizer`."""

    name = "bytes"
    vocab_size = 257
    separator = 256

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        ids = np.where(ids == self.separator, ord("\n"), ids)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bytes"}


def tokenizer_from_dict(values: Any) -> Tokenizer:
    """The tokenizer that `to_dict` described. Raises ConfigError if it describes none."""
    kind, name = (values.get("kind"), values.get("name")) if isinstance(values, Mapping) else (None, None)
    if kind == "bytes":
        return ByteTokenizer()
    if kind != "tokenizer_json":
        kind = shown(repr(kind), 40)
        raise ConfigError(f"the stored tokenizer is of kind {kind}, but must be 'bytes' or 'tokenizer_json'")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,40}", name, re.ASCII):  # it becomes a folder's name
        raise ConfigError(f"the stored tokenizer is called {shown(repr(name), 40)}, but must be called 'json', say")
    return JsonTokenizer(values.get("json"), "the stored tokenizer", name)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hexadecimal hash of all that a tokenizer does."""
    return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()


def open_tokenizer_file(path: Path) -> JsonTokenizer:
    """The tokenizer of a tokenizer.json. Raises ConfigError if the file is missing or no tokenizer."""
    where = f"data.tokenizer: {shown(path)}"
    try:
        values = read_json(expanded("data.tokenizer", str(path)))
    except FileNotFoundError as error:
        known = ["bytes", "bpe:4096"]
        raise ConfigError(
            f"data.tokenizer is {shown(repr(str(path)))}, but there is no such file; it must be 'bytes', 'bpe:SIZE' or "
            f"the path of a tokenizer.json{closest(str(path), known)}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{where} is not a tokenizer.json: {shown(error)}") from error
    return JsonTokenizer(values, where, name="json")


def train_bpe(documents: Iterable[str], size: int, largest_sample: int = 256 << 20) -> JsonTokenizer:
    """A byte-level BPE of at most `size` tokens learnt from the first `largest_sample` characters of documents."""
    return JsonTokenizer(
        train_byte_level_bpe(_sample(documents, largest_sample), size), "the trained BPE", f"bpe-{size}"
    )


def _sample(documents: Iterable[str], largest: int) -> Iterable[str]:
    taken = 0
    for text in documents:
        yield text[: largest - taken]
        taken += len(text)
        if taken >= largest:
            return
