"""Corpora for the data tests, all in temporary folders."""

from collections import Counter

import pytest

from default_moe.config import DataConfig
from default_moe.data import open_data


class ListCorpus:
    """A corpus of documents in hand, all for training, that counts how often it was read."""

    name = "list"

    def __init__(self, documents):
        self.replaced, self.reads, self._documents = Counter(), 0, documents

    def fingerprint(self):
        return "0" * 64

    def sources(self):
        return {"versions": {}, "files": {}}

    def documents(self, split):
        self.reads += 1
        yield from self._documents if split == "train" else ()


@pytest.fixture
def list_corpus():
    return ListCorpus


@pytest.fixture(scope="session")
def stdlib_config(tmp_path_factory):
    return DataConfig(name="python_stdlib", dir=str(tmp_path_factory.mktemp("stdlib")))


@pytest.fixture(scope="session")
def stdlib_data(stdlib_config):
    return open_data(stdlib_config)


@pytest.fixture(scope="session")
def stdlib_text(stdlib_data):
    """The first million characters of real text."""
    return stdlib_data.tokenizer.decode(stdlib_data.train.tokens[:1_000_000])


@pytest.fixture
def texts(tmp_path):
    """A folder of 40 small .txt files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"Document {index}: grüße, 世界.\n" * (index + 1))
    return folder
