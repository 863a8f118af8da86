"""Whole comparisons: their runs, what stops them, and the command from end to end."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
from threading import current_thread, main_thread

import jax
import numpy as np
import pytest
from helpers.refusals import refused
from helpers.tiny_runs import (
    REPOSITORY,
    as_flags,
    at_step,
    content,
    environment,
    metrics,
    run_commands,
    saved_state,
    tiny_settings,
    train,
)

from default_moe.compare import matrix, runs
from default_moe.compare.compute import training_flops_per_token
from default_moe.compare.runs import Programs
from default_moe.config import Config, default_config, to_config_dict
from default_moe.errors import ConfigError, Diverged
from default_moe.runs import trainer
from default_moe.training.program import Program

COMPARE = "default_moe/compare/__main__.py"
TWO = matrix.parse_methods(["topk", "default"])


def settings(folder, **sections):
    model = {"num_layers": 1, "num_dense_layers": 0}  # a dense layer would take a third of the time, and tell nothing
    sections = {"model": model, "train": {"num_steps": 6}, "eval": {"every_steps": 2, "num_batches": 1}, **sections}
    return tiny_settings(folder, **sections)


def entries_for(folder, methods=("topk", "default"), seeds=(0, 1), sets=(), **sections):
    base = to_config_dict(Config.from_mapping(settings(folder, **sections)))
    return matrix.entries(base, matrix.parse_methods(methods), seeds, matrix.parse_sets(sets))


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Comparisons that are made in this process trace and compile the same program once."""
    programs = Programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Programs", lambda: programs)
        yield


@pytest.fixture(scope="module")
def done(folder):
    """A comparison that was made in one go, in this process."""
    entries = entries_for(folder)
    assert runs.do_runs(entries, folder / "done") == ({}, None)
    return folder / "done"


def test_methods_start_from_the_same_weights_see_the_same_text_and_are_compiled_once(folder, monkeypatch):
    seen, first, compiled = {}, {}, []

    def train(config, workdir, make_program, stop):
        program = make_program(config, 257)
        first[config.moe.method.name, config.train.seed] = program.new_state().params
        return trainer_train(config, workdir, make_program, stop)

    def put_batch(self, load, size):
        batch = program_put_batch(self, load, size)
        key = self.config.moe.method.name, self.config.train.seed
        if current_thread() is not main_thread():  # batches of training are read ahead, those of evaluation are not
            seen.setdefault(key, []).append(np.asarray(batch["inputs"]).tobytes())
        return batch

    def compile_train_step(self, row):
        compiled.append(program_compile(self, row))
        return compiled[-1]

    trainer_train, program_put_batch, program_compile = trainer.train, Program.put_batch, Program.compile_train_step
    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(Program, "put_batch", put_batch)
    monkeypatch.setattr(Program, "compile_train_step", compile_train_step)
    entries = entries_for(
        folder, methods=("topk", "default", "loss_free"), seeds=(0, 3), eval={"every_steps": 6, "num_batches": 1}
    )
    runs.do_runs(entries, folder / "watched")
    for method in ("default", "loss_free"):
        for seed in (0, 3):
            jax.tree.map(np.testing.assert_array_equal, first[method, seed], first["topk", seed])
            assert seen[method, seed][:6] == seen["topk", seed][:6]  # more may have been read ahead
    assert len(compiled) == 6 and len({id(step) for step in compiled}) == 3
    assert len(set(seen["topk", 0][:6])) == 6 and seen["topk", 0][:6] != seen["topk", 3][:6]


def test_a_run_of_a_comparison_is_the_run_that_train_makes(folder, done):
    config = next(e.config for e in entries_for(folder) if e.folder == "default/seed_1")
    assert train(config, folder / "alone")[0] == 0
    ours, theirs = saved_state(done / "runs" / "default" / "seed_1", 6), saved_state(folder / "alone", 6)
    assert {name: array.tobytes() for name, array in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}


