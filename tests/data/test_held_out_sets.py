"""Text that is only evaluated: all of it is, under its name, in the run's tokens."""

import os

import numpy as np
import pytest
from helpers.refusals import refused

from default_moe.config import DataConfig
from default_moe.data import open_sets, tokenizer_from_dict

BYTES = tokenizer_from_dict({"kind": "bytes"})


@pytest.fixture
def opened(tmp_path):
    """Opens sets with few tokens a row. Returns them and the lines about it."""

    def open_them(sequence_length=32, **globs):
        lines = []
        config = DataConfig(dir=str(tmp_path / "data"))
        return open_sets(globs, config, BYTES, sequence_length, lines.append), lines

    return open_them


def test_a_set_is_all_text_of_its_files_and_no_file_is_cut(texts, opened):
    big = "a line\n" * 2000  # of a corpus to train on and to hold out it would be many documents
    (texts / "big.md").write_text(big)
    sets, lines = opened(first=f"{texts}/00.txt,{texts}/*.md", rest=f"{texts}/[1-3]*.txt")
    assert [line.split(":")[0] for line in lines] == [
        "Prepared eval.sets first (validation)",
        "Prepared eval.sets rest (validation)",
    ]
    rows = sets["first"].rows
    batch = rows.batch(0, len(rows))
    # Two documents and their separators; the first byte of all is no target.
    assert batch["target_bytes"].sum() == len(big) + (texts / "00.txt").stat().st_size - 1
    assert np.sum(batch["targets"] == BYTES.separator) == 2
    assert batch["loss_mask"].sum() == batch["target_bytes"].sum() + 2
    rows = sets["rest"].rows
    assert np.sum(rows.batch(0, len(rows))["targets"] == BYTES.separator) == 30
    assert sets["rest"].content_hash != sets["first"].content_hash
    assert opened(first=f"{texts}/00.txt,{texts}/*.md")[1] == []


def test_changed_files_are_told(texts, opened):
    before = opened(some=f"{texts}/1*.txt")[0]["some"]
    os.utime(texts / "10.txt", (1, 1))
    assert opened(some=f"{texts}/1*.txt")[0]["some"].content_hash == before.content_hash
    (texts / "11.txt").write_text("other text\n" * 20)
    (texts / "12.txt").unlink()
    after = opened(some=f"{texts}/1*.txt")[0]["some"]
    assert after.content_hash != before.content_hash
    assert after.changes_since(before.content_hash) == ["text removed: '12.txt'", "text changed: '11.txt'"]
    assert after.changes_since("of no record") == []


def test_what_became_of_invalid_text_is_told_of_the_set(texts, opened):
    (texts / "odd.md").write_bytes(b"\xff" * 40)
    lines = opened(a=f"{texts}/30.txt", odd=f"{texts}/odd.md")[1]
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: invalid Unicode in 40 places of the text became U+FFFD, {texts}/odd.md for one (set 'odd')"
    ]


@pytest.mark.parametrize(
    ("glob", "words"),
    [
        ("{}/*.jsonl", r"eval\.sets: the set 'odd': '.*/\*\.jsonl' names no file \(looked from "),
        ("{}/short.txt", r"eval\.sets: the set 'odd': it has 5 tokens, but train\.sequence_length = 32 needs 33"),
        ("{}/empty.txt", r"eval\.sets: the set 'odd': it has 0 tokens"),
        ("{}/x.py", r"eval\.sets: the set 'odd': .*x\.py is no \.txt, \.md, "),
        ("{}/bad.jsonl.gz", r"eval\.sets: the set 'odd': .* is not a gzip file"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(texts, opened, glob, words):
    for name, text in {"short.txt": "text", "empty.txt": "", "x.py": "pass", "bad.jsonl.gz": "no"}.items():
        (texts / name).write_text(text)
    with refused(words):
        opened(good=f"{texts}/30.txt", odd=glob.format(texts))


def test_a_place_that_cannot_be_written_is_told(texts, tmp_path):
    (tmp_path / "in the way").touch()
    config = DataConfig(dir=str(tmp_path / "in the way"))
    with refused(r"eval\.sets: the set 'a': data\.dir: .* cannot be used for prepared data"):
        open_sets({"a": f"{texts}/00.txt"}, config, BYTES, 8, print)
