"""Corpora for the data tests, all in temporary folders."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from default_moe.config import DataConfig
from default_moe.data import Data, open_data
from default_moe.data.corpus import Split


class ListCorpus:
    """A corpus of documents in hand that counts how often it was read."""

    name = "list"

    def __init__(self, train: list[str], validation: list[str]) -> None:
        self.replaced: Counter[str] = Counter()
        self.reads = 0
        self._documents = {"train": train, "validation": validation}

    def fingerprint(self) -> str:
        return "0" * 64

    def documents(self, split: Split) -> Iterator[str]:
        self.reads += 1
        yield from self._documents[split]


@pytest.fixture
def list_corpus() -> type[ListCorpus]:
    return ListCorpus


@pytest.fixture(scope="session")
def stdlib_config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(name="python_stdlib", dir=str(tmp_path_factory.mktemp("stdlib")))


@pytest.fixture(scope="session")
def stdlib_data(stdlib_config: DataConfig) -> Data:
    return open_data(stdlib_config)


@pytest.fixture(scope="session")
def stdlib_text(stdlib_data: Data) -> str:
    """The first million characters of real text."""
    return stdlib_data.tokenizer.decode(stdlib_data.train.tokens[:1_000_000])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 40 small .txt files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"Document {index}: grüße, 世界.\n" * (index + 1))
    return folder
