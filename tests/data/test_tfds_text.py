"""Prepared data sets of TensorFlow Datasets, without TensorFlow and without the network."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from helpers.refusals import refused

from default_moe.data.stdlib import StdlibCorpus
from default_moe.data.stdlib_builder import PythonStdlib
from default_moe.data.tfds_text import TfdsText, open_prepared, quiet_tfds
from default_moe.files import write_manifest

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
    prepared = prepare(tmp_path, file_format, train=TRAIN, test=["held out"])
    assert splits(open_tiny(tmp_path)) == [sorted(TRAIN), ["held out"]]
    known = open_tiny(tmp_path).sources()
    assert known["versions"] == {"data set": "1.0.0"} and known["files"].keys() == set(os.listdir(prepared))


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


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module's name. The file is there once somebody has imported it."""
    mark = tmp_path / "imported"
    (tmp_path / "evilmod.py").write_text(f"open({str(mark)!r}, 'w')\nclass Boom: ...\nclass Text: ...\n")
    (tmp_path / "tensorflow_datasets_evil.py").write_text((tmp_path / "evilmod.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    for name in ("evilmod", "tensorflow_datasets_evil"):
        sys.modules.pop(name, None)


TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
BOOM = {"type": "evilmod.Boom", "content": {}}


def in_json(*names: str) -> dict:
    """A sequence whose JSON holds JSON, as deep as there are names, of a feature that is not TFDS's."""
    inner = BOOM
    for name in names:
        inner = {
            "pythonClassName": f"tensorflow_datasets.core.features.{name}",
            "jsonFeature": {"json": json.dumps({"feature": inner})},
        }
    return inner


@pytest.mark.parametrize(
    "feature",
    [
        BOOM,
        {"type": "tensorflow_datasets_evil.Boom", "content": {}},
        {**TEXT, "pythonClassName": "evilmod.Boom"},
        {"python_class_name": "evilmod.Boom", "text": {}},
        {**TEXT, "pythonClassName": "tensorflow_datasets.testing.test_utils.Boom"},
        in_json("sequence_feature.Sequence"),
        in_json("sequence_feature.Sequence", "sequence_feature.Sequence"),
        {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "sequence": {"feature": BOOM},
        },
        {
            "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
            "featuresDict": {"features": {"type": {"python_class_name": "evilmod.Boom"}}},
        },
        {
            "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
            "content": json.dumps({"features": {"a": {"pythonClassName": "evilmod.Boom"}}}),
            "proto_cls": "tensorflow_datasets.FeaturesDict",
        },
    ],
)
def test_no_data_set_names_code_to_import(tmp_path, evil, feature):
    path = prepare(tmp_path)
    features = json.loads((path / "features.json").read_text())
    features["featuresDict"]["features"]["other"] = feature
    for content in (features, {**features, **BOOM}, feature):
        (path / "features.json").write_text(json.dumps(content))
        with refused(r"but only these features are read: Text, |TFDS 4 prepared|data\.text_field is"):
            open_tiny(tmp_path)
        with refused("but only these features are read: Text, "):
            open_prepared(path)
    assert not evil.exists()


def test_the_standard_library_names_no_code_either(tmp_path, evil):
    (tmp_path / "lib").mkdir()
    for number in range(9):
        (tmp_path / "lib" / f"{number}.py").write_text(f"x = {number}\n")
    corpus = StdlibCorpus(0.3, tmp_path / "data", tmp_path / "lib", lambda line: None)
    list(corpus.documents("train"))
    (path,) = (tmp_path / "data").iterdir()
    (path / "features.json").write_text(json.dumps(BOOM))
    assert list(corpus.documents("train"))  # made again: not what was written
    (path / "features.json").write_text(json.dumps(BOOM))
    (path / "digests.json").unlink()
    write_manifest(path)
    with refused("names 'evilmod.Boom', but only these features are read"):
        list(corpus.documents("train"))
    assert not evil.exists()


def test_what_a_data_set_says_of_its_origin_is_not_imported(tmp_path, evil):
    path = prepare(tmp_path) / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "moduleName": "evilmod"}))
    assert splits(open_tiny(tmp_path))[0] and not evil.exists()


@pytest.mark.parametrize("template", ["/dev/{SPLIT}", "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"])
@pytest.mark.parametrize("key", ["filepathTemplate", "filepath_template"])
def test_a_data_set_reads_files_of_its_own_folder_only(tmp_path, template, key):
    path = prepare(tmp_path) / "dataset_info.json"
    info = json.loads(path.read_text())
    for split in info["splits"]:
        split.pop("filepathTemplate")
        split[key] = template
    path.write_text(json.dumps(info))
    with refused("must hold its own files, but names"):
        open_tiny(tmp_path)


@pytest.mark.parametrize("name", ["*train*", "features.json", "dataset_info.json", "other.labels.txt"])
def test_a_pipe_in_a_data_set(tmp_path, name):
    folder = prepare(tmp_path)
    path = next(folder.glob(name), folder / name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with refused("[Nn]ot a regular file"):
        open_tiny(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "null", "[" * 100_000, '{"featuresDict": {"features": [1]}}', '{"a": 1e999}']
)
@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_json_of_another_kind_describes_no_data_set(tmp_path, name, content):
    (prepare(tmp_path) / name).write_text(content)
    with refused("is not a data set that TFDS 4 prepared|is prepared as tfrecord") as error:
        open_tiny(tmp_path)
    assert len(str(error.value)) < 1000
