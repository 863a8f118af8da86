"""Analyses of a checkpoint: router gradients against the true dense one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.layers import (
    batched,
    gradient_of_step,
    gradients_of,
    inputs,
    make_config,
    moe_config,
    settings_of,
    variables_of,
)
from helpers.reference import assert_close
from helpers.refusals import refused
from helpers.tiny_runs import REPOSITORY, environment, run_commands, tiny_config

from default_moe.analysis import gradients, gradients_report
from default_moe.analysis.any_k import TOP_K, for_any_k, takes_any_k
from default_moe.analysis.gradients import Checkpoint, Estimator, Fidelity, config_for, measure, similarity
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


INTERRUPTED = """
import numpy as np
from default_moe import cli
from default_moe.analysis import __main__ as analysis, gradients

def measure(checkpoints, methods, top_ks, num_batches, reference, report, omitted):
    assert len(checkpoints) == 1 and top_ks == [1, 2, 3]
    if len(methods) == 1:
        raise KeyboardInterrupt
    for top_k in top_ks:
        if top_k == 2 and num_batches == 8:
            raise KeyboardInterrupt
        of_k = [gradients.Fidelity(m, top_k, np.ones((1, 8, 2)), np.ones((1, 8, 2))) for m in methods]
        for fidelity in of_k:
            report(fidelity)
        yield of_k

gradients.measure = measure
cli.run(analysis.main)
"""


def save_run(workdir, config, state, step):
    with CheckpointStore(workdir) as store:
        meta = {"config": config.to_dict(), "tokenizer": {"kind": "bytes"}, "corpus_hash": "other"}
        store.save(step, {"params": state.params, "variables": state.variables}, meta)


@pytest.fixture(scope="module")
def runs(folder):
    """A checkpoint after a few steps with Default MoE, and one of the same settings but the seed, as it begins."""
    config = tiny_config(folder, **SECTIONS)
    data = open_data(config.data, lambda line: None)
    program = Program(config, 257)
    checkpoints = []
    for seed, steps in ((1, 4), (2, 0)):
        of_seed = program.with_seed(seed)
        rows = data.train_rows(32, seed)
        state = of_seed.new_state()
        for step in range(steps):
            batch = program.put_batch(lambda first, count, rows=rows, step=step: rows.batch(8 * step + first, count), 8)
            state, _ = program.train_step(state, batch)
        save_run(folder / f"run_{seed}", of_seed.config, state, 4)
        checkpoints.append(Checkpoint(of_seed.config, 257, 4, state.params, state.variables, rows))
    return checkpoints


@pytest.fixture(scope="module")
def trained(runs):
    return runs[0]


def test_similarity_by_hand():
    """(3, 4) and (4, 3): cosine 24/25, norms 5 and 5. (0, 2) and (1, 0): cosine 0, norms 2 and 1. (0, 0): none."""
    cosine, ratio = similarity(
        np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [1.0, 0.0], [1, 1]])
    )
    np.testing.assert_allclose(cosine, [0.96, 0.0, np.nan])
    np.testing.assert_allclose(ratio, [1.0, 2.0, 0.0])


def test_the_reference_is_the_slope_of_the_dense_models_loss(trained):
    """By differences of the language model's loss alone, evaluated with all experts: no balance or z-loss is in it."""
    checkpoint = trained
    batch = checkpoint.rows.batch(8 * 4, 8)
    config = config_for(checkpoint.config, "dense", 1)
    dense = Estimator(config, 257)
    program = dense.program
    gradient = dense.gradients(checkpoint, dense.state(checkpoint, config), 1)[0]  # [layers, D N]
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
    checkpoint = trained
    moe = dataclasses.replace(checkpoint.config.moe, router="topk", balancer="quantile")
    config = dataclasses.replace(checkpoint.config, moe=moe)
    bias = np.float32([[0.5, 0.25, -0.25, -0.5], [0.0, 0.5, -0.5, 0.0]])
    variables = {"router_state": {"moe_layers": {"moe": {"bias": bias}}}}
    biased = dataclasses.replace(checkpoint, config=config, variables=variables)
    other = config_for(config, "densemixer", 1)
    state = Estimator(other, 257).state(biased, other)
    np.testing.assert_array_equal(state.variables["router_state"]["moe_layers"]["moe"]["bias"], bias)
    assert config_for(config, "dense", 1).moe.load_balancer.name == "none"


