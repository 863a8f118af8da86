"""The standard library as text."""

import os
import resource
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from helpers.refusals import refused

from default_moe.config import DataConfig
from default_moe.data import Data, open_data, stdlib, stdlib_builder
from default_moe.data.stdlib import StdlibCorpus, decode_source


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library: 30 modules, and files that do not belong."""
    root = tmp_path / "lib"
    left_out = ("test/a.py", "package/tests/b.py", "site-packages/c.py", "_sysconfigdata_x.py", "notes.txt")
    for name in (*(f"package/module_{index}.py" for index in range(30)), *left_out):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("LEFT_OUT = True\n" if name in left_out else f'"""What {name} is for."""\n')
    return root


@pytest.fixture
def corpus(library: Path, tmp_path: Path) -> StdlibCorpus:
    return StdlibCorpus(0.3, tmp_path / "data", library)


def test_real_library(stdlib_data: Data):
    train, validation = stdlib_data.train.info, stdlib_data.validation.info
    assert 400 < train.documents < 1500
    assert 10 < validation.documents < 150
    assert train.bytes > 5e6
    assert validation.bytes > 1e5
    assert train.replaced == validation.replaced == 0
    assert train.tokens == train.bytes + train.documents


def test_documents_and_their_split(corpus, library: Path, tmp_path: Path):
    train, validation = (list(corpus.documents(split)) for split in ("train", "validation"))
    assert len(train) + len(validation) == 30
    assert 3 < len(validation) < 17
    assert not any("LEFT_OUT" in text for text in train + validation)
    again = StdlibCorpus(0.3, tmp_path / "other", library)
    assert list(again.documents("validation")) == validation
    assert again.fingerprint() == corpus.fingerprint()


def test_fingerprint_follows_content_and_fraction(library: Path, tmp_path: Path):
    def key(fraction: float = 0.3) -> str:
        return StdlibCorpus(fraction, tmp_path, library).fingerprint()

    before = key()
    assert key(0.2) != before
    for path in library.rglob("*.py"):
        os.utime(path, (1, 1))
    assert key() == before
    (library / "package" / "module_0.py").write_text("x = 1\n")
    assert key() != before


def test_prepared_data_is_a_tfds_data_set_and_read_again(corpus, tmp_path: Path, monkeypatch):
    train = list(corpus.documents("train"))
    monkeypatch.setattr(stdlib_builder, "write", None)  # not written twice
    assert list(corpus.documents("train")) == train
    (prepared,) = (tmp_path / "data").iterdir()
    source = tfds.builder_from_directory(prepared).as_data_source("train")
    assert [example["text"].decode() for example in source] == train


def test_interrupted_preparation_leaves_nothing(corpus, tmp_path: Path, monkeypatch):
    write = stdlib_builder.write

    def interrupted(*args) -> Path:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(stdlib_builder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.documents("train")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(stdlib_builder, "write", write)
    assert list(corpus.documents("train"))


def test_two_processes_preparing_at_once(corpus, library: Path, tmp_path: Path, monkeypatch):
    other = StdlibCorpus(0.3, tmp_path / "data", library)
    write = stdlib_builder.write

    def overtaken(documents: stdlib_builder.Documents, directory: Path) -> Path:
        monkeypatch.setattr(stdlib_builder, "write", write)
        list(other.documents("train"))
        return write(documents, directory)

    monkeypatch.setattr(stdlib_builder, "write", overtaken)
    assert list(corpus.documents("train")) == list(other.documents("train")) != []
    assert len(list((tmp_path / "data").iterdir())) == 1


@pytest.mark.parametrize("name", ["*train*", "features.json", "digests.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[:50] + bytes([data[50] ^ 8]) + data[51:],
        lambda data: b'{"files": {"x": {"sha256": "", "bytes": Infinity}}}',
        lambda data: b'{"files": {"\\u0000": {"sha256": "", "bytes": 1}}}',
        lambda data: b'{"files": {"/dev/zero": {"sha256": "", "bytes": 0}}}',
        lambda data: b"[" * 100_000,
    ],
)
def test_damaged_prepared_data_is_made_again(library: Path, tmp_path: Path, name: str, damage):
    lines: list[str] = []
    corpus = StdlibCorpus(0.3, tmp_path / "data", library, lines.append)
    before = list(corpus.documents("train"))
    (path,) = (tmp_path / "data").glob(f"*/{name}")
    path.write_bytes(damage(path.read_bytes()))
    assert list(corpus.documents("train")) == before
    (line,) = lines
    assert str(path.parent) in line and line.endswith("; it is made again")
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_declared_encodings():
    assert decode_source("# -*- coding: latin-1 -*-\n# é\r\n".encode("latin-1")) == "# -*- coding: latin-1 -*-\n# é\n"
    assert decode_source(b"# \xff\n") == "# \ufffd\n"
    assert decode_source(b"# coding: no-such\n") == "# coding: no-such\n"


def test_no_sources(tmp_path: Path):
    with refused(r"no standard library sources in .*text_files"):
        StdlibCorpus(0.3, tmp_path, tmp_path / "missing")


def test_a_full_disk_takes_one_line(library: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    config = DataConfig(dir=str(tmp_path / "data"), validation_fraction=0.3)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, whole[1]))
        try:
            with refused(r"data\.dir: .* prepared data: File too large.*; data\.dir or \$DEFAULT_MOE_DATA may name"):
                open_data(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))
    assert open_data(config).train.info.documents


def test_output_is_lines_of_ours_alone(library: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    open_data(DataConfig(dir=str(tmp_path / "data"), validation_fraction=0.3))
    out, err = capfd.readouterr()
    splits = [line.partition(":")[0] for line in out.splitlines()]
    assert splits == [f"Prepared python_stdlib ({split})" for split in ("train", "validation")]
    assert err == ""
