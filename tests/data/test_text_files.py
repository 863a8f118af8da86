"""The user's own files: what is read, how it is split, and every way in which files can be wrong."""

import gzip
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.refusals import refused

from default_moe.config import DataConfig
from default_moe.data import text_files
from default_moe.data.text_files import TextFiles


def documents(corpus: TextFiles) -> list[str]:
    return [*corpus.documents("train"), *corpus.documents("validation")]


def write_lines(path: Path, records: list) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_gives_its_documents(tmp_path, kind):
    wanted = [f"text {index} é世\r\n  end" for index in range(300)]
    if kind in ("txt", "md"):
        for index, text in enumerate(wanted):
            (tmp_path / f"{index}.{kind}").write_bytes(text.encode())
    elif kind == "parquet":
        pq.write_table(pa.table({"id": list(range(300)), "text": wanted}), tmp_path / "a.parquet", row_group_size=70)
    else:
        write_lines(tmp_path / f"a.{kind}", [{"id": 1, "text": text} for text in wanted])
    corpus = TextFiles(f"{tmp_path}/*.{kind}", "text", 0.1)
    validation = list(corpus.documents("validation"))
    assert sorted(documents(corpus)) == sorted(wanted)
    assert 10 <= len(validation) <= 50  # 10 % of 300, give or take what a hash does
    assert validation == list(corpus.documents("validation"))


def test_globs_with_commas_folders_and_repeats(texts):
    (texts / "more").mkdir()
    (texts / "more" / "a.md").write_text("nested")
    corpus = TextFiles(f"{texts}/*.txt, {texts}/**/*.md,{texts}/00.txt", "text", 0.2)
    assert len(documents(corpus)) == 41


def test_same_files_elsewhere_are_split_in_the_same_way(texts, tmp_path):
    before = TextFiles(f"{texts}/*.txt", "text", 0.3)
    copy = shutil.copytree(texts, tmp_path / "elsewhere")
    after = TextFiles(f"{copy}/*.txt", "text", 0.3)
    assert list(before.documents("validation")) == list(after.documents("validation")) != []


def test_fingerprint_follows_files_field_and_fraction(texts):
    def key(field="text", fraction=0.3):
        return TextFiles(f"{texts}/*.txt", field, fraction).fingerprint()

    before = key()
    assert before == key() and before not in (key(fraction=0.2), key("body"))
    (texts / "00.txt").write_text("changed")
    assert key() != before


def test_large_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LARGEST_PIECE", 1000)
    monkeypatch.setattr(text_files, "FEW_FILES", 1)
    path = tmp_path / "a.txt"
    text = "".join(f"line {index} ü\n" for index in range(1000)) + "世" * 1500 + "\nend"
    path.write_text(text)
    pieces = [piece for piece, _ in text_files._read_plain(path, 1000, lambda index: True)]
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 1000
    assert pieces[0].endswith("\n")
    corpus = TextFiles(str(path), "text", 0.3)
    assert sorted(documents(corpus)) == sorted(pieces)
    assert not corpus.replaced  # no character was cut in two


