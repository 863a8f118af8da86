"""The files of token ids: complete or absent, and made once."""

import json
from pathlib import Path

import numpy as np
import pytest

from default_moe.data import token_store
from default_moe.data.token_store import open_store
from default_moe.data.tokenizer import ByteTokenizer, train_bpe

DOCUMENTS = ["one é", "two", "three" * 100]


class WideTokenizer(ByteTokenizer):
    vocab_size = 100_000
    separator = 99_999


def open_list(path: Path, corpus, tokenizer=None):
    return open_store(path, corpus, "train", tokenizer or ByteTokenizer(), lambda line: None)


def test_tokens_and_what_is_known_about_them(tmp_path: Path, list_corpus) -> None:
    store = open_list(tmp_path / "a" / "train", list_corpus(DOCUMENTS, []))
    expected = [id for text in DOCUMENTS for id in (*text.encode(), 256)]
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == np.uint16
    assert store.tokens.tolist() == expected
    assert (store.info.tokens, store.info.documents, store.info.bytes) == (6 + 3 + 500 + 3, 3, 6 + 3 + 500)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train.json", "train.tokens"]


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, list_corpus) -> None:
    store = open_list(tmp_path / "train", list_corpus(DOCUMENTS, []), WideTokenizer())
    assert store.tokens.dtype == np.uint32
    assert store.tokens[-1] == 99_999


def test_batches_do_not_matter(tmp_path: Path, list_corpus, stdlib_text: str, monkeypatch) -> None:
    documents = stdlib_text[:200_000].split("\n\n")
    tokenizer = train_bpe(documents, 400)
    whole = open_list(tmp_path / "whole", list_corpus(documents, []), tokenizer)
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 3)
    batched = open_list(tmp_path / "batched", list_corpus(documents, []), tokenizer)
    assert whole.info == batched.info
    np.testing.assert_array_equal(whole.tokens, batched.tokens)


def test_content_hash_is_the_texts_own(tmp_path: Path, list_corpus) -> None:
    def content_hash(name: str, documents: list[str], tokenizer=None) -> str:
        return open_list(tmp_path / name, list_corpus(documents, []), tokenizer).info.content_hash

    assert content_hash("a", DOCUMENTS) == content_hash("b", DOCUMENTS, WideTokenizer())
    assert content_hash("a", DOCUMENTS) != content_hash("c", DOCUMENTS[::-1])
    assert content_hash("d", ["ab", "c"]) != content_hash("e", ["a", "bc"])


def test_tokenized_once(tmp_path: Path, list_corpus) -> None:
    corpus = list_corpus(DOCUMENTS, [])
    for _ in range(3):
        open_list(tmp_path / "train", corpus)
    assert corpus.reads == 1


def test_empty_split(tmp_path: Path, list_corpus) -> None:
    corpus = list_corpus([], [])
    for _ in range(2):
        store = open_list(tmp_path / "train", corpus)
        assert len(store.tokens) == store.info.documents == 0
    assert corpus.reads == 1


def truncate(folder: Path) -> None:
    path = folder / "train.tokens"
    path.write_bytes(path.read_bytes()[:-2])


def alter(folder: Path) -> None:
    path = folder / "train.tokens"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        alter,
        lambda folder: (folder / "train.tokens").unlink(),
        lambda folder: (folder / "train.json").unlink(),
        lambda folder: (folder / "train.json").write_text("{"),
        lambda folder: (folder / "train.json").write_text("[]"),
        lambda folder: (folder / "train.json").write_text(json.dumps({"tokens": 1})),
    ],
)
def test_damage_is_noticed_and_mended(tmp_path: Path, list_corpus, damage) -> None:
    corpus = list_corpus(DOCUMENTS, [])
    before = open_list(tmp_path / "train", corpus)
    expected = before.tokens.tolist()
    damage(tmp_path)
    after = open_list(tmp_path / "train", corpus)
    assert corpus.reads == 2
    assert after.tokens.tolist() == expected
    assert after.info == before.info


def test_interrupted_tokenization_leaves_nothing(tmp_path: Path, list_corpus) -> None:
    class Interrupted(list_corpus):
        def documents(self, split):
            yield DOCUMENTS[0] * 10
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_list(tmp_path / "train", Interrupted(DOCUMENTS, []))
    assert list(tmp_path.iterdir()) == []
    assert open_list(tmp_path / "train", list_corpus(DOCUMENTS, [])).info.documents == 3


def test_killed_tokenization_is_not_used_and_its_remains_go(tmp_path: Path, list_corpus) -> None:
    import os

    remains = tmp_path / "train.tokens.99999.tmp"
    remains.write_bytes(b"half")
    open_list(tmp_path / "train", list_corpus(DOCUMENTS, []))
    assert remains.exists()  # perhaps another process is writing it
    os.utime(remains, (0, 0))
    open_list(tmp_path / "other", list_corpus(DOCUMENTS, []))
    assert not remains.exists()
