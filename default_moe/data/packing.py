"""Fixed-length training sequences from a flat stream of tokens, in an order that depends only on the seed.

Dimension key: B rows, L sequence length, T tokens of a split, V vocabulary.

Sequence i covers tokens [i L, i L + L + 1) of the stream, so that each token but the first is a target once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from default_moe.errors import ConfigError

Batch = dict[str, np.ndarray]


class Windows:
    """A grain random-access source: element i is the tokens [i L, i L + L + 1) of a stream, the last maybe fewer.

    With `whole`, only windows of full length. There are none if the stream has fewer than 2 tokens (whole: L + 1).
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, whole: bool) -> None:
        targets = max(len(tokens) - 1, 0)
        self._tokens = np.asarray(tokens)  # a view; slices of a memmap itself are slow to make
        self._sequence_length = sequence_length
        self._count = targets // sequence_length if whole else -(-targets // sequence_length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> np.ndarray:
        start = int(index) * self._sequence_length
        return self._tokens[start : start + self._sequence_length + 1]


@dataclass(frozen=True)
class Rows:
    """Rows of a split in a fixed order, each a pure function of its number, whoever asks for it.

    order: windows by row number.  length: how many rows there are, None if they are endless.

    A batch is a dict of arrays [B, L] (a row: [L]): int32 `inputs` and `targets`; float32 `loss_mask`, 0 on padding;
    int32 `segment_ids`, the document's number within the row from 1 on, a separator belonging to the document that
    follows, whose first token it predicts, 0 on padding; int32 `positions` within the row; int32 `target_bytes`, the
    UTF-8 bytes of each target.
    """

    order: grain.MapDataset
    length: int | None
    sequence_length: int
    separator: int
    token_bytes: np.ndarray

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("training rows are endless and have no length")
        return self.length

    def row(self, index: int) -> Batch:
        """Row `index`, arrays [L]."""
        return {name: array[0] for name, array in self.batch(index, 1).items()}

    def batch(self, start: int, count: int) -> Batch:
        """Rows start to start + count - 1, arrays [count, L]. Rows past the end are padding."""
        stop = start + count if self.length is None else min(start + count, self.length)
        windows = [self.order[index] for index in range(start, stop)]
        return pack(windows, count, self.sequence_length, self.separator, self.token_bytes)


def training_rows(tokens: np.ndarray, sequence_length: int, seed: int, separator: int, token_bytes: np.ndarray) -> Rows:
    """Endless rows: each epoch is all whole sequences, in an order of its own. The tail that fills none is dropped."""
    windows = Windows(tokens, sequence_length, whole=True)
    order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    return Rows(order, None, sequence_length, separator, token_bytes)


def validation_rows(tokens: np.ndarray, sequence_length: int, separator: int, token_bytes: np.ndarray) -> Rows:
    """All sequences once, the tail padded, in one fixed random order, so that the first rows are representative."""
    windows = Windows(tokens, sequence_length, whole=False)
    order = grain.MapDataset.source(windows).seed(0).shuffle()
    return Rows(order, len(windows), sequence_length, separator, token_bytes)


def pack(
    windows: Sequence[np.ndarray], count: int, sequence_length: int, separator: int, token_bytes: np.ndarray
) -> Batch:
    """The batch, arrays [count, L], of windows of up to L + 1 tokens; what they do not fill is padding of id 0.

    Raises ConfigError if an id is not the tokenizer's.
    """
    tokens = np.zeros((count, sequence_length + 1), np.int32)
    lengths = np.zeros((count, 1), np.int32)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = window
        lengths[row] = len(window)
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= len(
        token_bytes
    ):  # of a large store only the size is checked
        raise ConfigError(
            f"prepared data holds the id {tokens.max()}, but the tokenizer has {len(token_bytes)} tokens: the data is "
            "damaged, remove it from data.dir"
        )
    positions = np.broadcast_to(np.arange(sequence_length, dtype=np.int32), (count, sequence_length)).copy()
    real = positions < lengths - 1
    inputs = np.where(real, tokens[:, :-1], 0)
    targets = np.where(real, tokens[:, 1:], 0)
    starts = inputs == separator
    return {
        "inputs": inputs,
        "targets": targets,
        "loss_mask": real.astype(np.float32),
        "segment_ids": np.where(real, 1 + np.cumsum(starts, axis=1, dtype=np.int32) - starts[:, :1], 0).astype(
            np.int32
        ),
        "positions": positions,
        "target_bytes": np.where(real, token_bytes[targets], 0).astype(np.int32),
    }
