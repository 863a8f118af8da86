"""The benchmarks end to end on tiny work, and that what they time is what they say."""

import dataclasses
import functools
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags
from helpers.reference import assert_close
from jax.profiler import ProfileData

from default_moe.bench import __main__ as program
from default_moe.bench import kernels, layer, products, report, scaling, step
from default_moe.bench.candidate import StepCandidate, random_batch
from default_moe.bench.timing import Timing, time_alternately
from default_moe.bench.workload import LayerShape, dense_candidate, make_work, moe_candidate
from default_moe.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from default_moe.errors import ConfigError

SHAPE = LayerShape(tokens=64, d_model=16, num_experts=4, top_k=2, expert_dim=8)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    for suite in (step, scaling):
        monkeypatch.setattr(suite, "StepCandidate", functools.partial(StepCandidate, devices=jax.devices()[:1]))


def config_of(**train) -> Config:
    return Config(
        model=ModelConfig(d_model=32, num_layers=1, num_dense_layers=0, num_heads=2),
        moe=MoEConfig(num_experts=4, expert_dim=8),
        train=TrainConfig(batch_size=8, **train),
    )


def test_ratios_are_taken_round_by_round():
    """4/2, 6/2 and 9/3 are 2, 3 and 3: median 3, quartiles 2.5 and 3."""
    assert Timing([4.0, 6.0, 9.0]).ratio_to(Timing([2.0, 2.0, 3.0])) == (3.0, 2.5, 3.0)
    assert Timing([4.0, 6.0, 9.0]).seconds == 6.0


