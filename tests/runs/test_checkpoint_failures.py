"""Checkpoints that survive kills, full disks and unwritable places."""

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import META, latest, make_state
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from default_moe.runs.checkpoint import CheckpointStore


def test_an_unwritable_place_is_reported_and_tried_again(tmp_path):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("in the way")
    lines = []
    with CheckpointStore(tmp_path, report=lines.append) as store:
        assert not store.save(1, make_state(1), META)
        assert store.needs_retry
        assert len(lines) == 1 and "step 1 not saved" in lines[0] and "\n" not in lines[0]
        blocked.unlink()
        assert store.save(2, make_state(2), META)
        store.wait()
        assert not store.needs_retry
    assert store.steps() == [2]


@pytest.mark.parametrize("place", ["write_manifest", "sync_folder", "state"])
def test_a_failed_write_is_reported_and_tried_again(tmp_path, monkeypatch, place):
    lines = []
    with CheckpointStore(tmp_path, report=lines.append) as store, monkeypatch.context() as patch:

        def fail(*_args):
            raise OSError(28, "No space left on device", "x")

        if place == "state":
            patch.setattr(store._checkpointer, "wait_until_finished", fail)
        else:
            patch.setattr(f"default_moe.runs.checkpoint.{place}", fail)
        assert store.save(1, make_state(1), META) == (place != "state")
        store.wait()
        assert store.needs_retry
        assert lines == [
            "checkpoint of step 1 not saved (No space left on device: x): training continues, the save is retried"
        ]
        patch.undo()
        store.save(2, make_state(2), META)
    assert 2 in store.steps() and not store.needs_retry
    assert latest(tmp_path, make_state(2))[2] == 2


def test_what_a_failed_save_still_writes_is_in_no_ones_way(tmp_path, monkeypatch):
    """Threads of TensorStore write on, into a folder that was removed, or that is about to be."""
    with CheckpointStore(tmp_path, report=lambda line: None) as store, monkeypatch.context() as patch:
        patch.setattr(store._checkpointer, "wait_until_finished", lambda: 1 / 0)
        patch.setattr("default_moe.runs.checkpoint.io_failure", lambda error: "no space")
        store.save(1, make_state(1), META)
        store.wait()
        assert store.needs_retry
        patch.setattr(store._folders, "remove_debris", lambda: None)
        (tmp_path / "checkpoints" / "1.saving" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
        store.save(1, make_state(1), META)
        store.wait()
        assert not store.needs_retry and store.steps() == [1]
        patch.undo()
        store.save(2, make_state(2), META)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_nothing_waits_for_a_folder_that_could_not_be_made(tmp_path, monkeypatch):
    """Orbax's threads would for five minutes, as would the end of the process for them."""

    async def fail(_path):
        raise OSError(28, "No space left on device", "x")

    before = set(threading.enumerate())
    with CheckpointStore(tmp_path, report=lambda line: None) as store, monkeypatch.context() as patch:
        patch.setattr(AtomicRenameTemporaryPath, "create", fail)
        store.save(1, make_state(1), META)
        store.wait()
        assert store.needs_retry
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    "error",
    [
        ValueError("NOT_FOUND: Error reading local file"),
        ValueError("DATA_LOSS: checksum\nof a page of text"),
        RuntimeError("ABORTED: Generation mismatch"),
    ],
)
def test_a_disk_has_many_words_for_a_failure(tmp_path, monkeypatch, error):
    lines = []
    with CheckpointStore(tmp_path, report=lines.append) as store:

        def fail():
            raise error

        monkeypatch.setattr(store._checkpointer, "wait_until_finished", fail)
        assert not store.save(1, make_state(1), META)  # Orbax itself waits for a save before
        assert store.needs_retry
        words = str(error).partition("\n")[0]
        assert lines == [f"checkpoint of step 1 not saved ({words}): training continues, the save is retried"]
        assert store.save(1, make_state(1), META)
    assert latest(tmp_path, make_state(1))[2] == 1


