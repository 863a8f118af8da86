"""Models of transformers here, and ours there: the same logits and the same tokens. Needs tests/requirements_hf.txt."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.hf_models import DENSE, FAMILIES, hf_model, our_logits, our_variables, save_random, write_tokenizer

from default_moe.config import Config, MeshConfig
from default_moe.convert.exporting import export_model
from default_moe.convert.families import DEFAULT_MOE
from default_moe.convert.importing import import_model, read_model
from default_moe.convert.upcycling import Upcycling, upcycle
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
    added, _ = generate(program, our_variables(tmp_path / "run")[1]["params"], {}, starts, Sampling(6))
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


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_model_of_theirs_is_upcycled_to_one_that_computes_the_same(tmp_path, family):
    model = hf_model(family)
    model.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    config = upcycle(read_model(tmp_path / "theirs"), tmp_path / "run", Upcycling(4, 3))
    assert (config.model.num_moe_layers, config.moe.num_experts, config.moe.expert_dim) == (3, 4, 40)
    tokens = np.random.default_rng(0).integers(0, 257, (3, 17))
    expected = their_logits(model, tokens)
    assert np.abs(our_logits(tmp_path / "run", tokens) - expected).max() < 1e-4 * max(np.abs(expected).max(), 1)
    assert expected.std() > 0.1


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


def default(**settings):
    return {"router": "default", "default": settings}


# Settings of `model` and of `moe`, and what is expected of the share of default vectors in the output.
OURS = {
    "default vectors, shared experts, and a dense layer": (
        {"num_dense_layers": 1, "dense_dim": 20},
        {**default(), "num_shared_experts": 2},
        1.0,
    ),
    "a ramp on its way, and grouped heads, each normed, that see a window": (
        {"norm": "rms", "num_kv_heads": 2, "attention_window": 5, "qk_norm": "head", "head_dim": 6},
        default(substitute_ramp_steps=8),
        0.375,
    ),
    "a ramp that has ended, and grouped heads, normed together": (
        {"norm": "rms", "num_kv_heads": 2, "qk_norm": "full"},
        default(substitute_ramp_steps=2),
        1.0,
    ),
    "default vectors in training only": ({"tie_embeddings": True}, default(substitute_at_eval=False), None),
    "default vectors for the router only": (
        {},
        {**default(substitute="backward"), "score_function": "sigmoid", "normalize_weights": True},
        None,
    ),
    "top-k": ({"norm_epsilon": 0.1, "rope_theta": 100.0}, {"router": "topk"}, None),
    "a bias": ({}, {"router": "loss_free", "normalize_weights": True}, None),
    "a bias, groups and a scale": (
        {},
        {
            "router": "topk",
            "balancer": "bias",
            "score_function": "sqrt_softplus",
            "num_groups": 4,
            "groups_per_token": 2,
            "weight_scale": 2.5,
        },
        None,
    ),
    "groups": ({}, {"router": "topk", "num_groups": 2, "groups_per_token": 1}, None),
    "every expert": ({}, {"router": "dense", "score_function": "sigmoid"}, None),
    "gates that are ReLUs": ({"norm": "rms"}, {"router": "remoe"}, None),
    "no experts": ({"num_dense_layers": 3}, default(substitute_ramp_steps=8), None),
}


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_gives_the_same_logits_and_tokens_there(tmp_path, monkeypatch, name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, moe, share = OURS[name]
    config = Config.from_mapping(
        {
            "model": {"d_model": 32, "num_layers": 3, "num_heads": 4, "num_dense_layers": 0, **model},
            "moe": {"num_experts": 8, "top_k": 2, "expert_dim": 12, **moe},
            "train": {"batch_size": 1},
            "mesh": {"data": 1},
        }
    )
    save_random(config, tmp_path / "run")
    family, why = export_model(tmp_path / "run", tmp_path / "out", None, "float32")
    assert family is DEFAULT_MOE and why
    theirs, loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loaded.values()), loaded
    assert theirs.config.default_vector_share == share
    # Prompts of 5, 7 and 9 tokens at once, filled up at their beginnings, and 8 tokens that it adds to each.
    lengths, added = [5, 7, 9], 8
    prompts = np.random.default_rng(0).integers(0, 257, (3, 9))
    there = theirs.generate(
        torch.tensor(prompts),
        attention_mask=torch.tensor([[0] * (9 - length) + [1] * length for length in lengths]),
        max_new_tokens=added,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    tokens = np.stack([np.roll(row, length - 9) for row, length in zip(there, lengths, strict=True)])
    expected = our_logits(tmp_path / "run", tokens)
    assert np.abs(their_logits(theirs, tokens) - expected).max() < 1e-4 * max(np.abs(expected).max(), 1)
    assert expected.std() > 0.1
    for row, length, logits in zip(tokens, lengths, expected, strict=True):
        assert row[length : length + added].tolist() == logits[length - 1 : length + added - 1].argmax(-1).tolist()
    assert len(np.unique(there[:, 9:])) > 4
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).bos_token_id == 256