@pytest.mark.parametrize("seed", [7, 2**32 - 1])
def test_a_program_with_another_seed_is_that_of_this_seed(folder, seed):
    config = Config.from_mapping(settings(folder, train={"num_steps": 6, "seed": seed}))
    other = Config.from_mapping(settings(folder, train={"num_steps": 6, "seed": 12}))
    programs = Programs()
    ours = [programs(other, 257), programs(config, 257)][1]
    assert ours.config == config
    expected = jax.random.key_data(jax.random.split(jax.random.key(seed))[1])
    np.testing.assert_array_equal(jax.random.key_data(ours.new_state().rng), expected)


def test_of_many_programs_the_first_are_kept(folder, monkeypatch):
    monkeypatch.setattr(Programs, "_KEPT", 2)
    programs = Programs()

    def steps(seed):
        """What the programs of three runs compile, one after the other."""
        for peak_lr in (1e-3, 2e-3, 3e-3):
            config = settings(folder, train={"num_steps": 6, "seed": seed}, optim={"peak_lr": peak_lr})
            program = programs(Config.from_mapping(config), 257)
            assert (program.config.train.seed, program.config.optim.peak_lr) == (seed, peak_lr)
            yield program.train_step

    (one, two, three), (first, second, third) = list(steps(0)), list(steps(1))
    assert first is one and second is two and third is not three


def test_what_is_done_is_not_done_again_and_what_is_new_is_added(folder, done, monkeypatch):
    before = content(done)
    began = []
    train = trainer.train
    monkeypatch.setattr(
        trainer, "train", lambda c, w, *more: began.append(str(w.relative_to(done))) or train(c, w, *more)
    )
    assert runs.do_runs(entries_for(folder), done) == ({}, None)
    assert began == [] and content(done) == before
    assert runs.do_runs(entries_for(folder, methods=("topk", "dense")), done) == ({}, None)
    assert began == ["runs/dense/seed_0", "runs/dense/seed_1"]
    assert content(done / "runs" / "topk") == {k: v for k, v in before.items() if f"{done / 'runs' / 'topk'}/" in k}


@pytest.mark.parametrize("step", [4, 6])
def test_a_comparison_that_was_interrupted_goes_on(folder, done, monkeypatch, step):
    """Ctrl-C in the second run's fourth or last step: the same command does the rest, to the same end."""
    calls, stopped, entries = [], folder / f"stopped_in_{step}", entries_for(folder)[:3]
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: calls.append(1) or (len(calls) == 2 and os.kill(os.getpid(), signal.SIGINT)))
        assert runs.do_runs(entries, stopped) == ({}, 130)
    assert len(calls) == 2
    assert sorted(str(path.relative_to(stopped)) for path in stopped.glob("runs/*/*")) == [
        "runs/default/seed_0",
        "runs/topk/seed_0",
    ]
    assert runs.do_runs(entries, stopped) == ({}, None)
    for entry in entries:
        assert metrics(stopped / "runs" / entry.folder) == metrics(done / "runs" / entry.folder)
        assert runs.read_result(entry, stopped).held_out == runs.read_result(entry, done).held_out


def test_a_run_of_another_process_is_left_to_it(folder, done, capsys):
    """A lock that the other one holds while it lives: the run is skipped, the others are not."""
    entries, place = entries_for(folder), folder / "shared"
    shutil.copytree(done, place)
    mine = place / "runs" / entries[0].folder
    shutil.rmtree(mine)
    mine.mkdir()
    lock = os.open(mine, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert runs.do_runs(entries, place) == ({}, None)
    os.close(lock)
    assert "another process trains it" in capsys.readouterr().out
    assert [runs.finished(entry, place) for entry in entries] == [False, True, True, True]
    *lines, last = runs.plan(entries, place)
    assert lines[0] == "topk/seed_0: not begun" and lines[1] == "default/seed_0: finished (6 steps)"
    assert last.startswith("4 runs; about 1 minute of training left")


def test_the_time_that_is_left_goes_by_what_runs_compute(tmp_path, monkeypatch, capsys):
    """The first takes a minute, the second trains for ten times as many steps."""
    sets = matrix.parse_sets(["train.num_steps=200,2000"])
    entries = matrix.entries(default_config(), matrix.parse_methods(["topk"]), [0], sets)
    clock = [0.0]
    monkeypatch.setattr(runs, "check_causal", lambda *_: None)
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runs.trainer, "train", lambda *_: clock.append(clock.pop() + 60))
    assert runs.do_runs(entries, tmp_path) == ({}, None)
    assert re.findall(r"run 2 of 2: .* \((.*) for all that is left\)", capsys.readouterr().out) == ["10 minutes"]


