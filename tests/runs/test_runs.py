"""Whole runs of a tiny model: what they leave, how they survive trouble, and their evaluation."""

import dataclasses
import errno
import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import moe_config
from helpers.tiny_runs import (
    REPOSITORY,
    assert_same_state,
    at_step,
    content,
    evaluate,
    evaluated,
    metrics,
    read_events,
    refused_training,
    steps,
    tiny_config,
    trained,
    write_corpus,
)

from default_moe.config import Config, ModelConfig
from default_moe.data import open_data
from default_moe.methods import METHODS
from default_moe.model.attention import Tokens
from default_moe.model.language_model import Block
from default_moe.runs import checkpoint, evaluate_checkpoint, evaluation, measurements, trainer
from default_moe.runs.measurements import StepMeasurements
from default_moe.training.program import Program

# Runs with other steps or learning rates are other programs, which take longer to compile than to run: most tests keep
# to these.
PAGE = REPOSITORY / "default_moe/data/README.md"
LEARNING = {
    "train": {"num_steps": 30},
    "optim": {"peak_lr": 1e-2},
    "eval": {"num_batches": 0, "sample_tokens": 8, "sets": f"page:{PAGE}"},
}


@pytest.fixture(scope="module")
def finished(folder):
    """A finished run's work directory and what it printed."""
    return folder / "finished", trained(tiny_config(folder, **LEARNING), folder / "finished")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def held_out(workdir):
    """Held-out losses by step."""
    return {line["step"]: line["eval/loss"] for line in metrics(workdir) if "eval/loss" in line}


