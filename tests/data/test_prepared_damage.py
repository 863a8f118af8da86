"""Prepared data that was altered, left half made or made by others: what is opened is as it was written, or made again.

The files of a store are small here, so that every one of their bytes can be altered.
"""

import contextlib
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers.refusals import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from default_moe.config import DataConfig
from default_moe.data import Data, open_data, packing, token_store
from default_moe.data.sealed import Damaged, read_sealed, write_sealed
from default_moe.data.token_store import StoreInfo, _open_whole, open_store
from default_moe.data.tokenizer import ByteTokenizer

INFO = StoreInfo(12, 3, 9, "0" * 64, 0, "uint16", "a" * 64)
FILES = ("bpe-270.json", "train.json", "train.tokens", "validation.json", "validation.tokens")


@pytest.fixture
def prepared(texts: Path) -> tuple[DataConfig, list]:
    """The data's settings, and what was prepared."""
    for path in sorted(texts.iterdir())[12:]:
        path.unlink()
    config = DataConfig(
        name="text_files", files=f"{texts}/*", dir=f"{texts.parent}/data", tokenizer="bpe:270", validation_fraction=0.3
    )
    return config, values(open_data(config, log=lambda line: None))


def find(config: DataConfig, name: str) -> Path:
    (path,) = Path(str(config.dir)).rglob(name)
    return path


def values(data: Data) -> list:
    stores = [(store.info, store.tokens.tolist()) for store in (data.train, data.validation)]
    return [data.corpus_hash, data.tokenizer.to_dict(), *stores]


@pytest.mark.parametrize("name", FILES)
def test_every_altered_byte_is_found_or_harmless(prepared, name: str):
    path = find(prepared[0], name)

    def opened() -> object:
        if name.startswith("bpe"):
            return read_sealed(path)
        store = _open_whole(path.with_suffix(""))
        return store and (store.info, store.tokens.tolist())

    whole, before, masks, harmless = path.read_bytes(), opened(), random.Random(0), 0
    for place in range(len(whole)):
        mask = masks.choice([1 << masks.randrange(8), masks.randrange(1, 256)])
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        with contextlib.suppress(Damaged):
            assert opened() == before
            harmless += 1
    assert harmless <= len(whole) / 50  # other ways to write the same JSON


@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_is_made_again_with_one_line(prepared, name: str):
    config, before = prepared
    whole = find(config, name).read_bytes()
    for place in (len(whole) // 3, len(whole) // 2):
        find(config, name).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        lines: list[str] = []
        assert values(open_data(config, lines.append)) == before
        assert name in lines[0] and " again" in lines[0] and sum(" again" in line for line in lines) == 1


def test_what_an_earlier_version_prepared_is_made_again(prepared):
    config, before = prepared
    for name in ("bpe-270.json", "train.json", "validation.json"):
        path = find(config, name)
        path.write_text(json.dumps(json.loads(path.read_text())["values"]))
    lines: list[str] = []
    assert values(open_data(config, lines.append)) == before
    assert sum("it has no digest, as in earlier versions" in line for line in lines) == 3


def test_the_files_of_one_split_do_not_stand_for_the_other(prepared):
    config, before = prepared
    for kind in ("json", "tokens"):
        train, validation = (find(config, f"{split}.{kind}") for split in ("train", "validation"))
        validation.write_bytes(train.read_bytes())
    assert values(open_data(config, log=lambda line: None)) == before


def test_of_a_large_store_the_description_is_checked_and_each_id_when_it_is_read(prepared, monkeypatch):
    config, before = prepared
    monkeypatch.setattr(token_store, "CHECKED_BYTES", 10)
    path = find(config, "train.tokens")
    path.write_bytes(b"\xff" * len(path.read_bytes()))
    data = open_data(config, log=lambda line: None)
    assert data.train.info == before[2][0]
    with refused("prepared data holds the id 65535, but the tokenizer has 2.. tokens: the data is damaged"):
        data.train_rows(8, 0).batch(0, 1)
    with refused("prepared data holds the id"):
        packing.pack([np.array([1 << 31], np.uint32)], 1, 8, 0, np.zeros(8, np.int32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "object"},
        {"dtype": "float16"},
        {"dtype": ["uint16"]},
        {"tokens": 12.0},
        {"tokens": True},
        {"documents": -1},
        {"bytes": 1 << 64},
        {"lost": -1},
        {"content_hash": "x"},
        {"tokens_hash": int("1" * 64)},
        {"another": 1},
    ],
)
def test_a_description_of_tokens_that_is_none(tmp_path: Path, list_corpus, wrong: dict):
    assert StoreInfo.from_json(asdict(INFO) | wrong) is None
    before = open_store(tmp_path / "train", list_corpus(["text"]), "train", ByteTokenizer(), print)
    write_sealed(tmp_path / "train.json", asdict(before.info) | wrong)
    lines: list[str] = []
    after = open_store(tmp_path / "train", list_corpus(["text"]), "train", ByteTokenizer(), lines.append)
    assert after.info == before.info and lines[0].endswith("does not say what is known of its tokens; it is made again")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["uint16", "object", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*asdict(INFO), "x"]), JSON), st.booleans())
def test_any_json_describes_tokens_or_nothing(changes: dict, from_whole: bool):
    values = asdict(INFO) | changes if from_whole else changes
    info = StoreInfo.from_json(values)
    assert info is None or asdict(info) == values


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON)
def test_any_json_is_a_sealed_file_or_damage(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "sealed.json"
    for content in (value, {"values": value}, {"values": {}, "sha256": value}):
        path.write_text(json.dumps(content))
        with pytest.raises(Damaged):
            read_sealed(path)


PREPARE = """
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from default_moe.data import token_store
from default_moe.data.tokenizer import ByteTokenizer

documents = [f"document {number} " * 50 for number in range(500)]
corpus = SimpleNamespace(name="list", replaced=Counter(), documents=lambda split: iter(documents))
print("ready", flush=True)
sys.stdin.readline()
while True:
    token_store._write(Path(sys.argv[1]), corpus, "train", ByteTokenizer(), print)
"""


def test_processes_that_prepare_at_once_and_are_killed_leave_a_whole_store(tmp_path: Path, list_corpus):
    path, processes, stores = tmp_path / "train", [], []
    try:
        for _ in range(3):
            command = [sys.executable, "-c", PREPARE, str(path)]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in processes:
            end = time.monotonic() + 0.7
            while time.monotonic() < end:
                stores.append(_open_whole(path))  # whole or not there, never damaged
                time.sleep(0.01)
            process.kill()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    corpus = list_corpus([f"document {number} " * 50 for number in range(500)])
    last = open_store(path, corpus, "train", ByteTokenizer(), print)
    assert corpus.reads == 0
    found = [store for store in stores if store]
    assert len(found) > 10
    assert all(store.info == last.info and np.array_equal(store.tokens, last.tokens) for store in found)
