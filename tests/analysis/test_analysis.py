"""Analyses of a checkpoint: router gradients against the true dense one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.layers import moe_config, settings_of, variables_of
from helpers.reference import assert_close
from helpers.refusals import refused
from helpers.tiny_runs import REPOSITORY, environment, run_commands, tiny_config

from default_moe.analysis import gradients, gradients_report
from default_moe.analysis.gradients import Checkpoint, Fidelity, config_for, measure, similarity
from default_moe.config import Config
from default_moe.data import open_data
from default_moe.errors import TrainingFailed
from default_moe.methods import METHODS
from default_moe.moe import MoELayer
from default_moe.moe.layer import DEFAULT_VECTORS
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.training.losses import token_sums
from default_moe.training.program import Program

ANALYSIS = "default_moe/analysis/__main__.py"
SECTIONS = {
    "moe": {"num_experts": 4, "top_k": 2, "load_balance_weight": 3.0, "router_z_weight": 3.0},
    "model": {"num_layers": 3},
    "train": {"num_steps": 2, "grad_accum_steps": 1},
}


@pytest.fixture(scope="module")
def trained(folder):
    """A checkpoint after a few steps with Default MoE, and the rows of its text."""
    config = tiny_config(folder, **SECTIONS)
    rows = open_data(config.data, lambda line: None).train_rows(32, config.train.seed)
    program = Program(config, 257)
    state = program.new_state()
    for step in range(4):
        batch = program.put_batch(lambda first, count, step=step: rows.batch(8 * step + first, count), 8)
        state, _ = program.train_step(state, batch)
    with CheckpointStore(folder / "run") as store:
        meta = {"config": config.to_dict(), "tokenizer": {"kind": "bytes"}, "corpus_hash": "other"}
        store.save(4, state, meta)
    return Checkpoint(config, 257, 4, state.params, state.variables), rows


def test_similarity_by_hand():
    """(3, 4) and (4, 3): cosine 24/25, norms 5 and 5. (0, 2) and (1, 0): cosine 0, norms 2 and 1. (0, 0): none."""
    cosine, ratio = similarity(
        np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [1.0, 0.0], [1, 1]])
    )
    np.testing.assert_allclose(cosine, [0.96, 0.0, np.nan])
    np.testing.assert_allclose(ratio, [1.0, 2.0, 0.0])


def test_the_reference_is_the_slope_of_the_dense_models_loss(trained):
    """By differences of the language model's loss alone, evaluated with all experts: no balance or z-loss is in it."""
    checkpoint, rows = trained
    batch = rows.batch(8 * 4, 8)
    config = config_for(checkpoint.config, "dense", 1)
    program = Program(config, 257)
    state = gradients._state(checkpoint, program, rows)
    gradient = gradients._gradients(program, state, rows, [8 * 4])[0]  # [layers, D N]
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(gradient.shape)
    kernel = checkpoint.params["moe_layers"]["moe"]["router"]["kernel"]

    @jax.jit
    def loss(shift):
        moved = kernel + shift * direction.reshape(kernel.shape).astype(np.float32)
        layers = checkpoint.params["moe_layers"]
        params = {**checkpoint.params, "moe_layers": {**layers, "moe": {**layers["moe"], "router": {"kernel": moved}}}}
        inputs = {"positions": batch["positions"], "mask": batch["loss_mask"], "project": False}
        unembedding, _ = program.model.apply({"params": params}, batch["inputs"], train=False, **inputs)
        nll, sums = token_sums(unembedding, batch, config.train.logits_per_chunk)
        return nll / sums.tokens

    step = 2e-2
    with program.context():
        slope = (float(loss(step)) - float(loss(-step))) / (2 * step)
    expected = float((gradient * direction).sum())
    assert abs(expected) > 1e-3
    assert slope == pytest.approx(expected, rel=0.02)


def test_a_balancers_bias_chooses_for_other_methods_too(trained):
    checkpoint, rows = trained
    moe = dataclasses.replace(checkpoint.config.moe, router="topk", balancer="quantile")
    config = dataclasses.replace(checkpoint.config, moe=moe)
    bias = np.float32([[0.5, 0.25, -0.25, -0.5], [0.0, 0.5, -0.5, 0.0]])
    variables = {"router_state": {"moe_layers": {"moe": {"bias": bias}}}}
    biased = Checkpoint(config, 257, 4, checkpoint.params, variables)
    other = config_for(config, "densemixer", 1)
    state = gradients._state(biased, Program(other, 257), rows)
    np.testing.assert_array_equal(state.variables["router_state"]["moe_layers"]["moe"]["bias"], bias)
    assert config_for(config, "dense", 1).moe.load_balancer.name == "none"