def test_runs_on_text_that_has_changed_are_not_compared(folder, tmp_path):
    shutil.copytree(folder / "text", tmp_path / "text")
    base = to_config_dict(Config.from_mapping(settings(tmp_path)))
    entries = matrix.entries(base, matrix.parse_methods(["topk", "loss_free"]), [0], [])
    assert runs.do_runs(entries[:1], tmp_path / "changing") == ({}, None)
    (tmp_path / "text" / "more.txt").write_text("the birds fly over the cold river\n" * 50)
    with pytest.raises(ConfigError, match=r"seed_0 and loss_free/seed_0 .* were trained on different text"):
        runs.do_runs(entries, tmp_path / "changing")


def test_a_loss_that_is_not_finite_is_a_failure(folder, done):
    entry, lines = (
        entries_for(folder)[0],
        (done / "runs" / "topk" / "seed_0" / "metrics.jsonl").read_text().splitlines(),
    )
    broken = [json.loads(line) for line in lines]
    next(line for line in broken if "eval/loss" in line)["eval/loss"] = None
    with pytest.raises(Diverged, match="the held-out loss of step 2 is not finite"):
        runs._result(broken, entry.config, 257)


def test_other_settings_are_refused_before_anything_is_trained(folder, done):
    base = to_config_dict(Config.from_mapping(settings(folder, optim={"peak_lr": 0.5})))
    before = content(done)
    with pytest.raises(ConfigError, match=r"seed_0 holds a run with other settings \(optim.peak_lr: 0.003 there, 0.5"):
        runs.do_runs(matrix.entries(base, TWO, [0], []), done)
    assert content(done) == before


def test_a_source_that_is_spelt_otherwise_is_no_other_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def entry(init_from):
        config = Config.from_mapping({**settings(tmp_path), "init_from": init_from})
        return matrix.entries(to_config_dict(config), TWO, [0], [])[0]

    begun, again, other = map(entry, ("a", str(tmp_path / "a"), "b"))
    run = tmp_path / "runs" / begun.folder / "run.json"
    run.parent.mkdir(parents=True)
    text = {"corpus_hash": "abc", "vocab_size": 257, "tokenizer_hash": None}
    run.write_text(json.dumps({"config": begun.config.to_dict(), **text}))
    runs.check_runs([again], tmp_path)
    with pytest.raises(ConfigError, match="init_from: a there, b here"):
        runs.check_runs([other], tmp_path)


def test_a_run_file_that_is_none_of_ours_is_named(tmp_path):
    [entry] = entries_for(tmp_path, seeds=[0])[:1]
    run = tmp_path / "runs" / entry.folder / "run.json"
    run.parent.mkdir(parents=True)
    config = json.dumps(entry.config.to_dict())
    for text, words in (
        ("{", "it is not JSON"),
        ("{}", "it has no config, corpus_hash, vocab_size, tokenizer_hash"),
        (f'{{"config": {config}, "corpus_hash": "abc", "vocab_size": 257}}', "it has no tokenizer_hash"),
    ):
        run.write_text(text)
        with refused(rf"topk/seed_0/run.json cannot be read \({words}.*choose another --workdir"):
            runs.check_runs([entry], tmp_path)