def test_a_run_learns_and_leaves_what_scripts_rely_on(finished):
    workdir, output = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == list(range(1, 31))
    assert [line["step"] for line in lines if "eval/loss" in line] == [12, 24, 30]
    for name in ("perplexity", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds"):
        assert f"train/{name}" in training[0]
    for name in ("load_balance_loss", "router_entropy", "max_load", "default_vector_norm"):
        assert f"layer_1/{name}" in training[0]
    assert training[0]["train/load_balance_loss"] == pytest.approx(training[0]["layer_1/load_balance_loss"])
    # Nothing known costs log 257 = 5.55 nats a byte; words of lower-case letters at most log 27 = 3.3.
    assert training[0]["train/loss"] > 5.3
    assert held_out(workdir)[30] < 3.3
    last = [line for line in lines if "eval/loss" in line][-1]
    assert last["eval/perplexity"] == pytest.approx(np.exp(last["eval/loss"]))
    assert last["eval/bits_per_byte"] == pytest.approx(last["eval/loss"] / np.log(2), rel=0.01)  # a byte a token
    loads = [json.loads(line) for line in (workdir / "expert_load.jsonl").read_text().splitlines()]
    assert [load["step"] for load in loads if load["split"] == "train"] == list(range(1, 31))
    assert [load["step"] for load in loads if load["split"] == "eval"] == [12, 24, 30]
    assert all(np.sum(load["tokens_per_expert"]) == 8 * 32 * 2 for load in loads if load["split"] == "train")
    assert all(path.stat().st_size for path in (workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert steps(workdir) == [24, 28, 30]
    assert (
        f"step 30: set 'page': loss {last['eval/page/loss']:.4f}, {last['eval/page/bits_per_byte']:.4f} bits" in output
    )
    assert "a sample:\ndef " in output and "compiled the training step in" in output


def tags_of_layers(moe):
    """What is logged of a model's second layer, from the shapes of what it reports in training."""
    model = ModelConfig(d_model=16, num_heads=2, attention="xla")
    block = Block(model, moe, 16, True, None)
    zeros = jnp.zeros((2, 4), jnp.int32)
    x, tokens = jnp.zeros((2, 4, 16)), Tokens(zeros, None, None, zeros)
    variables = jax.eval_shape(block.init, jax.random.key(0), x, tokens)
    (_, stats), _ = jax.eval_shape(
        lambda v: block.apply(v, x, tokens, mutable=True, rngs={"router": jax.random.key(0)}), variables
    )
    config = Config(model=ModelConfig(num_layers=2))
    program = SimpleNamespace(config=config, vocab_size=257)
    return StepMeasurements(program, 0).scalars(1, {"layers": jax.tree.map(lambda a: np.zeros((1, *a.shape)), stats)})


def test_the_page_lists_every_tag_and_no_other(finished, monkeypatch):
    """Those of the step and of evaluation in a whole run, those of each method's layers from its shapes."""
    monkeypatch.setattr(measurements, "peak_flops", lambda device: 1e12)
    lines = map(json.loads, (finished[0] / "metrics.jsonl").read_text().splitlines())
    written = {name for line in lines for name in line} - {"step"}
    assert written | {"expert_load"} == {v.tag for e in read_events(finished[0]) for v in e.summary.value}
    written |= {"expert_load"}
    more = [
        {"router": "topk", "sequence_balance_weight": 0.1, "capacity_factor": 1.0},
        {"router": "default", "substitute_ramp_steps": 2, "simbal_weight": 0.1, "coupling_weight": 0.1},
    ]
    for fields in [*({"router": name} for name in METHODS), *more]:
        written |= tags_of_layers(moe_config(num_experts=4, expert_dim=8, **fields)).keys()
    section = (REPOSITORY / "default_moe/runs/README.md").read_text().split("## Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    listed = [tag for row in rows for tag in re.findall(r"`(.*?)`", row)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {re.sub(r"^layer_\d+", "layer_*", tag.replace("/page/", "/*/")) for tag in written}


def test_a_finished_run_is_not_run_again_but_can_be_prolonged(folder, copy):
    before = content(copy)
    assert "nothing to do: the run is at step 30" in trained(tiny_config(folder, **LEARNING), copy)
    assert content(copy) == before
    output = trained(tiny_config(folder, **{**LEARNING, "train": {"num_steps": 32}}), copy)
    assert "changed since the last start: train.num_steps was 30, is now 32" in output
    assert "continuing from step 30" in output
    assert steps(copy)[-1] == 32
    rate = next(line["train/learning_rate"] for line in metrics(copy) if line["step"] == 31)
    before = "with the settings before it was 0.001 (train.num_steps 30 -> 32)\n"
    assert f"the learning rate of the next step is {rate:.3g}; {before}" in output


def test_a_jump_of_the_learning_rate_is_told_with_its_causes():
    """Warm-up is 1 % of 400 steps: after 2 updates 3/4 of the peak; of 800, 3/8. It ends alike with any decay after."""

    def told(updates, before=None, **sections):
        meta = {"config": Config.from_mapping(before or {}).to_dict()}
        return trainer.learning_rate_jump(meta, Config.from_mapping(sections), updates)

    start = "the learning rate of the next step is"
    changed = {"train": {"num_steps": 800}, "optim": {"peak_lr": 4e-3, "clip_norm": 2.0}}
    causes = "(train.num_steps 400 -> 800, optim.peak_lr 0.003 -> 0.004)"
    assert told(2, **changed) == f"{start} 0.0015; with the settings before it was 0.00225 {causes}"
    assert told(2, changed, **changed) is None and told(100, optim={"clip_norm": 2.0}) is None
    final = {"optim": {"final_lr_fraction": 0.5}}
    assert told(3, **final) is None
    assert told(400, **final).startswith(f"{start} 0.0015; with the settings before it was 0.0003 (optim.final_lr_f")
    assert "(optim.schedule cosine -> wsd)" in told(50, optim={"schedule": "wsd"})
    assert "(optim.warmup_fraction 0.01 -> 0.5)" in told(50, optim={"warmup_fraction": 0.5})
    assert trainer.learning_rate_jump({}, Config(), 1) is None
    assert trainer.learning_rate_jump({"config": {"wings": 2}}, Config(), 1) is None


def test_a_model_without_moe_layers_is_called_one(folder):
    config = tiny_config(folder, model={"num_dense_layers": 2})
    told = trainer._description(Program(config, 257), open_data(config.data, lambda line: None))
    assert "no MoE layers, as model.num_dense_layers is model.num_layers: moe.* is not used\n" in told


def test_settings_that_cannot_continue_a_run_are_all_named(folder, finished, tmp_path):
    workdir, _ = finished
    before = content(workdir)
    changed = tiny_config(
        folder,
        model={"d_model": 32},
        moe={"num_experts": 16},
        train={"seed": 2},
        data={"files": write_corpus(tmp_path / "text", seed=5), "validation_fraction": 0.3},
    )
    error = refused_training(changed, workdir)
    for difference in (
        "model.d_model: 16 there, 32 here",
        "moe.num_experts: 8 there, 16 here",
        "train.seed: 1 there, 2 here",
        "data.validation_fraction: 0.2 there, 0.3 here",
        "corpus_hash: ",
        "text changed: '0.txt', '1.txt', '2.txt' and 1 more",
    ):
        assert difference in error
    assert content(workdir) == before


def test_a_full_disk_does_not_end_a_run(folder, finished, tmp_path, monkeypatch):
    """The save of step 12 fails; it is made up for at the next step that is logged."""
    write, failures = checkpoint.write_manifest, []

    def full_once(path):
        if not failures:
            failures.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path)

    def until_it_failed():
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()

    monkeypatch.setattr(checkpoint, "write_manifest", full_once)
    at_step(monkeypatch, 13, until_it_failed)
    output = trained(tiny_config(folder, **LEARNING, checkpoint={"every_steps": 12}), tmp_path)
    complaints = [line for line in output.splitlines() if "not saved" in line]
    assert len(complaints) == 1 and "step 12" in complaints[0] and "No space left on device" in complaints[0]
    retried, *due = steps(tmp_path)
    assert 12 < retried < 24 and due == [24, 30]
    assert_same_state(tmp_path, finished[0], 30)


def test_a_run_whose_last_save_fails_says_so_and_fails(folder, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny_config(folder, **LEARNING, checkpoint={"every_steps": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", full)
        error = refused_training(config, tmp_path, code=1)
    assert error.startswith("error: the checkpoint of step 30 could not be saved; make room")
    assert steps(tmp_path) == []
    trained(config, tmp_path)
    assert steps(tmp_path) == [30]


def test_a_run_that_diverges_stops_with_its_last_checkpoint_intact(folder, tmp_path):
    # Adam moves each weight by the learning rate: 1e38 a step overflows the activations at once.
    wild = {
        "train": {"max_bad_steps": 3},
        "optim": {"peak_lr": 1e38, "weight_decay": 0},
        "checkpoint": {"every_steps": 1},
    }
    error = refused_training(tiny_config(folder, **wild), tmp_path, code=1)
    assert error.startswith("error: 3 steps in a row had a loss or gradient that is not finite")
    assert "is intact" in error
    bad = [line for line in metrics(tmp_path) if line.get("train/bad_steps")]
    assert [line["train/bad_steps_in_row"] for line in bad] == [1, 2, 3]
    assert steps(tmp_path)[-1] < bad[0]["step"]  # nothing is saved while steps are bad
    assert all(line["train/loss"] is None for line in bad)
    report, output = evaluated(tmp_path, steps(tmp_path)[-1])
    assert "damaged" not in output
    # What the last step that counted made of the weights is finite, but the loss is not: null in JSON.
    assert report["loss"] is None


def test_an_evaluation_that_fails_loses_no_step(folder, tmp_path, monkeypatch):
    def fail(*_args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(evaluation, "_load", fail)
    config = tiny_config(folder, train={"num_steps": 30}, eval={"every_steps": 3, "batch_size": 16})
    error = refused_training(config, tmp_path, code=1)
    assert "out of memory while evaluating" in error and "eval.batch_size below 16" in error
    assert steps(tmp_path) == [3]


def test_evaluation_covers_the_whole_split_and_agrees_with_training(folder, finished):
    workdir, _ = finished
    before = content(workdir / "checkpoints")
    report, _ = evaluated(workdir, step=30)  # the newest
    data = open_data(tiny_config(folder).data, lambda line: None)
    assert report["tokens"] == data.validation.info.tokens - 1  # every token after the first, once
    at_30 = next(line for line in metrics(workdir) if line["step"] == 30 and "eval/loss" in line)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert report[name] == pytest.approx(at_30[f"eval/{name}"], rel=1e-6)
    assert [sum(layer["tokens_per_expert"]) for layer in report["layers"]] == [2 * report["tokens"]]  # top 2
    page, size = report["sets"]["page"], PAGE.stat().st_size
    assert (page["tokens"], page["text_bytes"]) == (size, size - 1)  # and a separator; the first byte is no target
    assert page["bits_per_byte"] == pytest.approx(page["loss"] / np.log(2) * size / (size - 1), rel=1e-6)
    for name in ("loss", "bits_per_byte"):
        assert page[name] == pytest.approx(at_30[f"eval/page/{name}"], rel=1e-6)
    assert page["loss"] > 1.1 * report["loss"]  # other words than those that it learnt
    assert content(workdir / "checkpoints") == before


def test_evaluation_prints_what_it_writes(finished):
    workdir, _ = finished
    report, output = evaluated(workdir, step=30)
    assert f"step 30, text_files, {report['tokens']:,} held-out tokens, {report['text_bytes']:,} bytes" in output
    for label, name in (("loss", "loss"), ("perplexity", "perplexity"), ("bits per byte", "bits_per_byte")):
        assert f"\n  {label:<14} {report[name]:.4f}" in output
    table = [line.split() for line in output.splitlines()]
    header = next(number for number, line in enumerate(table) if line[:1] == ["layer"])
    (layer,) = report["layers"]
    assert table[header + 1] == ["1", *(f"{layer[name]:.4g}" for name in table[header][1:])]
    assert {"load_balance_loss", "router_entropy", "max_load", "default_vector_norm"} <= {*table[header]}
    page = report["sets"]["page"]
    found = [f"{page['loss']:.4f}", f"{page['bits_per_byte']:.4f}", f"{page['tokens']:,}", f"{page['text_bytes']:,}"]
    assert ["page", *found] in table and ["set", "loss", "bits", "per", "byte", "tokens", "bytes"] in table
    [sample] = report["samples"]
    assert sample["prompt"] == "the " and sample["text"].startswith("the ")
    assert f"from the prompt 'the ':\n{sample['text']}\n" in output


def test_evaluation_of_an_older_step_and_on_another_mesh(finished):
    workdir, _ = finished

    def on_mesh(config):
        return Config.from_mapping({**config.to_dict(), "mesh": {"data": 2, "fsdp": 2, "expert": 2}})

    reports = [evaluated(workdir, 24, asked=24, **options)[0] for options in ({}, {"override": on_mesh})]
    assert reports[0]["step"] == 24
    assert reports[0]["loss"] == pytest.approx(held_out(workdir)[24], rel=1e-6)
    assert reports[0]["loss"] > 1.001 * held_out(workdir)[30]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=1e-5)


def test_other_text_and_prompts_alone_replace_no_report(finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished
    report, _ = evaluated(workdir, step=30)
    before = content(workdir / "eval")
    files = write_corpus(tmp_path / "text", seed=5)
    code, output = evaluate(
        workdir, None, lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, files=files))
    )
    assert code == 0, output
    (name,) = content(workdir / "eval").keys() - before.keys()
    other = json.loads(Path(name).read_text())
    assert name.endswith(f"/step_30_{other['corpus_hash'][:8]}.json") and name in output
    assert other["settings"]["data"]["files"] == files and "jax" in other["machine"]["versions"]
    assert report["corpus_hash"] != other["corpus_hash"] and report["loss"] != other["loss"]
    assert before.items() <= content(workdir / "eval").items()

    monkeypatch.setattr(evaluate_checkpoint, "evaluate", None)  # must not be called
    before = content(workdir / "eval")
    assert evaluate_checkpoint.run(workdir, None, ["the "], lambda config: config, prompt_only=True) == 0
    assert "from the prompt 'the ':\nthe " in capsys.readouterr().out
    assert content(workdir / "eval") == before