def test_the_more_experts_run_the_closer_the_gradient(trained):
    """Nearly all experts give nearly the dense gradient, and Default MoE's is that of its training step."""
    checkpoint, rows = trained
    reported, omitted = [], []
    methods, tell = ["topk", "default", "sparsemixer"], (reported.append, omitted.append)
    found = measure(checkpoint, rows, methods, [1, 3], 2, "dense", *tell)
    assert reported == found
    assert len(omitted) == 1 and omitted[0].startswith("K 3  sparsemixer is left out: ")
    by = {(f.method, f.top_k): f for f in found}
    assert set(by) == {(m, k) for m in ("topk", "default") for k in (1, 3)} | {("sparsemixer", 1)}  # K = 1 or 2 only
    assert all(f.cosine.shape == f.norm_ratio.shape == (2, 2) for f in found)
    assert by["topk", 3].cosine.mean() > by["topk", 1].cosine.mean()
    assert by["topk", 3].cosine.min() > 0.8
    assert by["default", 1].cosine.mean() > by["topk", 1].cosine.mean()


@pytest.mark.parametrize("matmul", ["blocks", "ragged"])
@pytest.mark.parametrize("fields", [{}, {"expert_gradient": True}, {"router": "topk"}], ids=str)
def test_an_exact_gradient_leaves_the_forward_pass_and_all_else_as_they_are(fields, matmul):
    """The router's gradient is what loops make of <g, E_i(x)> for every expert, and nothing else differs."""
    x, params, ema, g = reference.make_inputs(3, 24, 8)
    config = moe_config(num_experts=8, top_k=2, expert_dim=10, matmul=matmul, **fields)
    exact = gradients._exact(Config(moe=config)).moe
    assert type(exact.method).name not in METHODS and exact.method.dense_gradient

    tokens = jnp.asarray(x, jnp.float32).reshape(2, 12, -1)

    def run(config):
        def loss(variables):
            y, _ = MoELayer(config).apply(variables, tokens, train=True, mutable=["default_vectors"])[0]
            return (y * g.reshape(2, 12, -1)).sum(), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(variables_of(config, params, ema))

    ((_, y), grads), ((_, exact_y), exact_grads) = run(config), run(exact)
    np.testing.assert_array_equal(exact_y, y)
    jax.tree.map(np.testing.assert_array_equal, exact_grads["params"]["experts"], grads["params"]["experts"])
    s = settings_of(config, 12)
    result = reference.forward(x, params, ema, s)
    d_kernel = np.zeros_like(params.kernel)
    for t in range(len(x)):
        d_weights = np.array([g[t] @ reference.expert(params, i, x[t]) for i in range(8)])
        d_kernel += np.outer(x[t], d_weights @ result.routes.tokens[t].weights_to_logits)
    assert_close(exact_grads["params"]["router"]["kernel"], d_kernel, "gradient of the router")
    assert np.abs(np.asarray(grads["params"]["router"]["kernel"]) - d_kernel).max() > 1e-3 * np.abs(d_kernel).max()


def test_methods_are_measured_against_their_own_exact_gradient(trained):
    checkpoint, rows = trained
    found = measure(checkpoint, rows, ["topk", "default", "densemixer"], [1], 1, "exact", print, print)
    by = {f.method: f.cosine for f in found}
    np.testing.assert_allclose(by["densemixer"], 1, rtol=1e-5)
    assert by["default"].mean() > by["topk"].mean()


def test_default_vectors_are_the_checkpoints_or_means_for_that_k(trained):
    checkpoint, rows = trained
    own = gradients._state(checkpoint, Program(config_for(checkpoint.config, "default", 2), 257), rows)
    assert own.variables[DEFAULT_VECTORS] is checkpoint.variables[DEFAULT_VECTORS]
    other = gradients._state(checkpoint, Program(config_for(checkpoint.config, "default", 3), 257), rows)
    ours, theirs = (np.asarray(s.variables[DEFAULT_VECTORS]["moe_layers"]["moe"]["ema"]) for s in (other, own))
    assert ours.shape == theirs.shape
    assert np.abs(ours).min(axis=-1).max() > 0 and not np.allclose(ours, theirs)
    assert other.params is checkpoint.params


def test_losses_and_noise_that_are_no_part_of_the_question_are_off(trained):
    config = trained[0].config
    more = {"router_noise_std": 0.5, "sequence_balance_weight": 2.0, "capacity_factor": 1.0, "simbal_weight": 1.0}
    more["coupling_weight"] = 1.0
    noisy = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **more))
    moe = config_for(noisy, "topk", 1).moe
    weights = (moe.balance_weight, moe.router_z_weight, moe.sequence_balance_weight, moe.router_noise_std)
    assert (*weights, moe.simbal_weight, moe.coupling_weight) == (0.0,) * 6 and moe.capacity_factor is None
    assert (moe.method, moe.top_k) == (METHODS["topk"](), 1)
    kept = dataclasses.replace(METHODS["default"](), substitute="backward", product_form=True)
    backward = dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=kept))
    assert config_for(backward, "default", 1).moe.method == kept
    assert not gradients._exact(backward).moe.method.product_form