def test_the_other_runs_go_on_when_one_diverges(folder, monkeypatch):
    def train(config, workdir, make_program, stop):
        if config.moe.method.name == "default" and config.train.seed == 0:
            raise Diverged("10 steps in a row")
        return trainer_train(config, workdir, make_program, stop)

    trainer_train = trainer.train
    monkeypatch.setattr(trainer, "train", train)
    failures, code = runs.do_runs(entries_for(folder)[1:3], folder / "diverged")
    assert (failures, code) == ({"default/seed_0": "10 steps in a row"}, None)
    assert (folder / "diverged" / "runs" / "topk" / "seed_1" / "checkpoints" / "6").is_dir()


def test_figures_of_a_run_are_those_it_logged(folder, done):
    entry = entries_for(folder)[0]
    found = runs.read_result(entry, done)
    logged = metrics(done / "runs" / entry.folder)
    assert found.held_out.tokens == (2 * 256, 4 * 256, 6 * 256)  # 8 sequences of 32
    assert found.held_out.loss == tuple(line["eval/loss"] for line in logged if "eval/loss" in line)
    assert found.training.tokens == tuple(256 * step for step in range(1, 7))
    last_quarter = [line["train/max_load"] for line in logged if line["step"] > 4.5 and "train/max_load" in line]
    assert len(last_quarter) == 2 and found.max_load == pytest.approx(np.mean(last_quarter))
    experts = np.mean([line["train/experts_per_token"] for line in logged if "train/experts_per_token" in line])
    assert found.flops_per_token == training_flops_per_token(entry.config, 257, experts) and experts == 2
    assert found.flops == 6 * 256 * found.flops_per_token
    assert found.bits_per_byte == pytest.approx(found.held_out.final / math.log(2), rel=0.01)  # a byte is a token
    (done / "runs" / "topk" / "seed_1" / "metrics.jsonl").rename(done / "away")
    try:
        with pytest.raises(ConfigError, match=r"seed_1/metrics.jsonl does not hold .* remove"):
            runs.read_result(entries_for(folder)[2], done)
    finally:
        (done / "away").rename(done / "runs" / "topk" / "seed_1" / "metrics.jsonl")


# A driver may end the process at the second run that it makes.
CRASHING = f"""
import os, runpy, signal
from default_moe.runs import trainer

train, made = trainer.train, []

def crash_at_the_second(config, workdir, make_program, stop):
    made.append(workdir)
    if len(made) == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return train(config, workdir, make_program, stop)

trainer.train = crash_at_the_second
runpy.run_path({str(REPOSITORY / COMPARE)!r}, run_name="__main__")
"""


# As if a method's file had been edited since its run was trained.
EDITING = """
import json, pathlib, sys

[workdir] = [flag.partition("=")[2] for flag in sys.argv if flag.startswith("--workdir=")]
path = pathlib.Path(workdir, "runs", "default", "seed_0", "run.json")
run = json.loads(path.read_text())
run["code"][run["starts"][-1]["code"]]["default_moe/methods/default.py"] = "0" * 12
path.write_text(json.dumps(run))
"""


