"""Runs of other code: which are named, what --again does with them, and what the report says. Nothing is trained."""

import fcntl
import json
import os
from pathlib import Path

import pytest
from helpers.refusals import refused

from default_moe.compare import matrix, provenance, runs
from default_moe.config import Config, to_config_dict
from default_moe.processes.stopping import StopRequest
from default_moe.runs import trainer
from default_moe.runs.identity import RUN_FILE, mark_saved
from default_moe.runs.workdir import open_run

DEFAULT, TOPK, LAYER = (f"default_moe/{name}.py" for name in ("methods/default", "methods/topk", "moe/layer"))
STEPS = 6
ALL = ["topk/seed_0", "default/seed_0", "topk/seed_1", "default/seed_1"]


def train(config: Config, folder: Path, *_) -> int:
    """Leave what a finished run leaves, as far as it is looked at here."""
    with open_run(folder, config, corpus_hash="abc", vocab_size=257) as run:
        run.begin(0, config)
        mark_saved(folder)
        (folder / "checkpoints" / str(STEPS)).mkdir(parents=True, exist_ok=True)
        line = {"step": STEPS, "eval/loss": 1.0, "eval/bits_per_byte": 1.4, "train/tokens_per_second": 9.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line))
    return 0


@pytest.fixture
def trained(monkeypatch):
    """The folders of runs that `do_runs` has trained, none of which takes any time."""
    made = []
    monkeypatch.setattr(
        trainer, "train", lambda c, folder, *more: made.append("/".join(folder.parts[-2:])) or train(c, folder)
    )
    monkeypatch.setattr(runs, "check_causal", lambda config, label: None)
    return made


@pytest.fixture
def entries():
    base = to_config_dict(Config.from_mapping({"train": {"num_steps": STEPS}}))
    return matrix.entries(base, matrix.parse_methods(["topk", "default"]), [0, 1], [])


@pytest.fixture
def done(tmp_path, entries, trained):
    assert runs.do_runs(entries, tmp_path) == ({}, None)
    assert trained == ALL
    trained.clear()
    return tmp_path


def change(workdir: Path, folder: str, *files: str, start: int = -1, **more) -> None:
    """Make those files others in a start of a run, by what its run.json says."""
    path = workdir / "runs" / folder / RUN_FILE
    run = json.loads(path.read_text())
    code = run["code"][run["starts"][start]["code"]]
    run["code"]["other"] = {**code, **dict.fromkeys(files, "0" * 12)}
    run["starts"][start] |= {"code": "other", **more}
    path.write_text(json.dumps(run))


def forget(workdir: Path, folder: str) -> None:
    """As an earlier version wrote it."""
    path = workdir / "runs" / folder / RUN_FILE
    run = json.loads(path.read_text())
    path.write_text(json.dumps({name: run[name] for name in run if name not in ("starts", "code")}))


def named(entries, workdir: Path) -> list[str]:
    return provenance.lines(runs.provenances(entries, workdir))


def ours(workdir: Path) -> list[str]:
    """The run.json's below."""
    return sorted(str(path.parent.relative_to(workdir / "runs")) for path in workdir.rglob(RUN_FILE))


def test_runs_of_other_code_are_named_by_what_differs(done, entries):
    assert named(entries, done) == []
    for folder in ALL:
        change(done, folder, TOPK)
    what = "`--again` trains them anew"
    assert named(entries, done) == [f"2 runs were trained by other code ({TOPK}): {what} (topk/seed_0, topk/seed_1)"]
    change(done, "default/seed_1", DEFAULT, LAYER)
    forget(done, "default/seed_0")
    assert named(entries, done) == [
        f"2 runs were trained by other code ({TOPK}): {what} (topk/seed_0, topk/seed_1)",
        f"1 run was trained by unknown code: {what} (default/seed_0)",
        f"1 run was trained by other code ({DEFAULT}, {LAYER}): {what} (default/seed_1)",
    ]


def test_a_run_that_went_on_by_other_code_is_named(done, entries):
    """Only where that code has trained a part of what is left."""
    path = done / "runs" / "topk" / "seed_0" / RUN_FILE
    run = json.loads(path.read_text())
    [start] = run["starts"]
    for steps, words in ([0, 4], 1), ([0, 0], 0), ([0, STEPS], 1):
        starts = [{**start, "from_step": step} for step in steps]
        path.write_text(json.dumps({**run, "starts": starts}))
        change(done, "topk/seed_0", LAYER, start=0)
        assert len(named(entries, done)) == words, steps
    path.write_text(json.dumps({**run, "starts": [start, {**start, "from_step": STEPS}]}))
    change(done, "topk/seed_0", LAYER)
    assert named(entries, done) == []
    (path.parent / "checkpoints" / str(STEPS)).rename(path.parent / "checkpoints" / "4.saving")
    path.write_text(json.dumps(run))
    change(done, "topk/seed_0", LAYER)
    assert named(entries, done) == []  # it has nothing to go on from


