"""Tokenizers that a tokenizer.json describes: Llama-3's, say, or a byte-level BPE trained here."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from default_moe.data.corpus import strings_below
from default_moe.errors import ConfigError, shown

LARGEST_VOCABULARY = 1 << 24
PROBE = Path(__file__).with_name("tokenizer_probe.py")
PROBE_SECONDS = 30
SEPARATORS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>", "[EOS]", "[SEP]")


class JsonTokenizer:
    """A tokenizer.json. See `Tokenizer` for the interface.

    token_bytes adds up to the text's UTF-8 length for byte-level tokenizers. A SentencePiece-style one that puts a
    space before each document counts that byte too, and one that discards white space (WordPiece) counts none for it.
    """

    def __init__(self, values: Any, where: str, name: str) -> None:
        """`values`: the parsed file, not changed.  `where`: opens error messages.

        Raises ConfigError if the values describe no tokenizer, one that hangs or crashes on a short text, or one
        without a document separator.
        """
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ConfigError(f"{where} is not a tokenizer.json: it has no 'model'")
        # What would make the encoding random or lose text has no place in packed training data.
        values = {**values, "truncation": None, "padding": None, "model": {**values["model"]}}
        if "dropout" in values["model"]:
            values["model"]["dropout"] = None
        with _in_one_line(f"{where} is not a tokenizer.json"):
            described = json.dumps(values)
            _probe(described)
            self._tokenizer = tokenizers.Tokenizer.from_str(described)
        self.name = name
        self._values = values
        self._where = where
        vocabulary = self._tokenizer.get_vocab()
        separators = [token for token in SEPARATORS if token in vocabulary]
        if not separators:
            raise ConfigError(
                f"{where} has no token that can separate documents; it needs one of {', '.join(SEPARATORS)}"
            )
        self.separator = vocabulary[separators[0]]
        self._tokenizer.add_special_tokens([separators[0]])
        self._tokenizer.encode_special_tokens = True  # "</s>" within a document is text
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(f"{where} has the id {self.vocab_size - 1}, but ids must be below {LARGEST_VOCABULARY}")
        self.token_bytes = _token_bytes(self._tokenizer, values, self.vocab_size, self.separator)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        try:
            with _in_one_line(f"{self._where} cannot encode a text that begins {shown(repr(texts[0][:60]))}"):
                encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except ConfigError:
            if len(texts) > 1:
                for text in texts:  # to name the one
                    self.encode(text)
            raise
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        documents: list[list[int]] = [[]]
        for token in np.asarray(ids).tolist():
            if token == self.separator:
                documents.append([])
            elif 0 <= token < self.vocab_size:
                documents[-1].append(token)
        with _in_one_line(f"{self._where} cannot decode its tokens"):
            return "\n".join(self._tokenizer.decode(document) for document in documents)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "tokenizer_json", "name": self.name, "json": self._values}


def train_byte_level_bpe(texts: Iterable[str], size: int) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE with at most `size` tokens. The same texts give the same one.

    Raises ConfigError if there cannot be so many.
    """
    if size > LARGEST_VOCABULARY:
        raise ConfigError(
            f"data.tokenizer: a BPE of {shown(size)} tokens is too large, use {LARGEST_VOCABULARY} at most"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def byte_level_json() -> dict[str, Any]:
    """The tokenizer.json whose ids are those of `ByteTokenizer`: the bytes, and 256 that separates documents."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    # The letters that stand for bytes in such files (Radford et al. 2019): printable ones for themselves.
    letters = {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters | {SEPARATORS[1]: 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SEPARATORS[1]])
    return json.loads(tokenizer.to_str())


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turns what the library raises into a ConfigError that begins with `what`: panics of its are no Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ConfigError):
        raise
    except BaseException as error:
        raise ConfigError(f"{what}: {shown(error)}") from error


def _probe(described: str) -> None:
    """Raises ValueError if a tokenizer does not stand a trial in a process of its own."""
    try:
        command = [sys.executable, "-P", str(PROBE)]
        done = subprocess.run(command, input=described.encode(), capture_output=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"short texts take it more than {PROBE_SECONDS} seconds") from None
    if done.stdout or done.returncode:
        raise ValueError(done.stdout.decode(errors="replace") or f"it ends the process (exit code {done.returncode})")


def _token_bytes(
    tokenizer: tokenizers.Tokenizer, values: dict[str, Any], vocab_size: int, separator: int
) -> np.ndarray:
    """int32 [vocab_size]: see `Tokenizer`. Ids without a token count 0."""
    kinds = set(strings_below("type", [values.get("pre_tokenizer"), values.get("decoder")]))
    byte_level = "ByteLevel" in kinds
    added = tokenizer.get_added_tokens_decoder()
    unknown = values["model"].get("unk_token")
    counts = np.zeros(vocab_size, np.int32)
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            counts[index] = 0 if added[index].special else len(added[index].content.encode())
        elif index != separator and token != unknown:
            counts[index] = len(token) if byte_level else _plain_length(token, "ByteFallback" in kinds)
    return counts


def _plain_length(token: str, byte_fallback: bool) -> int:
    """Bytes of a token that is spelt as text: "▁" for a space, "<0x0A>" for a byte, "##" before a word's later part."""
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    if len(token) > 2:
        token = token.removeprefix("##")
    return len(token.replace("▁", " ").encode())
