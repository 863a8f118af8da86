"""From a DataConfig to rows, as the trainer sees it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.refusals import refused

from default_moe.config import DataConfig
from default_moe.data import data_directory, measure_reading, open_data, token_store
from default_moe.data.corpus import EvenlySplit


def config(texts, **changes):
    values = {"files": f"{texts}/*", "dir": str(texts.parent / "data"), "validation_fraction": 0.3, **changes}
    return DataConfig(name="text_files", **values)


def opened(texts, **changes):
    """The data, and the lines about it."""
    lines = []
    return open_data(config(texts, **changes), lines.append), lines


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_text_goes_in_and_comes_out(texts, tokenizer):
    data, _ = opened(texts, tokenizer=tokenizer)
    found = []
    for store in (data.train, data.validation):
        ends = np.flatnonzero(store.tokens == data.tokenizer.separator)
        found += [data.tokenizer.decode(document[:-1]) for document in np.split(store.tokens, ends + 1)[:-1]]
        assert data.tokenizer.token_bytes[store.tokens].sum() == store.info.bytes
    assert sorted(found) == sorted(path.read_text() for path in texts.iterdir())


def test_evaluation_counts_every_byte_but_the_first_token(texts):
    data, _ = opened(texts)
    rows = data.validation_rows(32)
    assert rows.batch(0, len(rows))["target_bytes"].sum() == data.validation.info.bytes - 1


def test_second_start_prepares_nothing(texts):
    first, lines = opened(texts, tokenizer="bpe:300")
    begins = ("Trained a BPE of", "Prepared text_files (train):", "Prepared text_files (validation):")
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True))
    second, lines = opened(texts, tokenizer="bpe:300")
    assert lines == [] and second.corpus_hash == first.corpus_hash
    for name, array in first.train_rows(16, 1).batch(5, 3).items():
        np.testing.assert_array_equal(array, second.train_rows(16, 1).batch(5, 3)[name])


def test_corpus_hash_is_the_texts_own(texts):
    before, _ = opened(texts)
    for path in texts.iterdir():
        os.utime(path, (1, 1))
    touched, lines = opened(texts)
    assert touched.corpus_hash == before.corpus_hash
    assert lines  # tokenized anew, as far as the cheap fingerprint knows
    elsewhere = texts.rename(texts.parent / "elsewhere")
    assert opened(elsewhere, tokenizer="bpe:300")[0].corpus_hash == before.corpus_hash
    (elsewhere / "00.txt").write_text("changed")
    assert opened(elsewhere)[0].corpus_hash != before.corpus_hash


@pytest.mark.parametrize("damage", ["{", json.dumps({"kind": "x"})])
def test_trained_bpe_is_trained_again_if_damaged(texts, damage):
    before = opened(texts, tokenizer="bpe:300")[0].tokenizer.to_dict()
    (path,) = texts.parent.glob("data/*/bpe-300.json")
    path.write_text(damage)
    assert opened(texts, tokenizer="bpe:300")[0].tokenizer.to_dict() == before


def test_bpe_learns_only_from_train(texts):
    held_out = opened(texts)[0].validation
    text = bytes(held_out.tokens[: held_out.tokens.tolist().index(256)].astype(np.uint8)).decode()
    number = int(text.split(":")[0].split()[1])
    (texts / f"{number:02}.txt").write_text("qqqqqqqqqqqqqqqq" * 500)
    assert len(opened(texts, tokenizer="bpe:300")[0].tokenizer.encode("qqqq")) == 4


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_replaced_bytes_are_reported_at_every_start(texts, tokenizer):
    for name in ("00.txt", "01.txt", "02.txt"):
        (texts / name).write_bytes(b"bad \xff and \xfe")
    data, lines = opened(texts, tokenizer=tokenizer)
    said = "note: invalid Unicode in 6 places of the text became U+FFFD"
    assert lines[-1].startswith(f"{said}, {texts}/0") and sum("Unicode" in line for line in lines) == 1
    assert data.train.info.replaced + data.validation.info.replaced == 6
    assert opened(texts, tokenizer=tokenizer)[1] == [said]


@pytest.mark.parametrize(("fraction", "train", "validation"), [(1e-9, 39, 1), (1 - 1e-9, 1, 39)])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_both_splits_have_documents(texts, fraction, train, validation, tokenizer):
    data, lines = opened(texts, validation_fraction=fraction, tokenizer=tokenizer)
    assert (data.train.info.documents, data.validation.info.documents) == (train, validation)
    assert data.train.info.bytes + data.validation.info.bytes == sum(path.stat().st_size for path in texts.iterdir())
    again, said = opened(texts, validation_fraction=fraction, tokenizer=tokenizer)
    assert again.corpus_hash == data.corpus_hash and said == [line for line in lines if line.startswith("note: ")]


def test_what_is_held_out_of_a_split_that_has_all(list_corpus):
    corpus = EvenlySplit(list_corpus([str(number) for number in range(40)]), "train", 40, 0.1)
    assert list(corpus.documents("validation")) == ["5", "15", "25", "35"]
    assert len(list(corpus.documents("train"))) == 36


def test_a_split_that_has_documents_stays_as_it_was(texts):
    """As the first version split these."""
    assert opened(texts)[0].corpus_hash == "f52cd628dad55da98d49c8d04ff9e37a4d22b63a6bc6bfb666a6a84e978c8a6a"


def test_one_document_is_too_few(texts):
    for path in sorted(texts.iterdir())[1:]:
        path.unlink()
    with refused(r"data\.files = .* holds one document, but must have documents to train on and to hold out"):
        opened(texts)


def test_too_little_text(texts):
    data, _ = opened(texts)
    with refused(r"train split has \d+ tokens, but train\.sequence_length = 1000000 needs"):
        data.train_rows(1_000_000, 0)
    with refused(r"validation split has .* or raise data\.validation_fraction"):
        data.validation_rows(1_000_000)
    for path in texts.iterdir():
        path.write_text("")
    with refused("holds no text"):
        opened(texts)


def test_unusable_directory(texts):
    (texts.parent / "file").write_text("")
    with refused(r"data\.dir: .*/file/data cannot be used for prepared data: Not a directory"):
        opened(texts, dir=str(texts.parent / "file" / "data"))


def test_full_disk(texts, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_store.np, "append", full)
    with refused(r"data\.dir: .* prepared data: No space left on device"):
        opened(texts)
    assert not list(texts.parent.rglob("data/**/*.t*"))


def test_directory_is_chosen_by_config_environment_and_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEFAULT_MOE_DATA", raising=False)
    assert data_directory(DataConfig()) == tmp_path / ".cache" / "default_moe"
    monkeypatch.setenv("DEFAULT_MOE_DATA", str(tmp_path / "environment"))
    assert data_directory(DataConfig()) == tmp_path / "environment"
    assert data_directory(DataConfig(dir="~/mine")) == tmp_path / "mine"


@pytest.mark.parametrize("wrong", [{"files": "no-such/*"}, {"tokenizer": "no-such.json"}])
def test_wrong_settings_write_nothing(texts, wrong):
    with refused("no-such"):
        opened(texts, **wrong)
    assert not (texts.parent / "data").exists()


def test_unknown_corpus(tmp_path):
    with refused(r"is 'python_stdlb', but there is no such corpus.*'python_stdlib'"):
        open_data(DataConfig(name="python_stdlb", dir=str(tmp_path)))


def test_standard_library_second_start_needs_no_tfds(stdlib_config, stdlib_data):
    program = (
        "import sys; from default_moe.config import DataConfig; from default_moe.data import open_data; "
        f"data = open_data(DataConfig(dir={stdlib_config.dir!r})); "
        "print(data.corpus_hash, 'tensorflow_datasets' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{stdlib_data.corpus_hash} False False\n", "")


def test_validation_fraction_has_a_cache_of_its_own(texts):
    few, many, again = (opened(texts, validation_fraction=fraction)[0].validation.info for fraction in (0.2, 0.6, 0.2))
    assert few.documents < many.documents and again == few


def test_reading_is_fast(stdlib_data):
    assert measure_reading(stdlib_data, sequence_length=256, batch_size=32, seconds=0.2) > 500_000


def test_config_may_name_a_relative_tokenizer(texts, monkeypatch):
    bpe = opened(texts, tokenizer="bpe:300")[0].tokenizer
    Path(texts.parent / "tokenizer.json").write_text(json.dumps(bpe.to_dict()["json"]))
    monkeypatch.chdir(texts.parent)
    data, _ = opened(texts, tokenizer="tokenizer.json")
    np.testing.assert_array_equal(data.tokenizer.encode("grüße"), bpe.encode("grüße"))