def test_only_runs_of_other_code_are_trained_again_and_what_was_there_is_kept(done, entries, trained, capsys):
    change(done, "default/seed_1", LAYER, commit="v1-dirty")
    forget(done, "topk/seed_0")
    old = (done / "runs" / "default" / "seed_1" / RUN_FILE).read_text()
    assert runs.do_runs(entries, done) == ({}, None)
    output = capsys.readouterr().out
    assert trained == [] and f"1 run was trained by other code ({LAYER}): `--again` trains them anew" in output
    assert "1 run was trained by unknown code: `--again`" in output
    assert "default/seed_1: finished (6 steps)" in runs.plan(entries, done)
    again = runs.plan(entries, done, again=True)
    assert "default/seed_1: to be trained anew" in again and "default/seed_0: finished (6 steps)" in again
    assert runs.do_runs(entries[2::4], done, again=True) == ({}, None)  # another share
    assert trained == []
    assert runs.do_runs(entries, done, again=True) == ({}, None)
    assert trained == ["topk/seed_0", "default/seed_1"] and named(entries, done) == []
    assert "4 runs in" in (output := capsys.readouterr().out) and "2 of them finished before" in output
    assert ours(done) == sorted([*ALL, "topk/seed_0.before-1", "default/seed_1.before-1"])
    assert (done / "runs" / "default" / "seed_1.before-1" / RUN_FILE).read_text() == old
    assert runs.do_runs(entries, done, again=True) == ({}, None) and len(trained) == 2
    change(done, "default/seed_1", LAYER)
    assert runs.do_runs(entries, done, again=True) == ({}, None)
    assert trained[2:] == ["default/seed_1"] and "default/seed_1.before-2" in ours(done)


def test_a_crash_after_a_run_was_moved_aside_loses_nothing(done, entries, trained, monkeypatch):
    change(done, "topk/seed_0", LAYER)
    change(done, "topk/seed_1", LAYER)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        runs.do_runs(entries, done, again=True)
    assert ours(done) == sorted([*ALL[1:], "topk/seed_0.before-1"])  # the other one can still be reported
    assert runs.do_runs(entries, done) == ({}, None)  # without --again
    assert trained == ["topk/seed_0"] and len(named(entries, done)) == 1


def test_a_run_of_another_process_is_left_alone(done, entries, trained, capsys):
    change(done, "topk/seed_0", LAYER)
    change(done, "default/seed_0", LAYER)
    descriptor = os.open(done / "runs" / "topk" / "seed_0", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert runs.do_runs(entries, done, again=True) == ({}, None)
    os.close(descriptor)
    assert trained == ["default/seed_0"] and capsys.readouterr().out.count("another process trains it") == 1
    assert ours(done) == sorted([*ALL, "default/seed_0.before-1"])
    # What another one has done in the meantime is not undone.
    for gone in (entries[1], entries[0]):
        provenance.move_aside(done / "runs" / gone.folder, gone.config)
        provenance.move_aside(done / "runs" / gone.folder, gone.config)
    assert ours(done) == sorted([*ALL[1:], "default/seed_0.before-1", "topk/seed_0.before-1"])


def test_a_folder_that_cannot_be_renamed_is_named(done, entries, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    change(done, "topk/seed_0", LAYER)
    monkeypatch.setattr(Path, "rename", fail)
    with StopRequest(), refused(r"topk/seed_0 cannot be moved aside \(Permission denied\)"):
        provenance.move_aside(done / "runs" / "topk" / "seed_0", entries[0].config)


def test_commits_are_told(done, entries):
    for folder, commit in zip(ALL, ("v1", "v1-dirty", "v1", None), strict=True):
        change(done, folder, commit=commit)
    found = runs.provenances(entries, done)
    assert provenance.commits_line(found) == "Commit of the runs: v1, v1-dirty, unknown."
    change(done, "topk/seed_0", LAYER)
    forget(done, "default/seed_0")
    found = provenance.as_json(runs.provenances(entries, done))
    assert json.loads(json.dumps(found)) == {
        "topk/seed_0": {"commits": ["v1"], "other_code": [LAYER]},
        "default/seed_0": {"commits": [None], "other_code": None},
        "topk/seed_1": {"commits": ["v1"], "other_code": []},
        "default/seed_1": {"commits": [None], "other_code": []},
    }