def test_the_more_experts_run_the_closer_the_gradient(trained):
    """Nearly all experts give nearly the dense gradient, and Default MoE's is that of its training step."""
    reported, omitted = [], []
    methods, tell = ["topk", "default", "sparsemixer"], (reported.append, omitted.append)
    found = [f for of_k in measure([trained], methods, [1, 3], 2, "dense", *tell) for f in of_k]
    assert reported == found
    assert len(omitted) == 1 and omitted[0].startswith("K 3  sparsemixer is left out: ")
    by = {(f.method, f.top_k): f for f in found}
    assert set(by) == {(m, k) for m in ("topk", "default") for k in (1, 3)} | {("sparsemixer", 1)}  # K = 1 or 2 only
    assert all(f.cosine.shape == f.norm_ratio.shape == (1, 2, 2) for f in found)
    assert by["topk", 3].cosine.mean() > by["topk", 1].cosine.mean()
    assert by["topk", 3].cosine.min() > 0.8
    assert by["default", 1].cosine.mean() > by["topk", 1].cosine.mean()


def gradient_of_output(config):
    """The compiled (variables, x, g) -> (y, gradients by the variables of <g, y>) of a layer."""

    def product(variables, x, g):
        y, _ = MoELayer(config).apply(variables, x, train=True, mutable=["default_vectors", "router_state"])[0]
        return (y * g).sum(), y

    gradient = jax.value_and_grad(product, has_aux=True, allow_int=True)

    def of_arrays(variables, x, g):
        (_, y), grads = gradient(variables, x, g)
        return y, grads["params"]

    return jax.jit(of_arrays)


def exact_gradient(config, x, params, ema, g):
    """Of the router's matrix: what loops make of <g, E_i(x)> for every expert."""
    result = reference.forward(x, params, ema, settings_of(config))
    d_kernel = np.zeros_like(params.kernel)
    for t in range(len(x)):
        d_weights = np.array([g[t] @ reference.expert(params, i, x[t]) for i in range(config.num_experts)])
        d_kernel += np.outer(x[t], d_weights @ result.routes.tokens[t].weights_to_logits)
    return d_kernel


def with_k(variables, top_k):
    return {**variables, "router_state": {**variables.get("router_state", {}), TOP_K: jnp.int32(top_k)}}


@pytest.mark.parametrize("matmul", ["blocks", "ragged"])
@pytest.mark.parametrize("fields", [{}, {"expert_gradient": True}, {"router": "topk"}], ids=str)
def test_an_exact_gradient_leaves_the_forward_pass_and_all_else_as_they_are(fields, matmul):
    """The router's gradient is exact, for every K of one program, and nothing else differs."""
    x, params, ema, g = inputs(3)
    config = make_config(matmul=matmul, **fields)
    exact = gradients._exact(Config(moe=config)).moe
    assert type(exact.method).name not in METHODS and exact.method.dense_gradient
    arrays = variables_of(config, params, ema), batched(x), batched(g)
    (y, grads), (exact_y, exact_grads) = (gradient_of_output(c)(*arrays) for c in (config, exact))
    np.testing.assert_array_equal(exact_y, y)
    jax.tree.map(np.testing.assert_array_equal, exact_grads["experts"], grads["experts"])
    d_kernel = exact_gradient(config, x, params, ema, g)
    assert_close(exact_grads["router"]["kernel"], d_kernel, "gradient of the router")
    assert np.abs(np.asarray(grads["router"]["kernel"]) - d_kernel).max() > 1e-3 * np.abs(d_kernel).max()

    if matmul == "blocks":
        return
    any_k = gradient_of_output(for_any_k(dataclasses.replace(exact, top_k=5), 2))
    for top_k in (2, 4, 5):
        kernel = any_k(with_k(arrays[0], top_k), *arrays[1:])[1]["router"]["kernel"]
        d_kernel = exact_gradient(dataclasses.replace(config, top_k=top_k), x, params, ema, g)
        assert_close(kernel, d_kernel, f"gradient of the router, K = {top_k}")
    assert any_k._cache_size() == 1


