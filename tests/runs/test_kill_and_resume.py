"""Runs that are killed, stopped, damaged or moved to another mesh, and continue as if nothing had happened."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import biggest_file, cut_short, flip_a_bit
from helpers.tiny_runs import (
    REPOSITORY,
    as_flags,
    assert_same_state,
    at_step,
    content,
    environment,
    metrics,
    refused_training,
    saved_state,
    steps,
    tiny_config,
    tiny_settings,
    train,
    trained,
)

LAST = 40
STOPPED_AT = 33


@pytest.fixture(scope="module")
def uninterrupted(folder):
    output = trained(tiny_config(folder), folder / "uninterrupted")
    assert "done: everything is in" in output
    assert steps(folder / "uninterrupted") == [32, 36, 40]
    return folder / "uninterrupted"


@pytest.fixture(scope="module")
def stopped(folder):
    """A run that was asked to stop with SIGTERM; tests continue copies of it. Its exit code and output too."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_step(monkeypatch, STOPPED_AT, lambda: os.kill(os.getpid(), signal.SIGTERM))
        code, output = train(tiny_config(folder), folder / "stopped")
    return folder / "stopped", code, output


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped[0], tmp_path / "copy")


def assert_equal_runs(workdir: Path, expected: Path, step: int = LAST) -> None:
    assert metrics(workdir) == metrics(expected)
    assert_same_state(workdir, expected, step)


# Interrupted in processes of their own


