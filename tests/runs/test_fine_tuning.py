"""Runs that start from the weights of another run, and default vectors averaged before they do."""

import copy
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.reference import assert_close, sigmoid
from helpers.tiny_runs import assert_same_state, content, metrics, refused_training, saved_state, tiny_settings, trained

from default_moe.config import Config
from default_moe.data import open_data
from default_moe.model.attention import Attention, Tokens
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.fine_tuning import changes_since, collections_taken_over, find_source, fine_tuned_state
from default_moe.runs.trainer import learning_rate_jump
from default_moe.runs.warm_up import warm_up
from default_moe.training.program import Program

VOCAB = 257
SETTINGS = {
    "model": {"num_dense_layers": 0},
    "train": {"num_steps": 8},
    "optim": {"peak_lr": 1e-2},
    "eval": {"num_batches": 1},
}
RAMP = {"router": "default", "default": {"substitute_ramp_steps": 4}}


def config_for(folder, moe, init_from=None, **sections):
    """SETTINGS and more, of a run that starts from `init_from`."""
    sections = {name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in {*SETTINGS, *sections}}
    settings = tiny_settings(folder, moe=moe, **sections)
    return Config.from_mapping({**settings, "init_from": init_from and str(init_from)})


def program_for(config):
    program = copy.copy(_program(dataclasses.replace(config, init_from=None, init_new=None)))
    program.config = config
    return program


@functools.cache
def _program(config):
    return Program(config, VOCAB)


@pytest.fixture(scope="module")
def rows(folder):
    return open_data(config_for(folder, {}).data, lambda line: None).train_rows(32, seed=1)


def put_batch(program, rows, index):
    size = program.config.train.batch_size
    return program.put_batch(lambda first, count: rows.batch(index * size + first, count), size)


@pytest.fixture(scope="module")
def source(folder, rows):
    """The work directory of a top-k run of 20 steps, saved at 10 and 20, and the losses of its first and last step."""
    config = config_for(folder, {"router": "topk"})
    program, losses = program_for(config), []
    # The parameters are those of any method, and this state is compiled anyhow.
    state = dataclasses.replace(program_for(config_for(folder, RAMP)).new_state(), variables={})
    meta = {"config": config.to_dict(), "tokenizer": {"kind": "bytes"}, "corpus_hash": "abc"}
    with CheckpointStore(folder / "source") as store:
        for step in range(1, 21):
            state, values = program.train_step(state, put_batch(program, rows, step))
            losses.append(float(values["loss"]))
            if step in (10, 20):
                store.save(step, state, meta)
    return folder / "source", losses[0], losses[-1]


@pytest.fixture(scope="module")
def tuned(folder, source):
    """The work directory of a run of Default MoE from there, and what it printed."""
    return folder / "tuned", trained(config_for(folder, RAMP, source[0]), folder / "tuned")


def first_state(config, rows):
    """The state that a new run of this config begins with, and the line about it."""
    nowhere = Path(config.data.dir) / "new"
    return fine_tuned_state(program_for(config), find_source(config, nowhere, pytest.fail), rows)


@pytest.fixture(scope="module")
def begun(folder, source, rows):
    """The state that `tuned` began with."""
    return first_state(config_for(folder, RAMP, source[0]), rows)[0]


def assert_as_saved(name, tree, saved):
    """Bit for bit the arrays of a checkpoint below that name."""
    leaves = jax.tree_util.tree_leaves_with_path({name: tree})
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    assert arrays.keys() == {key for key in saved if key.startswith(f"{name}.")}
    for key, array in arrays.items():
        assert array.tobytes() == saved[key].tobytes(), key


def vectors_of(state):
    return np.asarray(state.variables["default_vectors"]["moe_layers"]["moe"]["ema"])


