"""Paths and files of every wrong kind: one line, at once, without a control character or a whole book in it."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets  # noqa: F401  (it keeps the $TFDS_DATA_DIR that it was imported with)
from helpers.refusals import refused
from tensorflow_datasets.core import constants

from default_moe.config import DataConfig
from default_moe.data import open_data, text_files
from default_moe.data.text_files import TextFiles
from default_moe.data.tfds_text import TfdsText
from default_moe.data.tokenizer import open_tokenizer_file
from default_moe.errors import ConfigError


def special(folder: Path, kind: str, name: str) -> Path:
    """A file that may never end, or begin."""
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    else:
        path.symlink_to("/dev/zero")
    return path


KINDS = ("pipe", "link to a pipe", "link to a device")


@pytest.mark.parametrize("kind", KINDS)
def test_pipes_and_devices_are_no_text(texts: Path, kind: str):
    path = special(texts, kind, "a.txt")
    for pattern in (path, f"{texts}/*.txt", f"{texts}/**"):
        with refused(r"data\.files: .* is not a regular file"):
            TextFiles(str(pattern), "text", 0.5)
    with refused(r"data\.files: /dev/zero is not a regular file"):
        TextFiles("/dev/zero", "text", 0.5)


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_a_file_that_turns_into_a_pipe(texts: Path, suffix: str):
    path = texts / f"a{suffix}"
    path.write_text("x")
    corpus = TextFiles(str(path), "text", 0.5)
    path.unlink()
    os.mkfifo(path)
    with refused("Not a regular file"):
        list(corpus.documents("train"))


@pytest.mark.parametrize("kind", KINDS)
def test_pipes_and_devices_are_no_tokenizer(tmp_path: Path, kind: str):
    for path in (special(tmp_path, kind, "tokenizer.json"), Path("/dev/zero"), Path("/dev/stdin")):
        with refused(r"data\.tokenizer: .* cannot be read: "):
            open_tokenizer_file(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bpe-270.json", "train.json", "train.tokens"])
def test_pipes_and_devices_in_the_place_of_prepared_data(texts: Path, kind: str, name: str):
    config = DataConfig(name="text_files", files=f"{texts}/*", dir=f"{texts.parent}/data", tokenizer="bpe:270")
    before = open_data(config, log=lambda line: None)
    (path,) = Path(str(config.dir)).rglob(name)
    path.unlink()
    special(path.parent, kind, name)
    lines: list[str] = []
    assert open_data(config, lines.append).corpus_hash == before.corpus_hash
    assert "cannot be read: Not a regular file" in lines[0] and path.is_file()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"5",
        b'"text"',
        b"",
        b"\0" * 100,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"1" * 5000,
        '{"model": "\ud83d"}'.encode("utf-16-le", "surrogatepass"),
        '{"model": {"type": "é"}}'.encode("latin-1"),
        json.dumps({"model": {"type": "BPE" * 1000}}).encode("utf-16"),
        b'{"model": {"type": "\x1b[2J\\u001b[2J\\n"}}',
    ],
)
def test_json_of_another_kind_is_no_tokenizer(tmp_path: Path, content: bytes):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with refused(r"tokenizer\.json is not a tokenizer\.json: ") as error:
        open_tokenizer_file(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "a\ud800b"])
def test_paths_that_no_file_has(tmp_path: Path, monkeypatch, path: str):
    with refused(r"data\.dir is .*, but must be"):
        open_data(DataConfig(dir=path))
    with refused(r"data\.tokenizer is .*, but must be"):
        open_data(DataConfig(tokenizer=path, dir=str(tmp_path)))
    with refused(r"data\.files is .*, (but must be|which cannot be)"):
        open_data(DataConfig(name="text_files", files=f"{path}/*.txt", dir=str(tmp_path)))
    if "~" in path:
        for variable, name in (("DEFAULT_MOE_DATA", "python_stdlib"), ("TFDS_DATA_DIR", "c4/en")):
            monkeypatch.setenv(variable, path)
            with refused(rf"\${variable} is '~nosuchuser/x', which cannot be a path: "):
                open_data(DataConfig(name=name))
            monkeypatch.delenv(variable)
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home(tmp_path: Path, monkeypatch):
    for variable in ("HOME", "DEFAULT_MOE_DATA", "TFDS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # whom no file of passwords knows
    monkeypatch.setattr(constants, "DATA_DIR", os.path.expanduser("~/tensorflow_datasets"))
    with refused(
        r"^the default of \$DEFAULT_MOE_DATA is '~/\.cache/default_moe', .*; set HOME, or give a path without ~"
    ):
        open_data(DataConfig())
    with refused(r"^data\.files is '~/\*\.txt', .*; set HOME, or give a path without ~"):
        open_data(DataConfig(name="text_files", files="~/*.txt", dir=str(tmp_path)))
    with refused(r"data\.dir is '~/x', but must .* \(is HOME set\?\)"):
        DataConfig(dir="~/x")
    with refused(rf"data set 'c4/en' is not prepared in {tmp_path} or ~/tensorflow_datasets; "):
        open_data(DataConfig(name="c4/en", dir=str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["c4\0", "c4/../../x:/etc", "c4:/x", "/etc", "../x", "c4/en:**/*", "a b", "x" * 5000, "c4\n"]
)
def test_names_that_no_data_set_has(tmp_path: Path, name: str):
    with refused(r"data\.name is ") as error:
        TfdsText(name, "text", 0.5, tmp_path)
    assert len(str(error.value)) < 1000


def test_what_is_outside_stays_escaped_and_short(tmp_path: Path):
    field, name = "text" + "\x1b[2J\n" * 1000, "\x1b[2J" * 20 + "\n.jsonl"
    (tmp_path / name).write_text(json.dumps({"\x1b\n" * 1000: 1}) + "\n")
    pq.write_table(pa.table({"\x1b\n" * 1000: ["x"], **{str(n): ["y"] for n in range(1000)}}), tmp_path / "a.parquet")
    for pattern in ("*.jsonl", "*.parquet", "*", "\x1b\n" * 1000):
        with refused(r"data\.(files|text_field)") as error:
            list(TextFiles(f"{tmp_path}/{pattern}", field, 0.01).documents("train"))
        assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("compressed", [False, True])
def test_a_line_without_end(tmp_path: Path, monkeypatch, compressed: bool):
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1000)
    data = b'{"text": "x"}\n' + b"\0" * 1000
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if compressed else data)
    with refused(r":2 has 1,000 bytes or more, too many for one document"):
        list(TextFiles(str(path), "text", 0.5).documents("train"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_files_cut_or_altered_anywhere(tmp_path: Path, kind: str):
    lines = "".join(json.dumps({"text": f"some text {number}"}) + "\n" for number in range(40)).encode()
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [f"some text {number}" for number in range(40)]}), path)
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    whole = path.read_bytes()
    step = max(len(whole) // 40, 1)
    damaged = [whole[:place] for place in range(0, len(whole), step)]
    damaged += [
        whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :] for place in range(0, len(whole), step)
    ]
    for content in damaged:
        path.write_bytes(content)
        try:
            list(TextFiles(str(path), "text", 0.5).documents("train"))
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 600


def test_a_parquet_file_with_one_name_for_two_columns(tmp_path: Path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = TextFiles(f"{tmp_path}/*", "text", 0.5)
    with refused("more than one column 'text': rename one"):
        list(corpus.documents("train"))
    pq.write_table(pa.table({"a.b": ["x"]}), tmp_path / "a.parquet")
    corpus = TextFiles(f"{tmp_path}/*", "a.b", 0.5)
    assert [*corpus.documents("train"), *corpus.documents("validation")] == ["x"]
