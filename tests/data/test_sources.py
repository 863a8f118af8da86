"""What a text that is not the one of before is said to differ in."""

import platform
from pathlib import Path

import pytest

from default_moe.config import DataConfig
from default_moe.data import open_data, sources


def opened(texts: Path, **changes):
    config = {"files": f"{texts}/*", "dir": str(texts.parent / "data"), "validation_fraction": 0.3, **changes}
    return open_data(DataConfig(name="text_files", **config), log=lambda line: None)


def add(texts: Path) -> None:
    (texts / "new.txt").write_text("new")


def remove(texts: Path) -> None:
    for name in ("03", "01"):
        (texts / f"{name}.txt").unlink()


def change(texts: Path) -> None:
    for path in sorted(texts.iterdir())[:5]:
        path.write_text(path.read_text().upper())  # of the same size


def move(texts: Path) -> None:
    texts.rename(texts.parent / "texts_moved").joinpath("00.txt").write_text("other")
    texts.symlink_to(texts.parent / "texts_moved")


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (add, ["text added: 'new.txt'"]),
        (remove, ["text removed: '01.txt', '03.txt'"]),
        (change, ["text changed: '00.txt', '01.txt', '02.txt' and 2 more"]),
        (move, ["text changed: '00.txt'"]),
    ],
)
def test_files_that_have_changed_are_named(texts, alter, words):
    before = opened(texts)
    opened(texts, tokenizer="bpe:300")  # of the same text
    alter(texts)
    after = opened(texts)
    assert after.changes_since(before.corpus_hash) == words
    assert opened(texts, tokenizer="bpe:300").changes_since(before.corpus_hash) == words
    for path in texts.parent.glob(f"data/*/*/{sources.RECORD}"):
        path.write_text("{}")  # damaged
    assert after.changes_since(before.corpus_hash) == []


def test_a_text_of_which_nothing_is_recorded(texts):
    """As by earlier versions, whose prepared data is as good as any."""
    before = opened(texts)
    (record,) = texts.parent.glob(f"data/*/*/{sources.RECORD}")
    record.unlink()
    assert opened(texts).corpus_hash == before.corpus_hash and not record.exists()
    add(texts)
    assert opened(texts).changes_since(before.corpus_hash) == []


def test_the_same_files_in_another_split(texts):
    before = opened(texts)
    (words,) = opened(texts, validation_fraction=0.6).changes_since(before.corpus_hash)
    assert words == "the files are the same, but were read or split in another way"


def test_another_python(texts):
    files = [("a.py", texts / "00.txt"), ("a.py", texts / "01.txt"), ("gone.py", texts / "gone.txt")]
    before = sources.describe(files, Python="3.9.1")
    assert list(before["files"]) == ["a.py"] and len(before["files"]["a.py"]) == 4
    now = sources.describe(files, Python=platform.python_version())
    (words,) = sources.differences(before, now)
    assert words == f"Python: 3.9.1 there, {platform.python_version()} here"
    assert sources.differences(None, now) == [words.replace("3.9.1", "unknown")]
