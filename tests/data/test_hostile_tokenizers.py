"""A tokenizer.json from anyone: a working tokenizer or one line, whatever it holds and whatever it does with text."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.refusals import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from default_moe.config import DataConfig
from default_moe.data import json_tokenizer, open_data
from default_moe.data.json_tokenizer import JsonTokenizer, train_byte_level_bpe
from default_moe.data.tokenizer import open_tokenizer_file, tokenizer_from_dict, train_bpe
from default_moe.errors import ConfigError

BPE = train_byte_level_bpe(["some words"] * 3, 270)


def words(unknown: str, **ids: int) -> dict[str, Any]:
    """A tokenizer of whole words."""
    model = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, **ids}, "unk_token": unknown}
    return {**BPE, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "model": model}


def split_at(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {**BPE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BPE["pre_tokenizer"]]}}


def stored(values: Any) -> dict[str, Any]:
    return {"kind": "tokenizer_json", "name": "json", "json": values}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({**BPE, "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "Cannot parse precompiled"),
        ({**BPE, "pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({**BPE, "model": {**BPE["model"], "continuing_subword_prefix": "#" * 9}}, "is not a tokenizer.json: "),
        (split_at("(a+)+$"), "retry-limit-in-match over"),
        (split_at("(x+x+)+y"), "retry-limit-in-match over"),
        (split_at(r"(\s+)+$"), "retry-limit-in-match over"),
        (split_at("(a"), "unmatched parenthesis"),
        (words("a", a=1 << 31), "has the id 2147483648, but ids must be below 16777216"),
    ],
)
def test_what_panics_or_runs_for_ever_is_refused_in_one_line(tmp_path: Path, capfd, values: dict, reason: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    with refused(reason):
        open_tokenizer_file(path)
    with refused(reason):
        tokenizer_from_dict(stored(values))
    assert capfd.readouterr() == ("", "")  # Rust would have written of its panic here


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "short texts take it more than 0.5 seconds"),
        ("import os; os.abort()", r"it ends the process \(exit code -6\)"),
        ("print('long' * 1000)", r"^.{1,350}$"),
    ],
)
def test_a_trial_that_hangs_or_crashes(tmp_path: Path, monkeypatch, program: str, reason: str):
    (tmp_path / "probe.py").write_text(program)
    monkeypatch.setattr(json_tokenizer, "PROBE", tmp_path / "probe.py")
    monkeypatch.setattr(json_tokenizer, "PROBE_SECONDS", 0.5)
    with refused(reason):
        JsonTokenizer(BPE, "x", "x")


def test_a_trial_takes_a_process_that_starts_at_once():
    program = f"import runpy, sys; runpy.run_path({str(json_tokenizer.PROBE)!r}); print(len(sys.modules), *sys.modules)"
    names = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "jax", "default_moe"} & set(names)


def test_text_that_cannot_be_encoded_is_named():
    tokenizer = tokenizer_from_dict(stored(words("no-such", some=1, words=2)))
    assert tokenizer.encode("some words").tolist() == [1, 2]
    with refused("the stored tokenizer cannot encode a text that begins 'other': .*Missing"):
        tokenizer.encode_batch(["some", "words some", "other", "others"])
    with refused(r"cannot encode a text that begins '(other ){10}': "):
        tokenizer.encode("other " * 1000)
    with refused("cannot encode a text that begins"):
        tokenizer.encode("\ud800")
    assert tokenizer.encode_batch([]) == []


def test_training_data_that_a_tokenizer_cannot_encode(texts: Path):
    (texts.parent / "words.json").write_text(json.dumps(words("no-such", some=1)))
    config = DataConfig(name="text_files", files=f"{texts}/*", dir=f"{texts.parent}/data", tokenizer="words.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(texts.parent)
        with refused(r"data\.tokenizer: words\.json cannot encode a text that begins 'Document \d+: grüße"):
            open_data(config)
    assert not list(texts.parent.glob("data/**/*.t*"))


@pytest.mark.parametrize("how", ["dropped", "unknown"])
def test_a_tokenizer_that_loses_text(texts: Path, monkeypatch, how: str):
    config = DataConfig(name="text_files", files=f"{texts}/*", dir=f"{texts.parent}/data", tokenizer="lossy.json")
    monkeypatch.chdir(texts.parent)
    for path in texts.iterdir():
        path.write_text("abcdefghij" * 500)

    def notes(kept: str) -> list[str]:
        """What is told of a tokenizer that knows these characters."""
        values = words("?", **{"?": 1, **{character: 2 + index for index, character in enumerate(kept)}})
        values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
        values["decoder"] = {"type": "Fuse"}
        if how == "dropped":
            values["normalizer"] = {"type": "Replace", "pattern": {"Regex": f"[^{kept}]"}, "content": ""}
        Path("lossy.json").write_text(json.dumps(values))
        lines: list[str] = []
        open_data(config, lines.append)
        return [line for line in lines if line.startswith("note: ")]

    assert notes("abcdefghij") == []
    share = "note: the tokenizer loses 10 % of the characters in a sample of the text"
    assert notes("abcdefghi") == notes("abcdefghi") == [share]  # told again where nothing is prepared
    with refused(r"data\.tokenizer: 'json' loses 60 % of the characters in .*, but must keep half"):
        notes("abcd")
    assert len(list(texts.parent.glob("data/*/*/train.json"))) == 2


def test_ids_that_cannot_be_decoded():
    slow = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    tokenizer = tokenizer_from_dict(stored({**words("x", **{"a" * 40 + "!": 1}), "decoder": slow}))
    with refused("the stored tokenizer cannot decode its tokens: .*retry-limit-in-match over"):
        tokenizer.decode([1])


@pytest.mark.parametrize("name", [None, 5, "", "../x", "a/b", "x" * 41, "a\0"])
def test_a_name_that_is_no_folders(name):
    with refused("the stored tokenizer is called .*, but must be called"):
        tokenizer_from_dict({**stored(BPE), "name": name})


@pytest.mark.parametrize("size", [(1 << 24) + 1, 10**20, 10**5000], ids=["a little", "more", "digits"])
def test_a_bpe_of_too_many_tokens(size: int):
    with refused("a BPE of .* is too large, use 16777216 at most"):
        train_bpe(["text"], size)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def altered(draw: st.DrawFn, values: Any) -> Any:
    """The values with something else in one place."""
    if isinstance(values, dict | list) and values and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(values) if isinstance(values, dict) else range(len(values))))
        copy: Any = values.copy()
        copy[key] = draw(altered(values[key]))
        return copy
    kinds = st.sampled_from(["", "ByteLevel", "WordPiece", "Unigram", "Metaspace", -1, 1 << 40, {"Regex": "|"}])
    return draw(JSON | kinds)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    altered(stored(BPE))
    | altered(stored(words("<|endoftext|>", a=1)))
    | altered(stored(split_at("a|b")))
    | altered({"kind": "bytes"})
    | JSON
)
def test_any_json_is_a_tokenizer_or_refused(values: Any):
    try:
        tokenizer = tokenizer_from_dict(values)
        ids = tokenizer.encode("some words, über \0")
        assert isinstance(tokenizer.decode(ids), str)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size).all()
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.separator < tokenizer.vocab_size