def test_every_function_is_timed_in_every_round():
    calls = []
    timings = time_alternately({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=4)
    assert [len(t.samples) for t in timings.values()] == [4, 4]
    assert set(calls) == {"a", "b"}


@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_the_router_sends_tokens_where_the_routing_says(routing):
    work = make_work(SHAPE, routing, "float32")
    logits = np.asarray(work.x[0], np.float64) @ np.asarray(work.params["router"]["kernel"], np.float64)
    chosen = np.argsort(-logits, axis=1)[:, : SHAPE.top_k]
    share_of_first = (chosen == 0).any(axis=1).mean()
    if routing == "skewed":
        assert share_of_first == 0.5
    assert 0.3 < share_of_first < 0.7
    counts = np.bincount(chosen.reshape(-1), minlength=4)
    assert counts.sum() == 128
    assert counts.min() > 16  # 32 each on average, and for the others when one has 32 of its own


def test_the_backends_do_the_same_work():
    work = make_work(SHAPE, "balanced", "float32")
    (ragged, _), ragged_gradients = moe_candidate(SHAPE, work, "default", "ragged")[1]()
    (blocks, _), blocks_gradients = moe_candidate(SHAPE, work, "default", "blocks")[1]()
    jax.tree.map(assert_close, (blocks, blocks_gradients), (ragged, ragged_gradients))
    assert SHAPE.active_flops() == 2 * 3 * 64 * 2 * 16 * 8
    assert jax.tree.map(np.shape, work.dense) == ((16, 16), (16, 16), (16, 16))
    assert dense_candidate(work)[0]().shape == (1, 64, 16)


def test_the_layer_suite_reports_every_candidate(tmp_path, capsys):
    rows = layer.run([SHAPE], None, None, rounds=2, vs_torch=False)
    assert {row["candidate"] for row in rows} == {
        "dense",
        *(f"{r} {b}" for r in ("topk", "default") for b in ("ragged", "blocks")),
    }
    assert len(rows) == 2 * (1 + 4 * 2)  # two passes; each router and backend with two routings
    assert all(row["ms"] > 0 and row["/ dense"] > 0 for row in rows)
    assert "T64 D16 N4 K2 F8 float32, forward+backward" in capsys.readouterr().out
    assert all(("/ balanced" in row) == (row["routing"] == "skewed") for row in rows)
    assert all(("/ top-k" in row) == row["candidate"].startswith("default") for row in rows)
    layer.plot(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=r"cannot write the picture .*none"):
        layer.plot(rows, tmp_path / "none" / "bars.png")


def test_the_step_suite_keeps_default_moe_within_its_memory(tmp_path):
    for name, text in (("text", "All work and no play makes Jack a dull boy"), ("more", "The quick brown fox jumps")):
        (tmp_path / f"{name}.txt").write_text(f"{text}.\n" * 300)
    data = DataConfig(name="text_files", files=f"{tmp_path}/*.txt", dir=f"{tmp_path}/data", validation_fraction=0.5)
    config = dataclasses.replace(config_of(sequence_length=64), data=data)
    topk, default = step.run(config, ["default"], rounds=2)
    assert topk["/ top-k"] == 1
    assert default["step ms"] > 0 and default["data ms"] > 0
    assert default["tokens/s"] == pytest.approx(8 * 64 / default["step ms"] * 1e3)
    # 1 MoE layer: 4 default vectors of 32 and 4 probabilities of 512 tokens, 4 bytes each.
    assert default["allowed bytes"] == 4 * (4 * 32 + 4 * 512)
    assert default["forward+backward ms"] > 0 and default["optimizer ms"] > 0
    assert default["state MB"] - topk["state MB"] == pytest.approx(4 * 4 * 32 / 1e6)


def test_methods_train_the_same_parameters_and_keep_what_is_theirs():
    config = config_of(sequence_length=16)
    batch = random_batch(config, 257)
    default = StepCandidate(config, batch, 257, jax.devices()[:1])
    loss_free = dataclasses.replace(config, moe=dataclasses.replace(config.moe, router="loss_free"))
    other = StepCandidate(loss_free, batch, 257, jax.devices()[:1], other=default)
    for candidate in (default, other, default):
        candidate.step()
    default.optimizer()
    assert int(default.state.step) == int(other.state.step) == 3
    assert default.state.params is other.state.params
    assert list(default.state.variables) == ["default_vectors"] and list(other.state.variables) == ["router_state"]
    assert default.state.opt_state is other.state.opt_state
    muon = dataclasses.replace(config, optim=OptimConfig(name="muon"))
    third = StepCandidate(muon, batch, 257, jax.devices()[:1], other=default)
    for candidate in (third, default, third):
        candidate.step()
    third.optimizer()
    assert int(default.state.step) == 6 and default.state.params is third.state.params
    adam, muons = default.state.opt_state[1], third.state.opt_state[1]
    assert (int(adam[-1].count), int(muons[-1].count)) == (5, 3)  # of the schedule, in updates


def test_the_products_suite_says_which_kernel_failed(monkeypatch, capsys):
    def refuse(*args):
        raise ValueError("no\nkernel")

    monkeypatch.setattr(products, "_plain", refuse)
    saved = []
    best, copy, *rows = products.run([SHAPE], None, 2, False, lambda rows: saved.append(len(rows)))
    assert best["GFLOP/s"] > 0 and copy["GB/s"] > 0
    assert [row["by"] for row in rows] == ["ragged_dot", "plain product of equal FLOPs"] * 3 + ["blocks"] * 2
    assert saved == [4, 6, 8, 9, 10]  # a suite that is stopped leaves what it has found
    flops = 2 * 64 * 2 * 16 * 8
    for found, share in zip((rows[0], rows[2], rows[4], rows[6], rows[7]), (1, 1, 1, 3, 9), strict=True):
        assert found["/ matrix product"] == pytest.approx(share * flops / found["ms"] / 1e6 / best["GFLOP/s"])
    assert all(failed["error"] == "ValueError: no kernel" for failed in rows[1:6:2])
    assert "T64 D16 N4 K2 F8 float32, rows' gradient" in capsys.readouterr().out


@pytest.mark.hf
def test_torch_is_timed_on_the_same_work():
    rows = products.run([SHAPE], None, rounds=1, vs_torch=True)
    assert [row["by"] for row in rows if "torch" in row["by"]] == ["torch, plain product"] * 3 + ["torch"] * 2
    rows += layer.run([SHAPE], ["auto"], None, rounds=1, vs_torch=True)
    assert {row["candidate"] for row in rows if "candidate" in row} >= {"torch dense", "torch mixtral", "default auto"}
    assert not [row for row in rows if "error" in row]


def test_our_kernels_for_hopper_are_timed_with_all_tiles(monkeypatch):
    """They fail here. Traced they give what a layer of 512 tokens, D 256 and two experts of 384 makes of them."""
    shape = LayerShape(512, 256, 2, 1, 384)
    monkeypatch.setattr(products, "is_hopper", lambda: True)
    rows = products.run([shape], "bfloat16", rounds=1, vs_torch=False)
    ours = [row for row in rows if row["by"].startswith("hopper ")]
    works = ["product", "rows' gradient", "matrices' gradient", "SwiGLU", "SwiGLU's gradient"]
    assert list(dict.fromkeys(row["work"].partition(", ")[2] for row in ours)) == works
    assert {row["by"] for row in ours} >= {"hopper 128x256x64 stages 4", "hopper 128x192x64 stages 4"}
    assert all("error" in row for row in ours)
    slots = 512 + 2 * 127 + 2  # rounded up to a multiple of 128
    shapes = {"product": [(slots, 256)], "rows' gradient": [(slots, 256)], "matrices' gradient": [(2, 256, 384)]}
    shapes |= dict.fromkeys(works[3:], [(slots, 384)] * 3)
    for name, by in products._ours(shape, "bfloat16").items():
        for call in by.values():
            outputs = jax.tree.leaves(jax.eval_shape(call.func, *call.args, **call.keywords))
            assert [out.shape for out in outputs] == shapes[name]


def test_the_time_of_a_loop_is_its_own():
    def event(name, start_ns, duration_ns):
        return SimpleNamespace(name=name, start_ns=start_ns, duration_ns=duration_ns)

    events = [
        event("body", 2, 3),
        event("loop", 0, 10),
        event("body", 5, 4),
        event("inner", 6, 1),
        event("after", 10, 2),
    ]
    times = sorted(kernels._own_times(events))
    assert times == [("after", 2), ("body", 3), ("body", 3), ("inner", 1), ("loop", 3)]
    # Two that only overlap: neither is the other's.
    assert sorted(kernels._own_times([event("a", 0, 10), event("b", 8, 12)])) == [("a", 10), ("b", 12)]


def test_a_layer_is_timed_without_a_backend_that_fails(monkeypatch, capsys):
    real = layer.moe_candidate

    def candidate(shape, work, router, matmul):
        def fail():
            raise ValueError("no\nkernel")

        return (fail, fail) if matmul == "ragged" else real(shape, work, router, matmul)

    monkeypatch.setattr(layer, "moe_candidate", candidate)
    rows = layer.run([SHAPE], ["blocks", "ragged"], None, 1, False)
    assert {row["candidate"] for row in rows} == {"dense", "topk blocks", "default blocks"}
    assert "float32, forward: without ragged, ValueError: no kernel" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no"):
        layer.run([SHAPE], ["ragged"], None, 1, False)


def test_kernels_are_read_from_the_newest_profile(tmp_path):
    """Streams of a GPU, or the operations of a TPU; not what lies above them in other lines, nor the host's."""
    text = """
        planes {{ name: "/host:CPU" lines {{ name: "python" events {{ metadata_id: 1 duration_ps: 5000000 }} }}
            event_metadata {{ key: 1 value {{ id: 1 name: "host" }} }} }}
        planes {{ name: "/device:{device}:0"
            lines {{ name: "{line}" events {{ metadata_id: 1 duration_ps: 3000000 }}
                events {{ metadata_id: 2 offset_ps: 3000000 duration_ps: 1000000 }}
                events {{ metadata_id: 3 offset_ps: 4000000 duration_ps: 4000000 }} }}
            lines {{ name: "Steps" events {{ metadata_id: 1 duration_ps: 9000000 }} }}
            event_metadata {{ key: 1 value {{ id: 1 name: "fusion_1" }} }}
            event_metadata {{ key: 2 value {{ id: 2 name: "fusion.2" }} }}
            event_metadata {{ key: 3 value {{ id: 3 name: "wgmma" }} }} }}
    """
    assert kernels.kernel_times(tmp_path) == []
    for index, (device, line) in enumerate((("GPU", "Stream #14(Compute)"), ("TPU", "XLA Ops"))):
        folder = tmp_path / "plugins" / "profile" / str(index)
        folder.mkdir(parents=True)
        text_of_device = text.format(device=device, line=line)
        (folder / "x.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text_of_device))
        os.utime(folder / "x.xplane.pb", (index, index))
        rows = kernels.kernel_times(tmp_path)
        assert [(row["kernel"], row["calls"], row["share"]) for row in rows] == [("fusion", 2, 0.5), ("wgmma", 1, 0.5)]
        assert rows[0]["ms"] == pytest.approx(0.004)
    empty = ProfileData.text_proto_to_serialized_xspace('planes { name: "/device:GPU:0" }')
    (folder / "later.xplane.pb").write_bytes(empty)
    assert kernels.kernel_times(tmp_path) == []


def test_the_scaling_suite_sweeps_experts_depth_and_tokens(tmp_path, capsys, monkeypatch):
    for name, values in (("NUM_EXPERTS", (8, 16)), ("NUM_LAYERS", (2,)), ("BATCHES", (0.5, 1))):
        monkeypatch.setattr(scaling, name, values)
    rows = scaling.run(config_of(sequence_length=16), rounds=2)
    values = {"num_experts": [8, 16], "num_layers": [2], "tokens": [128]}  # on 8 devices no fewer sequences
    assert [(row["sweep"], row["value"]) for row in rows] == [(k, v) for k, vs in values.items() for v in vs]
    assert [row["/ first"] for row in rows if row["value"] in (8, 2, 128)] == [1, 1, 1]
    assert all(row["step ms"] > 0 and row["compile s"] > 0 for row in rows)
    assert "num_layers" in capsys.readouterr().out
    scaling.plot(rows, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").stat().st_size > 10_000


def test_depths_of_dense_layers_alone_are_left_out(monkeypatch):
    monkeypatch.setattr(scaling, "NUM_LAYERS", (1, 2))
    config = Config(model=ModelConfig(num_layers=2, num_dense_layers=1))
    assert list(scaling.sweeps(config)["num_layers"]) == [2]


BAD = {
    "a shape of four numbers": (["--shape=1,2,3,4"], "five numbers"),
    "more choices than experts": (["--shape=8,16,2,3,4"], "1 <= K <= N <= D"),
    "an unknown backend": (["--matmul=cutlass"], "--matmul is 'cutlass'"),
    "an unknown suite": (["--suite=all"], "layer"),
    "a config for the layer suite": (["--config=configs/quickstart.py"], "--suite=step"),
    "a shape for the step suite": (["--suite=step", "--shape=8,16,4,2,4"], "goes with --suite=layer and"),
    "the same in two words": (["--suite", "step", "--shape=8,16,4,2,4"], "goes with --suite=layer and"),
    "a profile of the layer": (["--profile=x"], "--profile goes with --suite=step"),
    "an unknown optimizer": (["--suite=step", "--optimizers=sgd"], "--optimizers is 'sgd'"),
    "random tokens for the layer": (["--random_tokens"], "--random_tokens goes with --suite=step"),
    "a picture of products": (["--suite=products", "--plot=x.png"], "--plot goes with --suite=layer and"),
    "no folder": (["--suite=accelerator"], "--suite=accelerator needs --out=DIR"),
    "a folder for the layer": (["--out=o"], "--out goes with --suite=accelerator"),
    "rounds of all": (["--suite=accelerator", "--out=o", "--rounds=3"], "--rounds goes with --suite=layer and"),
    "a file nowhere": (["--json=/nowhere/a.json"], "there is no directory /nowhere"),
}


@pytest.mark.parametrize("args,words", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(args, words):
    flags.FLAGS.unparse_flags()
    for name in ("config", "suite", *program._FLAGS_OF):
        flags.FLAGS[name].unparse()
    with pytest.raises((ConfigError, flags.Error)) as caught:
        program.main(["bench", *args])
    assert words in str(caught.value)


def test_json_says_where_it_is_from(tmp_path):
    report.write_json(tmp_path / "a.json", "layer", [{"ms": 1.5}])
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["results"] == [{"ms": 1.5}]
    assert written["machine"]["versions"]["jax"] == jax.__version__
    with pytest.raises(ConfigError, match="cannot write"):
        report.write_json(tmp_path / "none" / "a.json", "layer", [])