class Command:
    """The command that trains, started again and again in one work directory."""

    def __init__(self, folder: Path, workdir: Path):
        settings = tiny_settings(folder, checkpoint={"every_steps": 2})
        self.workdir = workdir
        self._argv = [sys.executable, str(REPOSITORY / "train.py"), f"--workdir={workdir}", *as_flags(settings)]
        # What is killed while it writes to the cache of compiled programs shall spoil no other's.
        self._env = {**environment(), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    @contextlib.contextmanager
    def started(self, lines: int) -> Iterator[subprocess.Popen]:
        """The command under way, `lines` more steps logged."""
        process = subprocess.Popen(
            self._argv, cwd=REPOSITORY, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output = ""
            while len(re.findall(rf"^step \d+/{LAST} ", output, re.MULTILINE)) < lines:
                line = process.stdout.readline()
                output += line
                assert line, f"the run ended by itself: {output}"
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def saving(self) -> bool:
        return any((self.workdir / "checkpoints").glob("*.saving"))

    def kill_while_saving(self, process: subprocess.Popen, delay: float) -> None:
        """SIGKILL some time after a save began, and surely before it ends."""
        while True:
            while not self.saving():
                assert process.poll() is None, "the run ended by itself"
                time.sleep(0.001)
            time.sleep(delay)
            process.send_signal(signal.SIGSTOP)
            if self.saving():
                return process.kill()
            process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def interrupted(folder, uninterrupted):
    """A run killed somewhere and twice during a save, then sent SIGTERM, then let be.

    Its work directory; and of the command that was sent SIGTERM the exit code, what it printed from then on, and the
    steps that were saved when it had ended.
    """
    rng = random.Random(7)
    command = Command(folder, folder / "interrupted")
    for during_save in (False, True, True):
        with command.started(lines=rng.randint(1, 3)) as process:
            if during_save:
                command.kill_while_saving(process, delay=rng.uniform(0, 0.02))
            else:
                process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert command.saving() or not during_save
    with command.started(lines=3) as process:
        process.terminate()
        after_sigterm, _ = process.communicate()
    ended = (process.returncode, after_sigterm, steps(command.workdir))
    with command.started(lines=1) as process:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    return command.workdir, ended


def test_a_run_killed_three_times_equals_one_that_was_not(interrupted, uninterrupted):
    workdir, (_, _, saved) = interrupted
    assert steps(workdir) == [36, 38, 40]
    assert_equal_runs(workdir, uninterrupted)
    starts = json.loads((workdir / "run.json").read_text())["starts"]
    begun = [each["from_step"] for each in starts]
    assert len(begun) >= 3 and begun == sorted(begun) and begun[-1] == saved[-1]
    meta = json.loads((workdir / "checkpoints" / "40" / "meta.json").read_text())
    assert meta["start"] == starts[-1]


def test_sigterm_ends_the_command_with_its_step_saved(interrupted):
    workdir, (code, output, saved) = interrupted
    assert code == 0, output
    assert "SIGTERM received: the step under way is finished and saved" in output
    assert f"the same command continues from the last checkpoint in {workdir}" in output
    last_step = re.findall(rf"^step (\d+)/{LAST} ", output, re.MULTILINE)[-1]
    assert saved[-1] == int(last_step) < LAST
    assert "Traceback" not in output


# Stopped in this process, at a step of the test's choice


def test_sigterm_finishes_and_saves_the_very_step(stopped):
    workdir, code, output = stopped
    assert code == 0
    assert "SIGTERM received" in output and f"continues from the last checkpoint in {workdir}" in output
    assert steps(workdir)[-1] == STOPPED_AT
    assert metrics(workdir)[-1]["step"] == STOPPED_AT
    assert saved_state(workdir, STOPPED_AT)["step"] == STOPPED_AT


def test_a_run_interrupted_again_goes_on_bit_for_bit(folder, copy, uninterrupted, monkeypatch):
    """At step 36 a checkpoint and an evaluation are due as well."""
    step = 36
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
    output = trained(tiny_config(folder), copy, code=130)
    assert f"continuing from step {STOPPED_AT}" in output
    assert steps(copy)[-1] == step
    monkeypatch.undo()
    assert f"continuing from step {step}" in trained(tiny_config(folder), copy)
    assert_equal_runs(copy, uninterrupted)


def test_other_kinds_of_training_go_on_bit_for_bit(folder, tmp_path, monkeypatch):
    train_fields = {"num_steps": 8, "batch_size": 16, "grad_accum_steps": 2}
    config = tiny_config(folder, train=train_fields, moe={"router": "topk"})
    trained(config, tmp_path / "whole")
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    trained(config, tmp_path / "halves")
    assert steps(tmp_path / "halves") == [4, 5]
    monkeypatch.undo()
    trained(config, tmp_path / "halves")
    assert_equal_runs(tmp_path / "halves", tmp_path / "whole", step=8)


# Damaged


@pytest.mark.parametrize("harm", [flip_a_bit, cut_short])
def test_a_damaged_checkpoint_is_stepped_over(folder, copy, uninterrupted, harm):
    harm(biggest_file(copy / "checkpoints" / str(STOPPED_AT)))
    output = trained(tiny_config(folder), copy)
    named = [line for line in output.splitlines() if f"checkpoint of step {STOPPED_AT} is damaged" in line]
    assert len(named) == 1 and biggest_file(uninterrupted / "checkpoints" / str(LAST)).parent.name in named[0]
    assert "continuing from step 32" in output
    assert_equal_runs(copy, uninterrupted)


def test_nothing_is_lost_where_every_checkpoint_is_damaged(folder, copy):
    for step in steps(copy):
        flip_a_bit(biggest_file(copy / "checkpoints" / str(step)))
    before = content(copy)
    assert "is whole" in refused_training(tiny_config(folder), copy)
    assert content(copy) == before


# Moved


def test_a_run_goes_on_on_another_mesh(folder, copy, uninterrupted):
    output = trained(tiny_config(folder, mesh={"data": 2, "fsdp": 2, "expert": 2}), copy)
    assert f"continuing from step {STOPPED_AT}" in output
    assert "mesh data 2 x fsdp 2 x expert 2" in output
    ours, theirs = metrics(copy), metrics(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("train/loss", "eval/loss"):
        values = [[line[name] for line in lines if name in line] for lines in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-4)