@pytest.mark.parametrize(
    ("top_ks", "fields"),
    [
        ((2, 5), {"router": "topk", "normalize_weights": True, "score_function": "sigmoid", "weight_scale": 2.5}),
        ((1, 3, 4), {"router": "loss_free", "num_groups": 4, "groups_per_token": 2}),
        ((1, 2, 7), {"router": "densemixer", "normalize_weights": True, "product_form": True}),
        ((1, 3, 7), {"router": "default"}),
        ((1, 6), {"router": "default", "substitute": "backward", "normalize_weights": True, "product_form": True}),
        ((1, 5), {"router": "hash"}),
    ],
    ids=str,
)
def test_one_program_equals_the_loops_for_every_k(top_ks, fields):
    x, params, ema, g = inputs(5)
    config = make_config(top_k=max(top_ks), **fields)
    step = jax.jit(gradient_of_step(for_any_k(config, min(top_ks))))
    for top_k in top_ks:
        plain = dataclasses.replace(config, top_k=top_k)
        variables = with_k(variables_of(plain, params, ema), top_k)
        (d_variables, d_x), (y, aux, state) = step(variables, batched(x), batched(g), None)
        s = settings_of(plain)
        expected = reference.forward(x, params, ema, s)
        grads = gradients_of(plain, x, params, expected, s, g)
        assert_close(y, expected.y.reshape(y.shape), "y")
        assert_close(d_x, grads.x.reshape(d_x.shape), "gradient of x")
        assert_close(d_variables["params"]["router"]["kernel"], grads.kernel, "gradient of the router")
        assert_close(d_variables["params"]["experts"]["down"], grads.down, "gradient of down")
        np.testing.assert_array_equal(aux["tokens_per_expert"], expected.counts)
        if config.default_vectors:
            assert_close(state["default_vectors"]["ema"], expected.ema, "ema")
    assert step._cache_size() == 1


def test_methods_that_need_a_plain_k_have_a_program_for_each():
    names = [name for name in METHODS if moe_config(router=name, top_k=2).most_experts_per_token == 2]
    taken = {name: takes_any_k(moe_config(router=name, top_k=2), 16) for name in names}
    assert {name for name, it_does in taken.items() if not it_does} == {"sparsemixer", "probmoe"}
    assert {"topk", "default", "densemixer", "loss_free", "frozen", "hash"} <= set(taken)


def test_methods_are_measured_against_their_own_exact_gradient(runs, monkeypatch):
    """Two programs of a method serve every K and run."""
    made, init = [], Estimator.__init__
    monkeypatch.setattr(Estimator, "__init__", lambda *args: made.append(args) or init(*args))
    methods = ["topk", "default", "densemixer"]
    found = {(f.method, f.top_k): f for of_k in measure(runs, methods, [1, 3], 1, "exact", print, print) for f in of_k}
    assert len(made) == 6 and len(found) == 6
    np.testing.assert_allclose(found["densemixer", 1].cosine, 1, rtol=1e-5)
    default = found["default", 1]
    assert default.cosine.shape == (2, 1, 2)
    assert default.cosine[0].mean() > found["topk", 1].cosine[0].mean()
    assert np.abs(default.norm_ratio[0] - default.norm_ratio[1]).max() > 1e-2