def test_named_parameters_begin_anew(source, tuned, folder, rows):
    config = dataclasses.replace(config_for(folder, {"router": "topk"}, source[0]), init_new="router")
    state, line = first_state(config, rows)
    assert line.endswith("(router 'topk'); router: begin anew")
    ours = config_for(folder, {"router": "default"}, tuned[0])
    assert find_source(ours, folder / "new", pytest.fail).kept
    assert not find_source(dataclasses.replace(ours, init_new="router"), folder / "new", pytest.fail).kept
    new, saved = program_for(config_for(folder, {"router": "topk"})).new_state(), saved_state(source[0], 20)
    kernel = state.params["moe_layers"]["moe"].pop("router")["kernel"]
    np.testing.assert_array_equal(kernel, new.params["moe_layers"]["moe"]["router"]["kernel"])
    del saved["params.moe_layers.moe.router.kernel"]
    assert_as_saved("params", state.params, saved)


def test_a_run_goes_on_from_the_weights_of_another(source, tuned, folder, rows):
    workdir, first_loss, last_loss = source
    tuned_workdir, output = tuned
    assert (
        f"weights: from step 20 of {workdir} (router 'topk'); default vectors: averaged over 8 batches; "
        "router state: initial\n"
    ) in output
    loss = metrics(tuned_workdir)[0]["train/loss"]
    assert abs(loss - last_loss) < 0.2 and loss < first_loss - 1.5
    # Nothing is substituted in the first step of a ramp: it is the very step of the top-k model.
    config = config_for(folder, {"router": "topk"}, workdir)
    state, line = first_state(config, rows)
    assert line == f"weights: from step 20 of {workdir} (router 'topk')"
    _, values = program_for(config).train_step(state, put_batch(program_for(config), rows, 0))
    assert loss == float(values["loss"])


def test_all_but_weights_and_default_vectors_is_that_of_a_new_run(source, begun, folder):
    assert_as_saved("params", begun.params, saved_state(source[0], 20))
    new = program_for(config_for(folder, RAMP)).new_state()
    for name in ("step", "opt_state", "bad_steps", "bad_steps_in_row"):
        jax.tree.map(np.testing.assert_array_equal, getattr(begun, name), getattr(new, name))
    np.testing.assert_array_equal(jax.random.key_data(begun.rng), jax.random.key_data(new.rng))
    np.testing.assert_array_equal(begun.variables["router_state"]["moe_layers"]["moe"]["steps"], [0, 0])


def test_collections_that_fit_are_taken_over(tuned, folder, rows):
    state, line = first_state(config_for(folder, RAMP, tuned[0]), rows)
    assert line.endswith("(router 'default'); default vectors: taken over; router state: taken over")
    assert_as_saved("variables", state.variables, saved_state(tuned[0], 8))
    assert state.step == 0 and vectors_of(state).any()


def test_a_method_that_keeps_nothing_starts_from_one_that_does(tuned, folder, rows):
    state, line = first_state(config_for(folder, {"router": "topk"}, tuned[0]), rows)
    assert line == f"weights: from step 8 of {tuned[0]} (router 'default')"
    assert state.variables == {}
    assert_as_saved("params", state.params, saved_state(tuned[0], 8))


def test_only_collections_that_fit_are_taken_over():
    saved = {"variables.a.x": "float32[2]", "variables.b.x": "float32[2]", "variables.c.x": "float32[2]"}
    x = np.zeros(2, np.float32)
    variables = {"a": {"x": x}, "b": {"x": x, "y": x}, "c": {"x": np.zeros(3, np.float32)}, "d": {"x": x}}
    assert collections_taken_over(saved, variables) == ("a",)