def test_the_command_from_end_to_end_and_bad_input(folder):
    """The first command crashes on its way, and goes on in another process."""
    (folder / "crashing.py").write_text(CRASHING)
    (folder / "editing.py").write_text(EDITING)
    flags = [*as_flags(settings(folder)), "--config.data.prefetch=0"]
    commands = {
        "whole": [f"--workdir={folder / 'whole'}", "--seeds=0", "--set", "moe.top_k=2"],
        "more to do": [f"--workdir={folder / 'whole'}", "--seeds=0,1", "--set", "moe.top_k=2", "--dry_run"],
        "half": [f"--workdir={folder / 'whole'}", "--seeds=0,1", "--set", "moe.top_k=2", "--report"],
        "again": [f"--workdir={folder / 'whole'}", "--seeds=0", "--set", "moe.top_k=2"],
        "edited": [f"--workdir={folder / 'whole'}"],
        "stale": [f"--workdir={folder / 'whole'}", "--seeds=0", "--set", "moe.top_k=2", "--report"],
        "anew": [f"--workdir={folder / 'whole'}", "--seeds=0", "--set", "moe.top_k=2", "--again"],
        "nothing": [f"--workdir={folder / 'none'}", "--report"],
        "trains nothing": ["--report", "--again", f"--workdir={folder / 'none'}"],
        "a bad share": ["--shard=2/2", f"--workdir={folder / 'none'}"],
        "an unknown method": ["--methods=topk,defualt", f"--workdir={folder / 'none'}"],
        "one method": ["--methods=topk", f"--workdir={folder / 'none'}"],
        "bad seeds": ["--seeds=0,0", f"--workdir={folder / 'none'}"],
        "a run's directory": [f"--workdir={folder / 'whole' / 'runs' / 'topk' / 'seed_0'}"],
    }
    env = environment()
    programs = {"whole": str(folder / "crashing.py"), "edited": str(folder / "editing.py")}
    arguments = [[programs.get(name, COMPARE), *flags, *more] for name, more in commands.items()]
    outcomes = dict(zip(commands, run_commands(arguments, REPOSITORY, env), strict=True))
    assert outcomes["whole"][0] == 0, outcomes["whole"]
    assert outcomes["whole"][2].count("the process was ended by SIGSEGV: another goes on") == 1
    assert outcomes["whole"][1].count(", a new run") == 2
    written = json.loads((folder / "whole" / "report.json").read_text())
    assert [task["settings"] for task in written["tasks"]] == [{"moe.top_k": 2}]
    rows = written["tasks"][0]["rows"]
    assert [row["name"] for row in rows] == ["topk", "default"]
    assert len(rows[1]["results"]["0"]["held_out"]["loss"]) == 3
    text = (folder / "whole" / "report.md").read_text()
    whole, again = (
        outcomes[name][1].partition("# Comparison")[2].partition("written to")[0] for name in ("whole", "again")
    )
    assert text in outcomes["anew"][1] and len(whole) > 1000 and whole == again
    line = "1 run was trained by other code (default_moe/methods/default.py): "
    assert f"**{line}`--again` trains them anew (default/seed_0).**" in outcomes["stale"][1]
    assert "Commit of the runs: " in text and "other code" not in text
    assert f"{line}they are trained anew" in outcomes["anew"][1] and outcomes["anew"][1].count(", a new run") == 1
    code = {"commits": [json.loads((folder / "whole/runs/topk/seed_0/run.json").read_text())["starts"][0]["commit"]]}
    assert written["code"] == {key: {**code, "other_code": []} for key in ("topk/seed_0", "default/seed_0")}
    assert (folder / "whole" / "runs" / "default" / "seed_0.before-1" / "checkpoints" / "6").is_dir()
    assert (folder / "whole" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "2 runs in" in outcomes["again"][1] and "2 of them finished before" in outcomes["again"][1]
    assert "topk/seed_1: not begun" in outcomes["more to do"][1]
    code, output, _ = outcomes["half"]
    assert code == 0 and "2 runs are not finished: topk/seed_1" in output
    assert "- not finished, and left out: default/seed_1" in output
    assert outcomes["nothing"][0] == 0 and "nothing to report yet: no run of topk" in outcomes["nothing"][1]
    errors = {
        "trains nothing": "--again trains runs anew, but --report trains nothing",
        "a bad share": "--shard is '2/2'",
        "an unknown method": "--methods has 'defualt', but there are default, default_sampled, default_threshold,",
        "one method": "which has nothing to compare with",
        "bad seeds": "--seeds is '0,0', but must be different whole numbers",
        "a run's directory": "is the work directory of a run",
    }
    for name, words in errors.items():
        code, _, error = outcomes[name]
        assert code == 2 and error.count("\n") == 1 and words in error, (name, error)
    assert not (folder / "none").exists()