def test_default_vectors_are_the_checkpoints_or_means_for_that_k(trained):
    """Of a program for every K they, and the gradient, are those of a program for that K alone."""
    configs = [config_for(trained.config, "default", k) for k in (2, 3)]
    any_k = dataclasses.replace(configs[1], moe=for_any_k(configs[1].moe, 1))
    estimator, alone = Estimator(any_k, 257), Estimator(configs[1], 257)
    own, other = (estimator.state(trained, config) for config in configs)
    theirs = trained.variables[DEFAULT_VECTORS]["moe_layers"]["moe"]["ema"]
    assert own.variables[DEFAULT_VECTORS]["moe_layers"]["moe"]["ema"] is theirs
    ours = np.asarray(other.variables[DEFAULT_VECTORS]["moe_layers"]["moe"]["ema"])
    assert ours.shape == theirs.shape
    assert np.abs(ours).min(axis=-1).max() > 0 and not np.allclose(ours, theirs)
    assert other.params is trained.params
    of_k_alone = alone.state(trained, configs[1])
    assert_close(ours, of_k_alone.variables[DEFAULT_VECTORS]["moe_layers"]["moe"]["ema"], "default vectors")
    gradient = estimator.gradients(trained, other, 1)
    assert_close(gradient, alone.gradients(trained, of_k_alone, 1), "gradient of the routers")
    assert np.abs(gradient - estimator.gradients(trained, own, 1)).max() > 1e-3 * np.abs(gradient).max()
    assert [s.variables["router_state"]["moe_layers"]["moe"][TOP_K].tolist() for s in (own, other)] == [[2, 2], [3, 3]]


def test_losses_and_noise_that_are_no_part_of_the_question_are_off(trained):
    config = trained.config
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
    return Fidelity(method, top_k, np.full((1, 3, 2), cosine), np.ones((1, 3, 2)))


def test_spreads_over_batches_and_runs_by_hand():
    """Means over layers 1, 3 and 4, 8: over batches 1 and 2, mean 1.5; over runs of 2 and 6, sqrt(8)."""
    cosine = np.array([[[0.0, 2.0], [3.0, 3.0]], [[4.0, 4.0], [8.0, 8.0]]])
    found = Fidelity("topk", 2, cosine, np.ones((2, 2, 2)))
    assert gradients_report.summary(cosine.mean(axis=2)) == (4.0, 1.5, pytest.approx(8**0.5))
    assert "4.000 ± 1.500 ± 2.828   layers  3.750   4.250   norm  1.000" in gradients_report.line(found)
    assert gradients_report.summary(cosine[:1].mean(axis=2)) == (2.0, 1.0, None)


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


def test_a_picture_of_many_layers_methods_and_runs_can_be_drawn():
    many = [Fidelity(f"m{m}", k, np.full((3, 2, 24), 0.5), np.ones((3, 2, 24))) for k in (1, 2) for m in range(9)]
    assert gradients_report.picture(many, "exact", range(1, 25)).startswith(b"\x89PNG")


