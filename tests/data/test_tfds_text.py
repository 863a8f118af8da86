"""Prepared data sets of TensorFlow Datasets, without TensorFlow and without the network."""

import json
import socket
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from helpers.refusals import refused

from default_moe.data.stdlib_builder import PythonStdlib
from default_moe.data.tfds_text import TfdsText, quiet_tfds

TRAIN = [f"text {index}" for index in range(100)]


class TinyTexts(PythonStdlib):
    """Stands for any text data set."""


@pytest.fixture(autouse=True)
def no_network_and_no_home(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tensorflow_datasets"))


def prepare(directory: Path, file_format: str = "array_record", num_shards: int | None = None, **splits) -> Path:
    documents = {split: [(text, text) for text in texts] for split, texts in (splits or {"train": TRAIN}).items()}
    builder = TinyTexts(documents=documents, data_dir=str(directory), file_format=file_format)
    with quiet_tfds():
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=num_shards))
    return Path(builder.data_dir)


def open_tiny(directory: Path, name: str = "tiny_texts", field: str = "text") -> TfdsText:
    return TfdsText(name, field, 0.2, directory)


def splits(corpus: TfdsText) -> list[list[str]]:
    return [sorted(corpus.documents(split)) for split in ("train", "validation")]


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_reads_its_splits(tmp_path, file_format):
    prepare(tmp_path, file_format, train=TRAIN, test=["held out"])
    assert splits(open_tiny(tmp_path)) == [sorted(TRAIN), ["held out"]]


def test_holds_out_where_there_is_no_such_split(tmp_path):
    prepare(tmp_path)
    train, validation = splits(open_tiny(tmp_path, "tiny_texts:1.0.0"))
    assert sorted(train + validation) == sorted(TRAIN)
    assert 8 < len(validation) < 35


def test_tfds_own_directory(tmp_path):
    prepare(tmp_path / "tensorflow_datasets")
    assert splits(open_tiny(tmp_path / "data"))[0]


def test_several_shards_of_parquet_are_all_read(tmp_path):
    prepare(tmp_path, "parquet", num_shards=4)
    assert len(list(tmp_path.rglob("*.parquet*"))) == 4
    train, validation = splits(open_tiny(tmp_path))
    assert sorted(train + validation) == sorted(TRAIN)


def test_prepared_as_tfrecord(tmp_path):
    path = prepare(tmp_path)
    info = path / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    advice = r"prepare it with tfds\.builder\('tiny_texts', .*\)\.download_and_prepare\(file_format=.array_record.\)"
    with refused("as tfrecord, .* or parquet; move it away and " + advice):
        open_tiny(tmp_path)
    (tmp_path / "tensorflow_datasets").mkdir()
    path.parent.rename(tmp_path / "tensorflow_datasets" / "tiny_texts")
    with refused("as tfrecord, .* or parquet; " + advice):
        open_tiny(tmp_path / "data")


@pytest.mark.parametrize("name", ["c4/en", "wiki40b", "wikipedia/20230601.en", "imdb_reviews"])
def test_not_prepared(tmp_path, name):
    with refused(r'is not prepared in .*download_and_prepare\(file_format="array_record"\)'):
        open_tiny(tmp_path, name)


@pytest.mark.parametrize(("name", "nearest"), [("c5", "c4"), ("python_stdlb", "python_stdlib"), ("wiki4b", "wiki40b")])
def test_unknown_name(tmp_path, name, nearest):
    with refused(f"is '{name}', but there is no such corpus.*did you mean '{nearest}'"):
        open_tiny(tmp_path, name)


def test_unknown_field(tmp_path):
    prepare(tmp_path)
    with refused(r"'txt', but 'tiny_texts' has the fields 'name', 'text'; did you mean 'text'"):
        open_tiny(tmp_path, field="txt")


def test_no_train_split(tmp_path):
    prepare(tmp_path, test=TRAIN)
    with refused("has no split 'train', but 'test'"):
        open_tiny(tmp_path)


def test_several_configurations(tmp_path):
    for config in ("en", "de"):
        (tmp_path / "tiny_texts" / config).mkdir(parents=True)
        prepare(tmp_path / "made").rename(tmp_path / "tiny_texts" / config / "1.0.0")
    with refused("must say which of its configurations to read: 'tiny_texts/de', 'tiny_texts/en'"):
        open_tiny(tmp_path)
    assert splits(open_tiny(tmp_path, "tiny_texts/en"))[0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda text: text.replace("tensorflow_datasets.core.features.text_feature.Text", "antigravity.Text"),
            r"field of 'tiny_texts' does not hold text",
        ),
        (lambda text: "{", "is not a data set that TFDS 4 prepared"),
    ],
)
def test_features_that_are_not_tfdss(tmp_path, damage, words):
    path = prepare(tmp_path) / "features.json"
    path.write_text(damage(path.read_text()))
    with refused(words):
        open_tiny(tmp_path)
