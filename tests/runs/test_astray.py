"""A run is not led astray by checkpoints that are not what their names say, nor by a work directory that is gone."""

import json
import os
import shutil
import time

import pytest
from helpers.checkpoints import abstract, assert_equal, latest, make_state
from helpers.refusals import refused
from helpers.tiny_runs import at_step, content, refused_training, steps, tiny_config, trained

from default_moe.config import CheckpointConfig, Config
from default_moe.errors import CheckpointError
from default_moe.files import MANIFEST, write_manifest
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.identity import RUN_FILE
from default_moe.runs.saved_run import parse_meta
from default_moe.runs.workdir import open_run
from default_moe.training.program import Program


def make_run(workdir, *saved: int, seed: int = 0, legacy: bool = False) -> None:
    """A work directory with these checkpoints. legacy: as they were before they said their step and their run."""
    config = Config.from_mapping({"train": {"seed": seed}})
    with (
        open_run(workdir, config, "text", 257) as run,
        CheckpointStore(workdir, CheckpointConfig(keep_last=9)) as store,
    ):
        meta = {"config": config.to_dict(), "corpus_hash": "text", "step": 0, "run_id": run.id}
        for step in saved:
            meta["step"] = step
            shown = {name: meta[name] for name in meta if name not in ("step", "run_id") or not legacy}
            assert store.save(step, make_state(step), shown)
    if legacy:
        run_file = json.loads((workdir / RUN_FILE).read_text())
        (workdir / RUN_FILE).write_text(json.dumps({name: run_file[name] for name in run_file if name != "run_id"}))


def rename(root, other):
    (root / "12").rename(root / "14")


def swap(root, other):
    (root / "12").rename(root / "x")
    (root / "8").rename(root / "12")
    (root / "x").rename(root / "8")


def link(root, other):
    (root / "14").symlink_to(root / "12")


def copy_under_another_name(root, other):
    shutil.copytree(root / "8", root / "1000")


def copy_of_another_run(root, other):
    shutil.rmtree(root / "12")
    shutil.copytree(other / "12", root / "12")


def list_nothing(root, other):
    (root / "12" / MANIFEST).write_text('{"files": {}}')


def list_nothing_and_hold_nothing(root, other):
    shutil.rmtree(root / "12")
    (root / "12").mkdir()
    (root / "12" / MANIFEST).write_text('{"files": {}}')


def list_no_meta(root, other):
    (root / "12" / "meta.json").unlink()
    write_manifest(root / "12")


def add_a_file(root, other):
    (root / "12" / "state" / "more").write_text("more")


def put_a_pipe(root, other):
    (root / "12" / "metrics.json").unlink()
    os.mkfifo(root / "12" / "metrics.json")


def put_a_device(root, other):
    (root / "12" / MANIFEST).unlink()
    (root / "12" / MANIFEST).symlink_to("/dev/zero")


# What is done, the step that is left to continue from, and what is said of the one that is not.
ATTACKS = {
    "renamed": (rename, 8, "step 14 is not what its name says (it is of step 12)"),
    "swapped": (swap, 4, "step 12 is not what its name says (it is of step 8)"),
    "linked": (link, 12, "step 14 is not what its name says (it is of step 12)"),
    "copied": (copy_under_another_name, 12, "step 1000 is not what its name says (it is of step 8)"),
    "of another run": (copy_of_another_run, 8, "step 12 is not what its name says (it is of another run: its run_id"),
    "nothing listed": (list_nothing, 8, "step 12 is damaged (digests.json does not list meta.json)"),
    "nothing at all": (list_nothing_and_hold_nothing, 8, "step 12 is damaged (digests.json does not list meta.json)"),
    "no meta": (list_no_meta, 8, "step 12 is damaged (digests.json does not list meta.json)"),
    "one more file": (add_a_file, 8, "step 12 is damaged (digests.json does not list state/more)"),
    "a pipe": (put_a_pipe, 8, "step 12 is damaged (metrics.json has 0 bytes"),
    "a device": (put_a_device, 8, "step 12 is damaged (digests.json cannot be read: Not a regular file)"),
}
# In earlier runs, whose checkpoints do not say whose they are.
OLD_ATTACKS = {
    "of another run": (copy_of_another_run, 8, "it is of another run: its train.seed is 1, but 0 here"),
    "nothing listed": ATTACKS["nothing listed"],
}


@pytest.mark.parametrize(
    ("legacy", "attack", "left", "words"),
    [(False, *attack) for attack in ATTACKS.values()] + [(True, *attack) for attack in OLD_ATTACKS.values()],
    ids=[*ATTACKS, *(f"earlier, {name}" for name in OLD_ATTACKS)],
)
def test_a_step_that_is_not_what_it_says_is_set_aside(tmp_path, legacy, attack, left, words):
    workdir, other = tmp_path / "run", tmp_path / "other"
    make_run(workdir, 4, 8, 12, legacy=legacy)
    make_run(other, 12, seed=1, legacy=legacy)
    attack(workdir / "checkpoints", other / "checkpoints")
    before = content(other)

    lines = []
    reader = CheckpointStore(workdir, read_only=True, report=lines.append)
    assert reader.newest_whole() == left
    assert words in lines[0] and "\n" not in lines[0]
    with CheckpointStore(workdir, report=lines.append) as store:
        state, _, step = store.restore_latest(abstract(make_state(left)))
        assert step == left
        assert_equal(state, make_state(left))
        assert any(words in line for line in lines[1:]) and "moved to" in lines[-1]
    assert store.steps()[-1] == left
    assert latest(workdir, make_state(left))[2] == left  # in silence
    assert content(other) == before


