"""From a DataConfig to rows, as the trainer sees it."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from default_moe.config import DataConfig
from default_moe.data import Data, data_directory, measure_reading, open_data, token_store
from default_moe.errors import ConfigError


def config(texts: Path, **changes: object) -> DataConfig:
    values = {"files": f"{texts}/*", "dir": str(texts.parent / "data"), "validation_fraction": 0.3, **changes}
    return DataConfig(name="text_files", **values)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_text_goes_in_and_comes_out(texts: Path, tokenizer: str) -> None:
    data = open_data(config(texts, tokenizer=tokenizer))
    originals = sorted(path.read_text() for path in texts.iterdir())
    found = []
    for store in (data.train, data.validation):
        ends = np.flatnonzero(store.tokens == data.tokenizer.separator)
        found += [data.tokenizer.decode(document[:-1]) for document in np.split(store.tokens, ends + 1)[:-1]]
        assert data.tokenizer.token_bytes[store.tokens].sum() == store.info.bytes
    assert sorted(found) == originals


def test_evaluation_counts_every_byte_but_the_first_token(texts: Path) -> None:
    data = open_data(config(texts))
    rows = data.validation_rows(32)
    assert rows.batch(0, len(rows))["target_bytes"].sum() == data.validation.info.bytes - 1


def test_second_start_prepares_nothing(texts: Path) -> None:
    lines: list[str] = []
    settings = config(texts, tokenizer="bpe:300")
    first = open_data(settings, lines.append)
    assert [line.partition(":")[0].partition(" of ")[0] for line in lines] == [
        "Trained a BPE",
        "Prepared text_files (train)",
        "Prepared text_files (validation)",
    ]
    lines.clear()
    second = open_data(settings, lines.append)
    assert lines == []
    assert second.corpus_hash == first.corpus_hash
    for name, array in first.train_rows(16, 1).batch(5, 3).items():
        np.testing.assert_array_equal(array, second.train_rows(16, 1).batch(5, 3)[name])


def test_corpus_hash_is_the_texts_own(texts: Path) -> None:
    before = open_data(config(texts))
    for path in texts.iterdir():
        os.utime(path, (1, 1))
    lines: list[str] = []
    assert open_data(config(texts), lines.append).corpus_hash == before.corpus_hash
    assert lines  # tokenized anew, as far as the cheap fingerprint knows
    elsewhere = texts.rename(texts.parent / "elsewhere")
    moved = open_data(config(elsewhere, tokenizer="bpe:300"))
    assert moved.corpus_hash == before.corpus_hash
    (elsewhere / "00.txt").write_text("changed")
    assert open_data(config(elsewhere)).corpus_hash != before.corpus_hash


def test_trained_bpe_is_trained_again_if_damaged(texts: Path) -> None:
    settings = config(texts, tokenizer="bpe:300")
    before = open_data(settings).tokenizer.to_dict()
    (path,) = Path(settings.dir).glob("*/bpe-300.json")
    for damage in ("{", json.dumps({"kind": "x"})):
        path.write_text(damage)
        assert open_data(settings).tokenizer.to_dict() == before


def test_bpe_learns_from_train_alone(texts: Path) -> None:
    held_out = open_data(config(texts)).validation
    text = bytes(held_out.tokens[: held_out.tokens.tolist().index(256)].astype(np.uint8)).decode()
    number = int(text.split(":")[0].split()[1])
    (texts / f"{number:02}.txt").write_text("qqqqqqqqqqqqqqqq" * 500)
    tokenizer = open_data(config(texts, tokenizer="bpe:300")).tokenizer
    assert len(tokenizer.encode("qqqq")) == 4


def test_replaced_bytes_are_reported_once(texts: Path) -> None:
    for name in ("00.txt", "01.txt", "02.txt"):
        (texts / name).write_bytes(b"bad \xff and \xfe")
    for tokenizer in ("bytes", "bpe:300"):
        lines: list[str] = []
        data = open_data(config(texts, tokenizer=tokenizer), lines.append)
        reports = [line for line in lines if line.startswith("Replaced")]
        assert len(reports) == 1
        assert reports[0].startswith("Replaced invalid Unicode in 6 places of 3 files, ")
        assert data.train.info.replaced + data.validation.info.replaced == 6


def test_too_little_text(texts: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation split is empty: data\.files = .* has 40 documents .*; raise it"):
        open_data(config(texts, validation_fraction=1e-9))
    with pytest.raises(ConfigError, match=r"train split is empty: data\.files = .* has 40 documents .*; lower it"):
        open_data(config(texts, validation_fraction=1 - 1e-9))
    data = open_data(config(texts))
    with pytest.raises(ConfigError, match=r"train split has \d+ tokens, but train\.sequence_length = 1000000 needs"):
        data.train_rows(1_000_000, 0)
    with pytest.raises(ConfigError, match=r"validation split has .* or raise data\.validation_fraction"):
        data.validation_rows(1_000_000)
    for path in texts.iterdir():
        path.write_text("")
    with pytest.raises(ConfigError, match="holds no text"):
        open_data(config(texts))


def test_unusable_directory(texts: Path) -> None:
    (texts.parent / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.dir: .*/file/data cannot be used for prepared data: Not a directory"):
        open_data(config(texts, dir=str(texts.parent / "file" / "data")))


def test_full_disk(texts: Path, monkeypatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_store.zlib, "crc32", full)
    with pytest.raises(ConfigError, match=r"data\.dir: .* prepared data: No space left on device"):
        open_data(config(texts))
    assert not list(texts.parent.rglob("data/**/*.t*"))


def test_directory_is_chosen_by_config_environment_and_default(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEFAULT_MOE_DATA", raising=False)
    assert data_directory(DataConfig()) == tmp_path / ".cache" / "default_moe"
    monkeypatch.setenv("DEFAULT_MOE_DATA", str(tmp_path / "environment"))
    assert data_directory(DataConfig()) == tmp_path / "environment"
    assert data_directory(DataConfig(dir="~/mine")) == tmp_path / "mine"


@pytest.mark.parametrize("wrong", [{"files": "no-such/*"}, {"tokenizer": "no-such.json"}])
def test_wrong_settings_write_nothing(texts: Path, wrong: dict) -> None:
    with pytest.raises(ConfigError, match="no-such"):
        open_data(config(texts, **wrong))
    assert not (texts.parent / "data").exists()


def test_unknown_corpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is 'python_stdlb', but there is no such corpus.*'python_stdlib'"):
        open_data(DataConfig(name="python_stdlb", dir=str(tmp_path)))


def test_standard_library_second_start_needs_no_tfds(stdlib_config: DataConfig, stdlib_data: Data) -> None:
    program = (
        "import sys; from default_moe.config import DataConfig; from default_moe.data import open_data; "
        f"data = open_data(DataConfig(dir={stdlib_config.dir!r})); "
        "print(data.corpus_hash, 'tensorflow_datasets' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{stdlib_data.corpus_hash} False False\n"
    assert done.stderr == ""


def test_validation_fraction_has_a_cache_of_its_own(texts: Path) -> None:
    few, many = (open_data(config(texts, validation_fraction=fraction)) for fraction in (0.2, 0.6))
    assert few.validation.info.documents < many.validation.info.documents
    again = open_data(config(texts, validation_fraction=0.2))
    assert again.validation.info == few.validation.info


def test_reading_is_fast(stdlib_data: Data) -> None:
    assert measure_reading(stdlib_data, sequence_length=256, batch_size=32, seconds=0.2) > 500_000


def test_config_may_name_a_relative_tokenizer(texts: Path, monkeypatch) -> None:
    bpe = open_data(config(texts, tokenizer="bpe:300")).tokenizer
    (texts.parent / "tokenizer.json").write_text(json.dumps(bpe.to_dict()["json"]))
    monkeypatch.chdir(texts.parent)
    data = open_data(dataclasses.replace(config(texts), tokenizer="tokenizer.json"))
    np.testing.assert_array_equal(data.tokenizer.encode("grüße"), bpe.encode("grüße"))