def test_one_text_file_can_be_held_out_in_part(tmp_path):
    (tmp_path / "book.txt").write_text("A line of the only book.\n" * 40_000)
    corpus = TextFiles(str(tmp_path / "book.txt"), "text", 0.05)
    train, validation = (sum(map(len, corpus.documents(split))) for split in ("train", "validation"))
    assert train + validation == 1_000_000
    assert 10_000 < validation < 120_000


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    legitimate = "\ufffd".encode()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgood " + legitimate + b" \xff bad \xe4\xb8 cut")
    write_lines(tmp_path / "b.jsonl", [{"text": "surrogate \ud800!"}])
    buffers = [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    column = pa.Array.from_buffers(pa.string(), 1, buffers)  # as other writers leave it
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    corpus = TextFiles(f"{tmp_path}/*", "text", 0.5)
    assert sorted(documents(corpus)) == ["a\ufffdb", "good \ufffd \ufffd bad \ufffd cut", "surrogate \ufffd!"]
    assert {Path(name).name: n for name, n in corpus.replaced.items()} == {"a.txt": 2, "b.jsonl": 1, "c.parquet": 1}


def test_invalid_utf8_in_a_dictionary_of_parquet(tmp_path):
    buffers = [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    values = pa.Array.from_buffers(pa.string(), 1, buffers)
    for kind in (pa.string(), pa.large_string()):
        column = pa.DictionaryArray.from_arrays(pa.array([0, None, 0], pa.int32()), values.cast(kind, safe=False))
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        corpus = TextFiles(f"{tmp_path}/*", "text", 0.5)
        assert documents(corpus) == ["a\ufffdb"] * 2 and corpus.replaced.total() == 2


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_names_that_are_not_utf8(tmp_path, suffix):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    texts = {os.fsdecode(name): name.hex() for name in (b"\xff", b"\xfc", "\U0001f600".encode())}
    for name, text in texts.items():
        path = folder / f"{name}{suffix}"
        if suffix == ".parquet":
            with path.open("wb") as file:
                pq.write_table(pa.table({"text": [text]}), file)
        else:
            write_lines(path, [{"text": text}]) if "json" in suffix else path.write_text(text)
    config = DataConfig(name="text_files", files=f"{folder}/*{suffix}", validation_fraction=1e-9)
    assert config.files
    corpus = TextFiles(config.files, "text", config.validation_fraction)
    assert list(corpus.documents("train")) == ["f09f9880", "fc", "ff"]  # in the order of their names' bytes
    assert json.loads(json.dumps(corpus.sources()))["files"].keys() == {f"{name}{suffix}" for name in texts}
    assert len(corpus.fingerprint()) == 64
    (folder / f"\udcfd{suffix}").symlink_to("nowhere")
    with refused(r"caf\\udce9/\\udcfd\..* is a link to nothing") as error:
        TextFiles(config.files, "text", 0.5)
    assert str(error.value).isprintable()


def test_empty_and_null_texts_are_no_documents(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": None}, {"text": "x"}])
    pq.write_table(pa.table({"text": ["", None, "y"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("")
    assert sorted(documents(TextFiles(f"{tmp_path}/*", "text", 0.5))) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"txt": "x", "id": 1}\n', r"'text', but .*a\.jsonl:1 are 'txt', 'id'; did you.*'txt'"),
        ("a.jsonl", b'{"text": 5}\n', r"'text', but at .*a\.jsonl:1 it holds int, not text"),
        ("a.jsonl.gz", b'{"text": "x"}\n', r"a\.jsonl\.gz is not a gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz is cut short"),
        ("a.parquet", b"not parquet at all", r"a\.parquet is not a parquet file"),
        ("a.parquet", {"txt": ["x"], "number": [1]}, r"are 'txt', 'number'; did you mean 'txt'"),
        ("a.parquet", {"text": [1]}, r"'text', but in .*a\.parquet it holds int64"),
        ("a.csv", b"a,b", r"a\.csv is no \.txt, \.md, \.jsonl, \.jsonl\.gz, \.parquet file"),
    ],
)
def test_wrong_file(tmp_path, name, content, message):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with refused(message):
        documents(TextFiles(f"{tmp_path}/*", "text", 0.5))


def test_parquet_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{index} " * 50 for index in range(5000)]}), path)
    data = bytearray(path.read_bytes())
    data[100:5000] = bytes(4900)
    path.write_bytes(data)
    with refused(r"a\.parquet is damaged"):
        documents(TextFiles(str(path), "text", 0.5))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/no-such*", r"no-such\*' names no file \(looked from"),
        ("{}", r"names no file \(it is a folder; try '.*/\*\*/\*\.txt'\)"),
        (" , ", r"data\.files is empty"),
    ],
)
def test_missing_files(tmp_path, pattern, message):
    with refused(message):
        TextFiles(pattern.format(tmp_path), "text", 0.5)


def test_file_that_vanishes(texts):
    corpus = TextFiles(f"{texts}/*.txt", "text", 0.5)
    (texts / "00.txt").unlink()
    with refused(r"00\.txt cannot be read: No such file"):
        documents(corpus)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, kind):
    path, text, count = tmp_path / f"a.{kind}", "sixteen letters\n" * 64, 70_000  # 72 MB
    if kind == "parquet":
        with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
            for _ in range(0, count, 1000):
                writer.write_table(pa.table({"text": [text] * 1000}))
    else:
        line = json.dumps({"text": text}) + "\n" if kind == "jsonl" else text
        with path.open("w") as file:
            for _ in range(count):
                file.write(line)
    corpus = TextFiles(str(path), "text", 0.05)
    tracemalloc.start()
    size = sum(len(text) for text in corpus.documents("train"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 60e6
    assert peak < 16e6
    assert pa.default_memory_pool().max_memory() < 64e6  # which tracemalloc does not see


def test_a_file_is_read_once_however_it_is_reached(texts):
    expected = sorted(documents(TextFiles(f"{texts}/*.txt", "text", 0.2)))
    (texts / "loop").symlink_to(texts)
    (texts / "hard.txt").hardlink_to(texts / "00.txt")
    (texts / "soft.txt").symlink_to(texts / "01.txt")
    corpus = TextFiles(f"{texts}/**/*.txt,{texts}/loop/*.txt", "text", 0.2)
    assert sorted(documents(corpus)) == expected
    held_out = set(corpus.documents("validation"))
    assert held_out and not held_out & set(corpus.documents("train"))


def test_a_link_to_nothing_is_named(texts):
    (texts / "gone.txt").symlink_to(texts / "nowhere.txt")
    with refused(r"gone\.txt is a link to nothing"):
        TextFiles(f"{texts}/*.txt", "text", 0.2)


def test_a_folder_that_may_not_be_read_is_named(texts, monkeypatch):
    (texts / "secret" / "below").mkdir(parents=True)
    (texts / ".hidden").mkdir()
    scan = os.scandir

    def scandir(path="."):
        if str(path).endswith(("below", ".hidden")):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert documents(TextFiles(f"{texts}/*.txt", "text", 0.2))  # which does not reach it
    with refused(r"secret/below cannot be read: Permission denied"):
        TextFiles(f"{texts}/**/*.txt", "text", 0.2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_says_how_a_text_is_encoded(tmp_path, encoding):
    lines = "".join(f"line {index} é世\U0001f600\n" for index in range(20_000))
    (tmp_path / "a.txt").write_bytes(lines.encode("utf-8"))
    expected = documents(TextFiles(f"{tmp_path}/a.txt", "text", 0.2))
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""  # the others write one
    (tmp_path / "b.txt").write_bytes((mark + lines).encode(encoding))
    found = documents(TextFiles(f"{tmp_path}/b.txt", "text", 0.2))
    assert "".join(sorted("".join(found).splitlines())) == "".join(sorted("".join(expected).splitlines()))
    assert len(found) > 10


@pytest.mark.parametrize(("data", "words"), [("plain text\n" * 50, "UTF-16 without"), (None, "may be no text")])
def test_what_is_full_of_nul_is_refused(tmp_path, data, words):
    path = tmp_path / "a.txt"
    path.write_bytes(data.encode("utf-16-le") if data else b"\0abcd" * 400)
    with refused(f"a.txt is full of NUL, so it .*{words.removeprefix('may be ')}"):
        documents(TextFiles(str(path), "text", 0.2))
