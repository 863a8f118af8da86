"""Models of transformers here, and ours there: the same logits and the same tokens. Needs tests/requirements_hf.txt."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.hf_models import FAMILIES, hf_model, our_logits, our_params, write_tokenizer

from default_moe.config import Config, MeshConfig
from default_moe.convert.exporting import export_model
from default_moe.convert.importing import import_model
from default_moe.data.tokenizer import train_bpe
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.sampling import Sampling, generate
from default_moe.training.program import Program

pytestmark = pytest.mark.hf


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_theirs_gives_the_same_logits_and_tokens_and_comes_back_as_it_was(tmp_path, family):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = hf_model(family)
    model.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    config = import_model(tmp_path / "theirs", tmp_path / "run")
    tokens = np.random.default_rng(0).integers(0, 257, (3, 17))
    expected = their_logits(model, tokens)
    ours = our_logits(tmp_path / "run", tokens)
    assert np.abs(ours - expected).max() < 1e-4 * max(np.abs(expected).max(), 1)
    assert expected.std() > 0.1

    starts = [row[: 5 + length] for length, row in enumerate(np.random.default_rng(1).integers(0, 257, (6, 12)))]
    program = Program(dataclasses.replace(config, mesh=MeshConfig(data=1)), 257, jax.devices()[:1])
    added, _ = generate(program, our_params(tmp_path / "run")[1], {}, starts, Sampling(6))
    for start, tokens_here in zip(starts, added, strict=True):
        there = model.generate(torch.tensor(start)[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert tokens_here.tolist() == there[0, len(start) :].tolist()
    assert len(set(np.concatenate(added).tolist())) > 4

    export_model(tmp_path / "run", tmp_path / "again", None, "float32")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert type(again) is type(model)
    np.testing.assert_array_equal(their_logits(again, tokens), expected)
    for key in (
        "num_experts_per_tok",
        "rms_norm_eps",
        "rope_parameters",
        "norm_topk_prob",
        "sliding_window",
        "decoder_sparse_step",
    ):
        assert getattr(again.config, key, None) == getattr(model.config, key, None), key
    assert config.moe.top_k == model.config.num_experts_per_tok

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "def f(x): # café\n\treturn '\u20ac'"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 256


def test_a_trained_tokenizer_gives_the_same_ids_there(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_bpe(["the cat sat on the mat\n\tdef café(x): return x" * 9], 300)
    config = Config.from_mapping(
        {
            "model": {"d_model": 16, "num_layers": 1, "num_dense_layers": 0, "norm": "rms", "qk_norm": "head"},
            "moe": {"router": "topk", "expert_dim": 8},
            "data": {"tokenizer": "bpe:300"},
        }
    )
    state = Program(config, tokenizer.vocab_size, jax.devices()[:1]).new_state()
    with CheckpointStore(tmp_path / "run") as store:
        meta = {"step": 0, "config": config.to_dict(), "tokenizer": tokenizer.to_dict()}
        store.save(0, {"params": state.params, "step": state.step}, meta)
    export_model(tmp_path / "run", tmp_path / "out", None, "float32")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the café sat: \u20ac\n\treturn <|endoftext"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(text).tolist() and theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.separator