def test_out_of_memory_is_one_line_wherever_it_happens(trained, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    for name, method in (("make_gradient", "topk"), ("make_warm_up", "default")):  # the second comes first
        monkeypatch.setattr(gradients, name, lambda *args: fail)
        with refused("out of memory while computing gradients", TrainingFailed):
            list(measure([trained], [method], [1], 1, "exact", print, print))


def test_the_command_from_end_to_end_and_bad_input(folder, runs):
    run, other = (f"--workdir={folder / name}" for name in ("run_1", "run_2"))
    interrupted = folder / "interrupted.py"  # the command, interrupted by Ctrl-C while it measures the second K
    interrupted.write_text(INTERRUPTED)
    commands = {
        "whole": [ANALYSIS, "gradients", run, other, "--methods=topk", "--batches=1", "--top_k=1,3"],
        "measured": [str(interrupted), "gradients", run, "--batches=3", "--reference=dense"],
        "interrupted": [str(interrupted), "gradients", run, "--methods=topk,default"],
        "interrupted at once": [str(interrupted), "gradients", run, "--methods=default"],
    }
    bad = {
        "no kind": [run],
        "an unknown kind": ["gradient", run],
        "no workdir": ["gradients"],
        "no such run": ["gradients", f"--workdir={folder / 'none'}"],
        "a run of the same seed": ["gradients", run, run],
        "a run of other settings": ["gradients", run, f"--workdir={folder / 'longer'}"],
        "a run at another step": ["gradients", run, f"--workdir={folder / 'later'}"],
        "a K that is not sparse": ["gradients", run, "--top_k=1,4"],
        "a method without an exact gradient": ["gradients", run, "--methods=topk,sparsemixer"],
        "a method without K": ["gradients", run, "--methods=topk,remoe"],
        "an unknown method": ["gradients", run, "--methods=topk,defualt"],
        "a method twice": ["gradients", run, "--methods=topk,topk"],
        "a setting of the checkpoint": ["gradients", run, "--config.moe.top_k=1"],
    }
    save_run(folder / "later", runs[1].config, runs[1], 5)
    longer = dataclasses.replace(runs[1].config.train, num_steps=9)
    save_run(folder / "longer", dataclasses.replace(runs[1].config, train=longer), runs[1], 4)
    commands |= {name: [ANALYSIS, *more] for name, more in bad.items()}
    env = {**environment(), "JAX_NUM_CPU_DEVICES": "1"}
    outcomes = dict(zip(commands, run_commands(list(commands.values()), REPOSITORY, env), strict=True))
    code, output, error = outcomes["whole"]
    assert code == 0, error
    found = folder / "run_1" / "analysis"
    written = json.loads((found / "gradients_exact_seeds.json").read_text())
    assert [(r["method"], r["top_k"]) for r in written["results"]] == [("topk", 1), ("topk", 3)]
    assert written["layers"] == [1, 2] and np.shape(written["results"][0]["cosine"]) == (2, 1, 2)
    assert written["seeds"] == [1, 2] and written["results"][0]["std_of_mean_cosine_over_runs"] > 0
    assert written["results"][1]["mean_cosine"] > written["results"][0]["mean_cosine"]
    assert written["results"][1]["mean_cosine"] == pytest.approx(np.mean(written["results"][1]["cosine"]))
    assert output.count("\nK ") == 2
    assert (found / "gradients_exact_seeds.png").read_bytes().startswith(b"\x89PNG")

    code, output, error = outcomes["measured"]
    assert code == 0 and output.count("\nK ") == 6, error
    assert "default is closer to the true gradient than topk for no K, not for K = 1, 2, 3\n" in output
    written = json.loads((found / "gradients_dense.json").read_text())
    assert [(r["method"], r["top_k"]) for r in written["results"]] == [
        (m, k) for k in (1, 2, 3) for m in ("topk", "default")
    ]
    code, output, error = outcomes["interrupted"]
    assert code == 130 and output.count("\nK ") == 2, error
    files = "gradients_exact.json, gradients_exact.png"
    assert error == f"error: interrupted; written to {found}: {files}, as far as K = 1\n"
    written = json.loads((found / "gradients_exact.json").read_text())
    assert [(r["method"], r["top_k"], r["std_of_mean_cosine_over_runs"]) for r in written["results"]] == [
        (m, 1, None) for m in ("topk", "default")
    ]
    assert outcomes["interrupted at once"][0] == 130 and "written" not in outcomes["interrupted at once"][2]
    errors = {
        "no kind": "which analysis is not said: python -m default_moe.analysis KIND --workdir=..., KIND one of report,",
        "an unknown kind": "there is no analysis 'gradient'",
        "no workdir": "--workdir is missing",
        "no such run": "there is no work directory",
        "a run of the same seed": "run_1 has train.seed 1, as another run does",
        "a run of other settings": "longer differ in train.num_steps: runs may differ only in train.seed",
        "a run at another step": "later are at steps 4 and 5: give one that both have as --step",
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