def fidelity(method, top_k, cosine):
    return Fidelity(method, top_k, np.full((3, 2), cosine), np.ones((3, 2)))


def test_the_verdict_says_for_which_k_and_for_which_not():
    found = [fidelity("topk", k, c) for k, c in ((1, 0.3), (2, 0.5), (3, 0.9))]
    found += [fidelity("default", k, c) for k, c in ((1, 0.9), (2, 0.9), (3, 0.8))]
    words = "default is closer to the true gradient than topk for K = 1, 2, not for K = 3"
    assert gradients_report.verdict(found, "default", "topk") == words
    words = "default is closer to the true gradient than topk for no K, not for K = 3"
    assert gradients_report.verdict(found[2:3] + found[5:], "default", "topk") == words
    assert gradients_report.verdict(found[:3], "default", "topk") == "default and topk have no K in common"
    undefined = gradients_report.verdict([fidelity("topk", 1, np.nan), fidelity("default", 1, 0.9)], "default", "topk")
    assert undefined.endswith("for no K, a gradient is zero for K = 1")


def test_a_picture_of_many_layers_shows_six(tmp_path):
    many = [Fidelity("topk", k, np.full((2, 24), 0.5), np.ones((2, 24))) for k in (1, 2)]
    assert gradients_report.picture(many, "exact", range(1, 25)).startswith(b"\x89PNG")


def test_out_of_memory_is_one_line_wherever_it_happens(trained, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    for name in ("_gradients", "_state"):  # the second comes first
        monkeypatch.setattr(gradients, name, fail)
        with refused("out of memory while computing gradients", TrainingFailed):
            measure(*trained, ["topk"], [1], 1, "exact", print, print)


def test_the_command_from_end_to_end_and_bad_input(folder, trained):
    run = f"--workdir={folder / 'run'}"
    commands = {
        "whole": ["gradients", run, "--batches=2", "--methods=topk,default"],
        "no kind": [run],
        "an unknown kind": ["gradient", run],
        "no workdir": ["gradients"],
        "no such run": ["gradients", f"--workdir={folder / 'none'}"],
        "a K that is not sparse": ["gradients", run, "--top_k=1,4"],
        "a method without an exact gradient": ["gradients", run, "--methods=topk,sparsemixer"],
        "a method without K": ["gradients", run, "--methods=topk,remoe"],
        "an unknown method": ["gradients", run, "--methods=topk,defualt"],
        "a method twice": ["gradients", run, "--methods=topk,topk"],
        "a setting of the checkpoint": ["gradients", run, "--config.moe.top_k=1"],
    }
    ended = run_commands([[ANALYSIS, *more] for more in commands.values()], REPOSITORY, environment())
    outcomes = dict(zip(commands, ended, strict=True))
    code, output, error = outcomes["whole"]
    assert code == 0, error
    written = json.loads((folder / "run" / "analysis" / "gradients_exact.json").read_text())
    assert [(r["method"], r["top_k"]) for r in written["results"]] == [
        (m, k) for k in (1, 2, 3) for m in ("topk", "default")
    ]
    assert written["layers"] == [1, 2] and np.shape(written["results"][0]["cosine"]) == (2, 2)
    assert written["results"][1]["mean_cosine"] == pytest.approx(np.mean(written["results"][1]["cosine"]))
    assert "default is closer" in output and output.count("\nK ") == 6
    assert (folder / "run" / "analysis" / "gradients_exact.png").read_bytes().startswith(b"\x89PNG")
    errors = {
        "no kind": "which analysis is not said: python -m default_moe.analysis gradients --workdir=...",
        "an unknown kind": "there is no analysis 'gradient'",
        "no workdir": "--workdir is missing",
        "no such run": "there is no work directory",
        "a K that is not sparse": "--top_k is '1,4', but must be numbers from 1 to 3",
        "a method without an exact gradient": "no exact gradient: use --reference=dense",
        "a method without K": "'remoe', which has no number of experts",
        "an unknown method": "--methods has 'defualt', but there are",
        "a method twice": "a method is given twice",
        "a setting of the checkpoint": "moe.* is fixed by the checkpoint",
    }
    for name, words in errors.items():
        code, _, error = outcomes[name]
        assert code == 2 and words in error and error.count("\n") == 1, (name, error)
