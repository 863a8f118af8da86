"""Tokenizers: text comes back, bytes are counted, special tokens stay out of documents, wrong files are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.refusals import refused
from tokenizers import decoders, models, normalizers, processors

from default_moe.data.json_tokenizer import JsonTokenizer, train_byte_level_bpe
from default_moe.data.tokenizer import (
    ByteTokenizer,
    open_tokenizer_file,
    tokenizer_fingerprint,
    tokenizer_from_dict,
    train_bpe,
)

TEXT = "Grüße, 世界!  Two  spaces,\ttabs\r\nand lines\n\n</s> <|endoftext|> <|end_of_text|> \U0001f600 <0x41> ▁ ##ing\n"


def bpe_like_llama3() -> dict:
    """A byte-level BPE with Llama-3's special tokens, which adds <|begin_of_text|> of itself."""
    values = train_byte_level_bpe([TEXT] * 3, 300)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", None, [("<|begin_of_text|>", begin)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    return json.loads(tokenizer.to_str())


def like_sentencepiece(prefix_space: bool = False) -> dict:
    """A BPE with "▁" for spaces and bytes for unknown characters, as Llama-2's."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzT.,"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "an", "and", "▁T"]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[("a", "n"), ("an", "d"), ("▁", "T")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    parts = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(tokenizer.to_str())


def json_tokenizer(values: dict) -> JsonTokenizer:
    return JsonTokenizer(values, "test", "test")


KINDS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe([TEXT] * 3, 300),
    "llama3": lambda: json_tokenizer(bpe_like_llama3()),
    "sentencepiece": lambda: json_tokenizer(like_sentencepiece()),
}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def test_text_comes_back_and_its_bytes_are_counted(tokenizer):
    text = TEXT.replace("▁", "")  # which SentencePiece cannot tell from a space
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.separator] == 0


def test_special_tokens_spelt_out_are_text(tokenizer):
    assert tokenizer.separator not in tokenizer.encode(TEXT)
    assert (tokenizer.token_bytes[tokenizer.encode("a</s>")] > 0).all()


def test_batches_equal_single_texts(tokenizer):
    texts = [TEXT, "", "and", TEXT * 3]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert len(tokenizer.encode("")) == 0


def test_decode_of_separators_and_what_is_not_a_token(tokenizer):
    ids = [*tokenizer.encode("and"), tokenizer.separator, *tokenizer.encode("an"), tokenizer.vocab_size + 5, -1]
    assert tokenizer.decode(ids) == "and\nan"
    assert tokenizer.decode([]) == ""


def test_decode_replaces_invalid_bytes():
    for tokenizer in (ByteTokenizer(), train_bpe(["abc"], 257)):
        assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_dict_is_json_and_gives_the_same_tokenizer(tokenizer):
    stored = json.dumps(tokenizer.to_dict())
    again = tokenizer_from_dict(json.loads(stored))
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)
    for name in ("vocab_size", "separator", "name"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_sentencepiece_prefix_space_counts_one_byte_a_document():
    tokenizer = json_tokenizer(like_sentencepiece(prefix_space=True))
    assert tokenizer.token_bytes[tokenizer.encode("and an")].sum() == len("and an") + 1


def test_known_byte_counts():
    tokenizer = json_tokenizer(like_sentencepiece())
    vocabulary = like_sentencepiece()["model"]["vocab"]
    counts = {"<unk>": 0, "</s>": 0, "<0x41>": 1, "▁": 1, "▁T": 2, "and": 3}
    assert {token: tokenizer.token_bytes[vocabulary[token]] for token in counts} == counts


def test_trained_bpe_is_deterministic_and_has_the_size_asked_for(stdlib_text):
    documents = stdlib_text[:300_000].split("\n\n")
    first, second = train_bpe(documents, 600), train_bpe(documents, 600)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    assert first.vocab_size == 600
    ids = first.encode(stdlib_text)
    assert first.token_bytes[ids].sum() == len(stdlib_text.encode())
    assert first.decode(ids) == stdlib_text


def test_bpe_learns_from_a_bounded_sample():
    assert train_bpe(["ab" * 10, "cd" * 1000], 300, 20).encode("cd").size == 2
    assert train_bpe(["ab" * 10, "cd" * 1000], 300, 2000).encode("cd").size == 1


def test_dropout_and_limits_of_the_file_are_not_used():
    values = bpe_like_llama3()
    values["model"]["dropout"] = 0.9
    tokenizer = json_tokenizer(values)
    assert len(tokenizer.encode(TEXT)) > 5
    np.testing.assert_array_equal(tokenizer.encode(TEXT), tokenizer.encode(TEXT))
    assert values["model"]["dropout"] == 0.9


def test_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(bpe_like_llama3()))
    tokenizer = open_tokenizer_file(path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.separator == bpe_like_llama3()["added_tokens"][-1]["id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "it is not JSON"),
        (b"\x80\x04K\x01.", "it is not JSON"),
        (b"[1, 2]", "it is not a JSON object"),
        (b'{"vocab": 3}', "it has no 'model'"),
        (b'{"model": {"type": "nonsense"}}', "is not a tokenizer.json: "),
    ],
)
def test_file_that_is_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with refused(message) as error:
        open_tokenizer_file(path)
    assert str(path) in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with refused(r"'byts', but there is no such file.*did you mean 'bytes'"):
        open_tokenizer_file(Path("byts"))
    with refused("cannot be read: Is a directory"):
        open_tokenizer_file(tmp_path)


def test_no_separator():
    values = train_byte_level_bpe(["abc"], 257)
    values["added_tokens"] = []
    values["model"]["vocab"] = {token: i for token, i in values["model"]["vocab"].items() if token != "<|endoftext|>"}
    with refused(r"no token that can separate documents; it needs one of <\|end_of_text\|>"):
        JsonTokenizer(values, "tokenizer.json", "test")


@pytest.mark.parametrize("values", [{}, {"kind": "pickle"}, {"kind": "tokenizer_json", "json": "x"}])
def test_stored_values_that_are_no_tokenizer(values):
    with refused("stored tokenizer"):
        tokenizer_from_dict(values)