def test_an_interrupted_run_needs_its_source_no_more(source, tuned, folder, tmp_path):
    """As if it had been killed after its first checkpoint, which is of step 4, or before it."""
    config, workdir = config_for(folder, RAMP, source[0]), shutil.copytree(tuned[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    source[0].rename(folder / "elsewhere")
    try:
        output = trained(config, workdir)
    finally:
        (folder / "elsewhere").rename(source[0])
    assert "continuing from step 4" in output and "weights: " not in output
    assert metrics(workdir) == metrics(tuned[0])
    assert_same_state(workdir, tuned[0], 8)
    assert find_source(config, workdir, pytest.fail) is None
    shutil.rmtree(workdir / "checkpoints")
    assert find_source(config, workdir, pytest.fail).step == 20


# Default vectors


def layer_norm(x, params):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * params["scale"][0] + params["bias"][0]


def first_layer(state, config, batch):
    """Inputs [T, D] of the first MoE layer, and its parameters, in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), state.params)
    layer = params["moe_layers"]
    x_BLD = params["embed"][batch["inputs"]]
    positions = np.broadcast_to(np.arange(x_BLD.shape[1]), x_BLD.shape[:2])
    attention = {"params": jax.tree.map(lambda a: np.float32(a[0]), layer["attention"])}
    normed_BLD = np.float32(layer_norm(x_BLD, layer["attention_norm"]))
    x_BLD += Attention(config.model, None).apply(attention, normed_BLD, Tokens(positions, None, None))
    x_TD = layer_norm(x_BLD, layer["ffn_norm"]).reshape(-1, x_BLD.shape[-1])
    return x_TD, jax.tree.map(lambda a: a[0], layer["moe"])


def mean_outputs(x_TD, params, weighted, initial_ND):
    """[N, D], of the two experts of largest probability for each token."""
    logits_TN = x_TD @ params["router"]["kernel"]
    ranked_TN = np.sort(logits_TN)
    assert (ranked_TN[:, -2] - ranked_TN[:, -3]).min() > 1e-5  # float32 chooses the same
    weights_TN = np.exp(logits_TN) / np.exp(logits_TN).sum(axis=1, keepdims=True) if weighted else np.ones((1, 1))
    weights_TN = np.where(logits_TN >= ranked_TN[:, -2:-1], weights_TN, 0)
    gate_TNF, up_TNF = (np.einsum("td,ndf->tnf", x_TD, params["experts"][name]) for name in ("gate", "up"))
    outputs_TND = np.einsum("tnf,nfd->tnd", gate_TNF * sigmoid(gate_TNF) * up_TNF, params["experts"]["down"])
    total_N1 = weights_TN.sum(axis=0)[:, None]
    means_ND = np.einsum("tn,tnd->nd", weights_TN, outputs_TND) / np.where(total_N1 > 0, total_N1, 1)
    return np.where(total_N1 > 0, means_ND, initial_ND)


def with_vectors(state, value):
    """`state` with default vectors all of that value."""
    vectors = jax.tree.map(lambda a: np.full(a.shape, value, np.float32), state.variables["default_vectors"])
    return dataclasses.replace(state, variables={**state.variables, "default_vectors": vectors})


SPLIT = {"mesh": {"data": 2, "fsdp": 2, "expert": 2}, "train": {"batch_size": 16, "grad_accum_steps": 2}}


@pytest.mark.parametrize(("weighted", "sections"), [(True, {}), (False, SPLIT)], ids=["weighted", "unweighted, split"])
def test_default_vectors_are_means_over_all_batches(begun, folder, rows, weighted, sections):
    """Whatever they were before, in microbatches and over any mesh too."""
    moe = {**RAMP, "default": {**RAMP["default"], "ema_weighted": weighted}}
    program = program_for(config_for(folder, moe, **sections))
    state = dataclasses.replace(with_vectors(begun, 7.0), step=np.int32(2))  # of a branch: the next batches count
    state = jax.device_put(state, program.state_shardings)
    warmed = warm_up(program, state, rows, 3)
    size = program.config.train.batch_size
    x_TD, params = first_layer(state, program.config, rows.batch(2 * size, 3 * size))
    assert_close(vectors_of(warmed)[0], mean_outputs(x_TD, params, weighted, 7.0))
    assert (vectors_of(warmed) != 7).any(axis=(1, 2)).all()
    assert warmed.params is state.params and warmed.opt_state is state.opt_state
    assert warmed.variables["router_state"] is state.variables["router_state"]


def test_an_expert_without_a_token_keeps_its_vector(begun, folder, rows):
    """With all scores equal the experts of lowest number are chosen."""
    program = program_for(config_for(folder, RAMP))
    params = jax.tree_util.tree_map_with_path(lambda path, a: 0 * a if "router" in str(path) else a, begun.params)
    state = dataclasses.replace(with_vectors(begun, 7.0), params=params)
    warmed = vectors_of(warm_up(program, state, rows, 3))
    assert (warmed[:, 2:] == 7).all() and (warmed[:, :2] != 7).all()


def test_vectors_that_are_not_warmed_are_initial(source, folder, rows):
    moe = {"router": "default", "default": {"warm_up_batches": 0, "substitute_ramp_steps": 4}}
    state, line = first_state(config_for(folder, moe, source[0]), rows)
    assert "default vectors: initial" in line and not vectors_of(state).any()


# Branches

WSD = {"optim": {"peak_lr": 1e-2, "warmup_fraction": 0.25, "schedule": "wsd", "decay_fraction": 0.25}}
TWELVE = {"train": {"num_steps": 12}, "checkpoint": {"every_steps": 4, "keep_last": 3}, **WSD}


@pytest.fixture(scope="module")
def stable(folder):
    """The work directory of a run of 12 steps, saved at 4, 8 and 12, of which the last three fall."""
    trained(config_for(folder, RAMP, **TWELVE), folder / "stable")
    return folder / "stable"


def branch(folder, source, step=None, **sections):
    config = config_for(folder, RAMP, source, **sections)
    return dataclasses.replace(config, init_step=step, init_optimizer=True)


def test_a_branch_is_the_run_that_it_leaves(stable, folder):
    """Optimizer, default vectors, ramp, schedule, random numbers and data: all go on as if nothing had been stopped."""
    output = trained(branch(folder, stable, 4, **TWELVE), folder / "branch")
    assert f"weights: from step 4 of {stable} (router 'default'); default vectors: taken over" in output
    assert "router state: taken over; optimizer: taken over; goes on at step 5\n" in output
    assert "the learning rate of the next step" not in output
    assert metrics(folder / "branch") == [line for line in metrics(stable) if line["step"] > 4]
    assert_same_state(folder / "branch", stable, 12)
    [start] = json.loads((folder / "branch" / "run.json").read_text())["starts"]
    assert start["from_step"] == 4


def test_a_branch_says_whether_its_rate_falls_from_where_it_leaves(stable, folder):
    """Of 10 steps the last two fall, after step 8; or the last five, in fifths of 0.9, three of which are over."""

    def told(decay_fraction):
        optim = {**WSD["optim"], "decay_fraction": decay_fraction}
        config = branch(folder, stable, 8, train={"num_steps": 10}, optim=optim)
        source = find_source(config, folder / "none", pytest.fail)
        return learning_rate_jump({"config": source.config.to_dict()}, config, source.step)

    assert told(0.2) is None
    assert told(0.5).startswith("the learning rate of the next step is 0.0046; with the settings before it was 0.01 ")


BRANCHES_REFUSED = {
    "no such step": (
        5,
        TWELVE,
        "init_from: there is no checkpoint of step 5 in {stable}/checkpoints; there is 4, 8, 12",
    ),
    "nothing left to do": (12, TWELVE, "train.num_steps is 12, but with init_optimizer it must be above 12"),
    "another batch size": (
        4,
        {"train": {"batch_size": 16}},
        "train.batch_size is 16, but with init_optimizer it must be 8",
    ),
    "another optimizer": (
        None,
        {"train": {"num_steps": 20}, "optim": {"name": "muon"}},
        "init_from: the checkpoint of step 12 holds the state of another optimizer (optim.name: adamw there, "
        "muon here)",
    ),
    "another model": (4, {"model": {"tie_embeddings": True}}, "it has params.head, which the model lacks"),
}


@pytest.mark.parametrize(("step", "sections", "words"), BRANCHES_REFUSED.values(), ids=BRANCHES_REFUSED)
def test_a_branch_that_cannot_be(stable, folder, step, sections, words):
    error = refused_training(branch(folder, stable, step, **sections), folder / "none")
    assert words.replace("{stable}", str(stable)) in error and not (folder / "none").exists()


# What is refused

REFUSED = {
    "no such run": ("none", {}, "init_from: there is no work directory {folder}/none"),
    "a link to itself": ("loop", {}, "init_from: the checkpoints in {folder}/loop/checkpoints cannot be read"),
    "no checkpoint": ("text", {}, "init_from: there is no checkpoint in {folder}/text/checkpoints"),
    "only damaged ones": ("damaged", {}, "init_from: no checkpoint in {folder}/damaged/checkpoints is whole"),
    "another width": (
        "source",
        {"moe": {"expert_dim": 8}},
        "init_from: the checkpoint of step 20 in {folder}/source does not fit this model: "
        "params.moe_layers.moe.experts.down is float32[2, 8, 16, 16] there, but float32[2, 8, 8, 16] in the model",
    ),
    "parameters that are not there": (
        "source",
        {"moe": {"num_shared_experts": 1}},
        "it has no params.moe_layers.moe.shared_experts.down.kernel, which the model needs",
    ),
    "parameters left over": (
        "source",
        {"model": {"tie_embeddings": True}},
        "it has params.head, which the model lacks",
    ),
    "another tokenizer": (
        "source",
        {"data": {"tokenizer": "bpe:270"}},
        "data.tokenizer is another tokenizer than that of the run in init_from='{folder}/source'",
    ),
    "itself": ("run", {}, "init_from is '{folder}/run', the work directory of this run itself"),
}


@pytest.mark.parametrize(("name", "sections", "words"), REFUSED.values(), ids=REFUSED)
def test_a_source_that_does_not_serve(source, folder, tmp_path, name, sections, words):
    if name == "loop":
        (folder / name).symlink_to(name)
    if name == "damaged":
        shutil.copytree(source[0], folder / name)
        for path in (folder / name / "checkpoints").glob("*/meta.json"):
            path.write_text("{}")
    moe = {"router": "default", **sections.get("moe", {})}
    data = {"dir": str(tmp_path / "prepared"), **sections.get("data", {})}
    config = config_for(folder, moe, folder / name, data=data, model=sections.get("model", {}))
    assert words.replace("{folder}", str(folder)) in refused_training(config, folder / "run")
    assert not (folder / "run").exists()
    # Which tokenizer the data has is known once it is prepared.
    assert (tmp_path / "prepared").exists() == ("tokenizer" in data)


def test_a_run_does_not_change_its_source(tuned, folder):
    before = content(tuned[0])
    error = refused_training(config_for(folder, RAMP, folder / "other"), tuned[0])
    assert f"init_from: {folder}/source there, {folder}/other here" in error
    assert content(tuned[0]) == before


def test_a_damaged_checkpoint_of_the_source_is_stepped_over(source, folder, tmp_path, monkeypatch):
    shutil.copytree(source[0], tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "20" / "meta.json").write_text("{}")
    before, lines = content(tmp_path / "copy"), []
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_source(config_for(folder, RAMP, "~/copy"), tmp_path / "new", lines.append)
    assert found.step == 10 and found.workdir == tmp_path / "copy"
    assert len(lines) == 1 and lines[0].startswith("init_from: checkpoint of step 20 is damaged")
    assert content(tmp_path / "copy") == before


def test_what_shapes_do_not_show_is_said(folder):
    before = config_for(folder, {"router": "topk"})
    now = config_for(folder, {"router": "default", "top_k": 1}, model={"rope_theta": 500.0, "remat": "full"})
    lines = ["model.rope_theta was 10000.0, is now 500.0", "moe.top_k was 2, is now 1"]
    assert changes_since(before, now) == lines
