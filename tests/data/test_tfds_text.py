"""Prepared data sets of TensorFlow Datasets, without TensorFlow and without the network."""

import json
import socket
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from default_moe.data.stdlib_builder import PythonStdlib
from default_moe.data.tfds_text import TfdsText, quiet_tfds
from default_moe.errors import ConfigError


class TinyTexts(PythonStdlib):
    """Stands for any text data set."""


@pytest.fixture(autouse=True)
def no_network_and_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tensorflow_datasets"))


def prepare(directory: Path, file_format: str = "array_record", **splits: list[str]) -> Path:
    documents = {split: [(text, text) for text in texts] for split, texts in splits.items()}
    builder = TinyTexts(documents=documents, data_dir=str(directory), file_format=file_format)
    with quiet_tfds():
        builder.download_and_prepare()
    return Path(builder.data_dir)


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


TRAIN = [f"text {index}" for index in range(100)]


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_reads_its_splits(tmp_path: Path, file_format: str) -> None:
    prepare(tmp_path, file_format, train=TRAIN, test=["held out"])
    corpus = TfdsText("tiny_texts", "text", 0.5, tmp_path)
    assert sorted(corpus.documents("train")) == sorted(TRAIN)
    assert list(corpus.documents("validation")) == ["held out"]


def test_holds_out_where_there_is_no_such_split(tmp_path: Path) -> None:
    prepare(tmp_path, train=TRAIN)
    corpus = TfdsText("tiny_texts:1.0.0", "text", 0.2, tmp_path)
    train, validation = (list(corpus.documents(split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(TRAIN)
    assert 8 < len(validation) < 35


def test_tfds_own_directory(tmp_path: Path) -> None:
    prepare(tmp_path / "tensorflow_datasets", train=TRAIN)
    assert list(TfdsText("tiny_texts", "text", 0.2, tmp_path / "data").documents("train"))


def test_several_shards_of_parquet_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {"train": [(text, text) for text in TRAIN]}
    builder = TinyTexts(documents=documents, data_dir=str(tmp_path), file_format="parquet")
    with quiet_tfds():
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    corpus = TfdsText("tiny_texts", "text", 0.2, tmp_path)
    assert len(list(tmp_path.rglob("*.parquet*"))) == 4
    assert sorted([*corpus.documents("train"), *corpus.documents("validation")]) == sorted(TRAIN)


def test_prepared_as_tfrecord(tmp_path: Path) -> None:
    path = prepare(tmp_path, train=TRAIN)
    edit(path / "dataset_info.json", fileFormat="tfrecord")
    advice = r"prepare it with tfds\.builder\('tiny_texts', .*\)\.download_and_prepare\(file_format=.array_record.\)"
    with pytest.raises(ConfigError, match="as tfrecord, .* or parquet; move it away and " + advice):
        TfdsText("tiny_texts", "text", 0.2, tmp_path)
    (tmp_path / "tensorflow_datasets").mkdir()
    path.parent.rename(tmp_path / "tensorflow_datasets" / "tiny_texts")
    with pytest.raises(ConfigError, match="as tfrecord, .* or parquet; " + advice):
        TfdsText("tiny_texts", "text", 0.2, tmp_path / "data")


@pytest.mark.parametrize("name", ["c4/en", "wiki40b", "wikipedia/20230601.en", "imdb_reviews"])
def test_not_prepared(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r'is not prepared in .*download_and_prepare\(file_format="array_record"\)'):
        TfdsText(name, "text", 0.2, tmp_path)


@pytest.mark.parametrize(("name", "nearest"), [("c5", "c4"), ("python_stdlb", "python_stdlib"), ("wiki4b", "wiki40b")])
def test_unknown_name(tmp_path: Path, name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"is '{name}', but there is no such corpus.*did you mean '{nearest}'"):
        TfdsText(name, "text", 0.2, tmp_path)


def test_unknown_field(tmp_path: Path) -> None:
    prepare(tmp_path, train=TRAIN)
    with pytest.raises(
        ConfigError, match=r"'txt', but 'tiny_texts' has the fields 'name', 'text'; did you mean 'text'"
    ):
        TfdsText("tiny_texts", "txt", 0.2, tmp_path)


def test_no_train_split(tmp_path: Path) -> None:
    prepare(tmp_path, test=TRAIN)
    with pytest.raises(ConfigError, match="has no split 'train', but 'test'"):
        TfdsText("tiny_texts", "text", 0.2, tmp_path)


def test_several_configurations(tmp_path: Path) -> None:
    path = prepare(tmp_path / "made", train=TRAIN)
    for config in ("en", "de"):
        (tmp_path / "tiny_texts" / config).mkdir(parents=True)
        path.rename(tmp_path / "tiny_texts" / config / "1.0.0")
        path = prepare(tmp_path / "made", train=TRAIN)
    with pytest.raises(
        ConfigError, match="must say which of its configurations to read: 'tiny_texts/de', 'tiny_texts/en'"
    ):
        TfdsText("tiny_texts", "text", 0.2, tmp_path)
    assert list(TfdsText("tiny_texts/en", "text", 0.2, tmp_path).documents("train"))


def test_features_of_other_modules_are_not_imported(tmp_path: Path) -> None:
    path = prepare(tmp_path, train=TRAIN) / "features.json"
    path.write_text(path.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "antigravity.Text"))
    with pytest.raises(ConfigError, match=r"names 'antigravity\.Text', but only TFDS's own features are read"):
        TfdsText("tiny_texts", "text", 0.2, tmp_path)


def test_damaged_description(tmp_path: Path) -> None:
    path = prepare(tmp_path, train=TRAIN)
    (path / "features.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a data set that TFDS 4 prepared"):
        TfdsText("tiny_texts", "text", 0.2, tmp_path)