def test_a_renamed_step_of_an_earlier_run_is_refused(tmp_path):
    make_run(tmp_path, 4, 12, legacy=True)
    (tmp_path / "checkpoints" / "12").rename(tmp_path / "checkpoints" / "14")
    with refused("is of step 12: rename it", CheckpointError):
        latest(tmp_path, make_state(12))


def test_an_earlier_run_goes_on_and_gets_a_name(tmp_path):
    make_run(tmp_path, 4, legacy=True)
    with open_run(tmp_path, Config(), "text", 257) as run:
        assert run.resumed and json.loads((tmp_path / RUN_FILE).read_text())["run_id"] == run.id
    assert latest(tmp_path, make_state(4))[2] == 4


# Whole runs


@pytest.fixture(scope="module")
def config(folder):
    return tiny_config(folder, train={"num_steps": 12}, moe={"router": "topk"}, eval={"num_batches": 1})


@pytest.fixture(scope="module")
def finished(folder, config):
    trained(config, folder / "finished")
    return folder / "finished"


def remove(path):
    shutil.rmtree(path)


def put_a_file(path):
    shutil.rmtree(path)
    path.write_text("in the way")


def put_a_dangling_link(path):
    shutil.rmtree(path)
    path.symlink_to("/nowhere/at/all")


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize("loss", [remove, empty, put_a_file, put_a_dangling_link])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(config, finished, tmp_path, loss):
    workdir = shutil.copytree(finished, tmp_path / "run")
    loss(workdir / "checkpoints")
    for earlier in (False, True):
        if earlier:  # whose run.json does not say whether there were any
            run = json.loads((workdir / RUN_FILE).read_text())
            (workdir / RUN_FILE).write_text(json.dumps({name: run[name] for name in run if name != "saved"}))
        before = content(workdir)
        error = refused_training(config, workdir)
        assert "checkpoints are gone from" in error and "To begin anew, empty the directory" in error
        assert content(workdir) == before


@pytest.mark.parametrize("place", ["deleted", "moved", "replaced"])
def test_a_work_directory_that_goes_away_ends_the_run(config, finished, tmp_path, monkeypatch, place):
    workdir = tmp_path / "run"

    def act():
        if place == "deleted":  # while step 8 is being saved, as likely as not
            return shutil.rmtree(workdir, ignore_errors=True)
        while not (workdir / "checkpoints" / "8").exists():
            time.sleep(0.01)
        workdir.rename(tmp_path / "elsewhere")
        if place == "replaced":
            shutil.copytree(finished, workdir)

    at_step(monkeypatch, 9, act)
    error = refused_training(config, workdir, code=1)
    assert "was moved, deleted or replaced" in error
    monkeypatch.undo()
    if place == "replaced":
        assert steps(workdir) == steps(finished)
        shutil.rmtree(workdir)
    if place != "deleted":
        (tmp_path / "elsewhere").rename(workdir)
        assert "continuing from step 8" in trained(config, workdir)


def test_a_start_that_fails_leaves_nothing_behind(config, folder, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(Program, "new_state", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        trained(config, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_never_saved_gives_way_to_any_other(config, folder, tmp_path, monkeypatch):
    def end():
        raise KeyboardInterrupt

    at_step(monkeypatch, 3, end)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    trained(config, tmp_path, code=130)
    assert not (tmp_path / "checkpoints").exists() and (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.undo()
    with monkeypatch.context() as patch:  # nor does one that cannot begin there stand in the way
        patch.setattr(Program, "new_state", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trained(config, tmp_path)
    other = tiny_config(folder, train={"num_steps": 4, "seed": 5}, moe={"router": "topk"})
    assert "a new run" in trained(other, tmp_path)
    assert "train.seed: 5 there, 1 here" in refused_training(config, tmp_path)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, "has no 'config'"),
        ({"config": {}}, "has no 'tokenizer'"),
        ({"config": [], "tokenizer": {}}, "is \\[\\], but must be a group of settings"),
        ({"config": {"model": {"d_model": -1}}, "tokenizer": {}}, "model.d_model is -1"),
        ({"config": {}, "tokenizer": 7}, "tokenizer"),
        ({"config": {}, "tokenizer": {"kind": "evil"}}, "is of kind 'evil'"),
    ],
)
def test_a_checkpoint_with_another_meta_is_refused(tmp_path, meta, words):
    """Its digests are right: it is not damaged, but of another version, or made by somebody."""
    with CheckpointStore(tmp_path) as store:
        store.save(4, make_state(4), meta)
    with refused(words, CheckpointError):
        parse_meta(CheckpointStore(tmp_path, read_only=True).read_meta())
