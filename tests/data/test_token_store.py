"""The files of token ids: complete or absent, and made once."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from default_moe.data import token_store
from default_moe.data.sealed import read_sealed, write_sealed
from default_moe.data.token_store import open_store
from default_moe.data.tokenizer import ByteTokenizer, train_bpe

DOCUMENTS = ["one é", "two", "three" * 100]


class WideTokenizer(ByteTokenizer):
    vocab_size = 100_000
    separator = 99_999


def open_list(path, corpus, tokenizer=None):
    return open_store(path, corpus, "train", tokenizer or ByteTokenizer(), lambda line: None)


def test_tokens_and_what_is_known_about_them(tmp_path, list_corpus):
    store = open_list(tmp_path / "a" / "train", list_corpus(DOCUMENTS))
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16
    assert store.tokens.tolist() == [id for text in DOCUMENTS for id in (*text.encode(), 256)]
    assert (store.info.tokens, store.info.documents, store.info.bytes) == (6 + 3 + 500 + 3, 3, 6 + 3 + 500)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train.json", "train.tokens"]


def test_large_vocabulary_takes_four_bytes(tmp_path, list_corpus):
    store = open_list(tmp_path / "train", list_corpus(DOCUMENTS), WideTokenizer())
    assert store.tokens.dtype == np.uint32 and store.tokens[-1] == 99_999


def test_batches_do_not_matter(tmp_path, list_corpus, stdlib_text, monkeypatch):
    documents = stdlib_text[:200_000].split("\n\n")
    tokenizer = train_bpe(documents, 400)
    whole = open_list(tmp_path / "whole", list_corpus(documents), tokenizer)
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(token_store, "BATCH_DOCUMENTS", 3)
    batched = open_list(tmp_path / "batched", list_corpus(documents), tokenizer)
    assert whole.info == batched.info
    np.testing.assert_array_equal(whole.tokens, batched.tokens)


def test_content_hash_is_the_texts_own(tmp_path, list_corpus):
    def content_hash(name, documents, tokenizer=None):
        return open_list(tmp_path / name, list_corpus(documents), tokenizer).info.content_hash

    assert content_hash("a", DOCUMENTS) == content_hash("b", DOCUMENTS, WideTokenizer())
    assert content_hash("a", DOCUMENTS) != content_hash("c", DOCUMENTS[::-1])
    assert content_hash("d", ["ab", "c"]) != content_hash("e", ["a", "bc"])


@pytest.mark.parametrize("documents", [DOCUMENTS, []])
def test_tokenized_once(tmp_path, list_corpus, documents):
    corpus = list_corpus(documents)
    for _ in range(3):
        store = open_list(tmp_path / "train", corpus)
    assert corpus.reads == 1
    assert store.info.documents == len(documents) and len(store.tokens) == store.info.tokens


def test_what_earlier_versions_wrote_is_read(tmp_path, list_corpus):
    corpus, path = list_corpus(DOCUMENTS), tmp_path / "train.json"
    before = open_list(tmp_path / "train", corpus)
    values = read_sealed(path)
    assert (values.pop("sampled"), values.pop("lost")) == (sum(map(len, DOCUMENTS)), 0)
    write_sealed(path, values)
    assert open_list(tmp_path / "train", corpus).info == replace(before.info, sampled=0)
    assert corpus.reads == 1


def flip_a_bit(data):
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens", lambda data: data[:-2]),
        ("tokens", flip_a_bit),
        ("tokens", None),
        ("json", None),
        ("json", lambda data: b"{"),
        ("json", lambda data: b"[]"),
        ("json", lambda data: json.dumps({"tokens": 1}).encode()),
    ],
)
def test_damage_is_noticed_and_repaired(tmp_path, list_corpus, name, damage):
    """damage: what a file then holds; None if it is gone."""
    corpus, path = list_corpus(DOCUMENTS), tmp_path / f"train.{name}"
    before = open_list(tmp_path / "train", corpus)
    tokens, data = before.tokens.tolist(), path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(data))
    after = open_list(tmp_path / "train", corpus)
    assert corpus.reads == 2
    assert after.tokens.tolist() == tokens and after.info == before.info


def test_interrupted_tokenization_leaves_nothing(tmp_path, list_corpus):
    class Interrupted(list_corpus):
        def documents(self, split):
            yield DOCUMENTS[0] * 10
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_list(tmp_path / "train", Interrupted(DOCUMENTS))
    assert list(tmp_path.iterdir()) == []
    assert open_list(tmp_path / "train", list_corpus(DOCUMENTS)).info.documents == 3


def test_killed_tokenization_is_not_used_and_its_remains_go(tmp_path, list_corpus):
    remains = tmp_path / "train.tokens.99999.tmp"
    remains.write_bytes(b"half")
    open_list(tmp_path / "train", list_corpus(DOCUMENTS))
    assert remains.exists()  # perhaps another process is writing it
    os.utime(remains, (0, 0))
    open_list(tmp_path / "other", list_corpus(DOCUMENTS))
    assert not remains.exists()
