"""A trained model from Python: the logits, text and routing of the checkpoint, on other devices, without its text."""

import shutil

import jax
import numpy as np
import pytest
from helpers.refusals import refused
from helpers.tiny_runs import evaluated, tiny_config, trained, write_corpus

import default_moe
from default_moe.config import MeshConfig
from default_moe.errors import CheckpointError
from default_moe.moe import MoELayer

TEXT = "the cat sat on two red birds"
MODELS = {"first": {}, "alternating": {"num_layers": 4, "num_dense_layers": 0, "moe_every": 2}}


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    """A run of two steps whose text is gone, the report of its evaluation, and the numbers of its MoE layers."""
    folder = tmp_path_factory.mktemp(request.param)
    write_corpus(folder / "text")
    settings = {"train": {"num_steps": 2}, "eval": {"sample_tokens": 12, "num_batches": 1}}
    trained(tiny_config(folder, model=MODELS[request.param], **settings), folder / "run")
    report, _ = evaluated(folder / "run", 2)
    shutil.rmtree(folder / "text")
    shutil.rmtree(folder / "prepared")
    return folder / "run", report, (1, 3) if request.param == "alternating" else (1,)


def test_a_run_is_loaded_without_its_text(run):
    workdir, report, layers = run
    model = default_moe.load(workdir)
    assert model.step == 2 and model.config.moe.num_experts == 8
    temperature = model.config.eval.temperature
    assert model.generate("the ", num_tokens=12, temperature=temperature) == [report["samples"][0]["text"]]
    assert len(model.generate(["the ", "a cold "], num_tokens=4, temperature=1.0, seed=3)) == 2

    routing = model.routing(TEXT)
    tokens = routing.tokens
    assert "".join(routing.pieces[1:]) == TEXT and len(tokens) == len(TEXT) + 1
    assert routing.layers == layers
    assert routing.router_probs.shape == (len(layers), len(tokens), 8)
    np.testing.assert_allclose(routing.router_probs.sum(axis=-1), 1, atol=1e-5)
    likeliest = np.argsort(-routing.router_probs, axis=-1, kind="stable")[..., :2]
    np.testing.assert_array_equal(routing.expert_index, likeliest)
    np.testing.assert_array_equal(routing.combine_weights, routing.router_probs)

    logits = model.logits(tokens)
    assert logits.shape == (len(tokens), 257) and logits.dtype == np.float32
    np.testing.assert_allclose(model.logits([tokens, tokens])[1], logits, atol=1e-5)
    np.testing.assert_allclose(model.logits(tokens[:5]), logits[:5], atol=1e-5)  # causal
    # One after the other the layers route what the layers below have made of the text.
    output, seen = model.program.model.apply(
        {"params": model.params, **model.variables},
        tokens[None],
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, MoELayer),
        mutable=["intermediates"],
    )
    np.testing.assert_allclose(output[0][0], logits, atol=1e-5)
    if layers == (1,):
        ((_, aux),) = seen["intermediates"]["moe_layers"]["moe"]["__call__"]
        np.testing.assert_allclose(aux["router_probs"][:, 0], routing.router_probs, atol=1e-6)


def test_it_is_the_same_on_eight_devices(run):
    one, eight = (default_moe.load(run[0], 2, mesh) for mesh in (None, MeshConfig(data=2, fsdp=2, expert=2)))
    assert len(jax.tree.leaves(eight.params)[0].sharding.device_set) == 8
    tokens = one.routing(TEXT).tokens
    np.testing.assert_allclose(eight.logits(tokens), one.logits(tokens), atol=1e-5)
    for ours, theirs in zip(eight.routing(TEXT)[3:], one.routing(TEXT)[3:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_cannot_be_is_one_line(run, tmp_path):
    model = default_moe.load(run[0])
    for tokens, words in (
        ([3, 257], "tokens run from 3 to 257, but the model's are 0 to 256"),
        ([-1], "tokens run from -1 to -1"),
        ([0.5], r"tokens are float64 \[1\], but must be integers \[L\] or \[rows, L\]"),
        ([], "tokens are float64"),
    ):
        with refused(words):
            model.logits(tokens)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        default_moe.load(tmp_path)
    with pytest.raises(CheckpointError, match="step 7"):
        default_moe.load(run[0], 7)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        default_moe.laod  # noqa: B018