def test_mistakes_in_the_program_are_raised(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(TypeError, match="JSON"):
            store.save(1, make_state(1), {"config": object()})
        with monkeypatch.context() as patch:
            patch.setattr("default_moe.runs.checkpoint.write_manifest", lambda folder: 1 / 0)
            store.save(1, make_state(1), META)
            with pytest.raises(ZeroDivisionError):
                store.wait()
        assert store.save(2, make_state(2), META)
    assert store.steps() == [2]
    assert not list((tmp_path / "checkpoints").glob("*.saving"))


def run_child(code: str, workdir: Path, *arguments: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", textwrap.dedent(code), str(workdir), *arguments]
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, **pipes)


def test_a_full_disk_does_not_end_the_run(tmp_path):
    """RLIMIT_FSIZE makes writes fail with EFBIG inside TensorStore, in Orbax's background threads.

    By its size another file is the first to fail: Orbax remembers some of these failures, and prints others.
    """
    limits = (0, 100, 300, 1_000, 5_000, 100_000)
    code = """
        import resource, sys
        import jax.numpy as jnp, numpy as np
        from default_moe.runs.checkpoint import CheckpointStore
        state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=500_000).astype(np.float32))}
        state |= {str(number): jnp.full(3, number) for number in range(20)}
        with CheckpointStore(sys.argv[1]) as store:
            store.save(1, state, {})
            store.wait()
            for step, limit in enumerate(map(int, sys.argv[2:]), 2):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                store.save(step, state, {})
                store.wait()
                failed = store.needs_retry
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                store.save(step, state, {})
                store.wait()
                print(failed, store.needs_retry, *sorted(path.name for path in store._folders.root.iterdir()))
    """
    child = run_child(code, tmp_path, *map(str, limits))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    last = 1 + len(limits)
    saved = [sorted((str(step - 1), str(step))) for step in range(2, last + 1)]
    assert out.splitlines() == [" ".join(["True", "False", *names]) for names in saved]
    assert err == "".join(
        f"checkpoint of step {step} not saved (File too large): training continues, the save is retried\n"
        for step in range(2, last + 1)
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


SAVE_FOREVER = """
    import sys
    import jax, jax.numpy as jnp
    from default_moe.runs.checkpoint import CheckpointStore
    from default_moe.config import CheckpointConfig
    make = lambda step: {"x": jax.random.normal(jax.random.key(step), (300_000,)), "step": jnp.int32(step)}
    with CheckpointStore(sys.argv[1], CheckpointConfig(keep_last=1)) as store:
        restored = store.restore_latest(jax.eval_shape(lambda: make(0)))
        step = restored[2] if restored else 0
        if restored:
            assert (restored[0]["x"] == make(step)["x"]).all() and restored[0]["step"] == step
        while True:
            step += 1
            store.save(step, make(step), {"step": step}, {"eval/loss": float(step)} if step % 3 == 0 else None)
            print("saving", flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_newest_step_whole(tmp_path):
    rng = random.Random(1)
    root = tmp_path / "checkpoints"
    wanted = {"x": jax.ShapeDtypeStruct((300_000,), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    debris = 0
    last = 0
    for _ in range(6):
        child = run_child(SAVE_FOREVER, tmp_path)
        for _ in range(3):  # when the third save has begun, the second is whole
            assert child.stdout.readline() == "saving\n", child.stderr.read()
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        _, err = child.communicate()
        assert err == ""  # no step was ever damaged, so there was nothing to report, and nothing else speaks
        steps = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
        debris += len(list(root.iterdir())) - len(steps)
        lines = []
        restored, meta, step = CheckpointStore(tmp_path, read_only=True, report=lines.append).restore_for_eval(wanted)
        assert not lines
        assert step == meta["step"] == restored["step"] == max(steps)
        np.testing.assert_array_equal(restored["x"], jax.random.normal(jax.random.key(step), (300_000,)))
        assert step >= last + 2
        last = step
    assert debris > 0  # some of the kills hit a save


def test_a_terminal_stays_quiet(tmp_path):
    code = """
        import sys, jax.numpy as jnp
        from default_moe.runs.checkpoint import CheckpointStore
        with CheckpointStore(sys.argv[1]) as store:
            for step in (1, 2, 3, 4):
                store.save(step, {"params": {"x": jnp.ones(5)}, "opt": jnp.ones(5)}, {})
        CheckpointStore(sys.argv[1]).restore_latest({"params": {"x": jnp.ones(5)}, "opt": jnp.ones(5)})
        CheckpointStore(sys.argv[1], read_only=True).restore_for_eval({"params": {"x": jnp.ones(5)}})
    """
    out, err = run_child(code, tmp_path).communicate(timeout=60)
    assert (out, err) == ("", "")
