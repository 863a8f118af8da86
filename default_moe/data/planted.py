"""`planted/N`: text that N random generators write, so that the generator of each token is known.

A document is of one generator. Every sixteenth character is the generator's letter. Each of the others is, nine times
in ten, what the generator's own permutation makes of the one before, else drawn from all.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from default_moe.data.corpus import Split, in_split
from default_moe.errors import ConfigError, shown

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYMBOLS = 64  # printable ASCII characters from "!" on, no letter above among them
PERIOD = 16  # characters from one letter to the next
CHANCE = 0.1  # that a character is drawn from all of them
LENGTH = 1024  # characters of a document
DOCUMENTS = 3200  # of all generators together


def is_planted(name: str) -> bool:
    """Whether a `data.name` asks for such text, of however many generators."""
    return name.partition("/")[0] == "planted"


class Planted:
    """Always the same text for the same N, from 2 to 26. See `Corpus` for the interface."""

    def __init__(self, name: str, validation_fraction: float) -> None:
        number = name.partition("/")[2]
        if number not in map(str, range(2, len(LETTERS) + 1)):
            raise ConfigError(
                f"data.name is {shown(repr(name))}, but must say how many generators there are, from 2 to "
                f"{len(LETTERS)}: 'planted/16' for instance"
            )
        self.num_generators = int(number)
        self.name = f"planted-{number}"
        self.replaced: Counter[str] = Counter()
        self._fraction = validation_fraction

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {self._fraction}".encode()).hexdigest()

    def sources(self) -> dict[str, Any]:
        return {"versions": {"planted": str(self.num_generators)}, "files": {}}

    def documents(self, split: Split) -> Iterator[str]:
        for generator in range(self.num_generators):
            yield from self.documents_of(generator, split)

    def documents_of(self, generator: int, split: Split) -> list[str]:
        """The split's documents of one generator."""
        texts = _texts(generator, DOCUMENTS // self.num_generators)
        return [text for i, text in enumerate(texts) if in_split(f"{generator} {i}", split, self._fraction)]


@functools.cache
def _texts(generator: int, count: int) -> list[str]:
    """Documents of a generator. Of NumPy's random numbers only those in [0, 1) are the same in all its versions."""
    rng = np.random.Generator(np.random.PCG64(generator))
    permutation_S = np.argsort(rng.random(SYMBOLS))
    symbol_C = (rng.random(count) * SYMBOLS).astype(np.int64)
    text_CL = np.empty((count, LENGTH), np.uint8)
    for place in range(LENGTH):
        if place % PERIOD == 0:
            text_CL[:, place] = ord(LETTERS[generator])
            continue
        any_C = (rng.random(count) * SYMBOLS).astype(np.int64)
        symbol_C = np.where(rng.random(count) < CHANCE, any_C, permutation_S[symbol_C])
        text_CL[:, place] = ord("!") + symbol_C
    return [row.tobytes().decode("ascii") for row in text_CL]
