"""Checkpoints: exact round trips, retention, damage found and stepped over."""

import json
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import (
    META,
    State,
    abstract,
    assert_equal,
    biggest_file,
    cut_short,
    flip_a_bit,
    latest,
    make_mesh,
    make_state,
    save_steps,
    shardings,
)
from helpers.refusals import refused
from helpers.tiny_runs import content
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from default_moe import files
from default_moe.config import CheckpointConfig
from default_moe.errors import CheckpointError
from default_moe.files import MANIFEST, write_manifest
from default_moe.runs import step_folders
from default_moe.runs.checkpoint import CheckpointStore


def test_round_trip_is_exact(tmp_path):
    state = make_state(3)
    with CheckpointStore(tmp_path) as store:
        assert store.restore_latest(abstract(state)) is None
        assert store.save(3, state, META, {"eval/loss": 1.5})
        assert not store.save(3, state, META)
    assert CheckpointStore(tmp_path, read_only=True).read_meta() == META
    with CheckpointStore(tmp_path) as store:
        restored, meta, step = store.restore_latest(abstract(state))
        assert not store.save(3, state, META)
    assert_equal(restored, state)
    assert (meta, step) == (META, 3)
    assert jax.random.normal(restored.rng) == jax.random.normal(state.rng)


def test_other_meshes_get_the_same_values(tmp_path):
    state = make_state(1)
    mesh = make_mesh(2, 2, 2)
    with CheckpointStore(tmp_path) as store:
        store.save(1, jax.device_put(state, shardings(mesh, state)), META)
    for shape in ((8, 1, 1), (1, 2, 4), None):
        wanted = abstract(state, shardings(make_mesh(*shape), state) if shape else None)
        restored, _, _ = CheckpointStore(tmp_path).restore_latest(wanted)
        assert_equal(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)


def test_copies_of_large_arrays_are_written_in_parts_and_those_of_small_ones_by_one_device(tmp_path):
    everywhere = NamedSharding(make_mesh(8, 1, 1), P())
    shapes = {"small": (8, 2**17), "large": (8, 2**18)}  # an eighth of the large one is 1 MiB
    state = {name: jax.device_put(jnp.arange(8.0 * s[1]).reshape(s), everywhere) for name, s in shapes.items()}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, META)
    written = json.loads((tmp_path / "checkpoints" / "1" / "state" / "array_metadatas" / "process_0").read_text())
    arrays = [array["array_metadata"] for array in written["array_metadatas"]]
    assert {a["param_name"]: a["write_shape"] for a in arrays} == {"small": [8, 2**17], "large": [1, 2**18]}
    assert_equal(latest(tmp_path, state)[0], state)


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    """A buffer that is overwritten while the background thread writes must not reach the disk."""
    values = jnp.arange(1_000_000, dtype=jnp.float32)
    expected = np.array(values)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": values}, META)
        overwrite(values).block_until_ready()
    np.testing.assert_array_equal(latest(tmp_path, {"x": expected})[0]["x"], expected)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 4.0}, [2, 4, 5]),  # the best is an old one
        ({1: 3.0, 2: 2.0, 3: 2.5, 4: 1.5, 5: 1.0}, [4, 5]),  # the best is the newest
        ({1: None, 2: 2.0, 3: None, 4: None, 5: None}, [2, 4, 5]),  # most steps were not evaluated
        ({1: None, 2: None, 3: None, 4: None, 5: None}, [4, 5]),
        ({1: float("nan"), 2: 3.0, 3: float("inf"), 4: None, 5: None}, [2, 4, 5]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, losses, kept):
    for steps in ([1, 2, 3], [4, 5]):  # the second store reads the metrics that the first one wrote
        with CheckpointStore(tmp_path, CheckpointConfig(keep_last=2)) as store:
            for step in steps:
                metrics = None if losses[step] is None else {"eval/loss": losses[step]}
                store.save(step, {"x": jnp.ones(3)}, META, metrics)
    assert store.steps() == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [str(step) for step in kept]


def test_the_best_is_that_of_evaluations_alike(tmp_path):
    """The loss over fewer batches may be lower by chance, for ever."""
    losses = {1: (2.0, 100), 2: (1.0, 100), 3: (3.0, 800), 4: (2.5, 800), 5: (2.6, 800), 6: (2.7, 800)}
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=1)) as store:
        for step, (loss, tokens) in losses.items():
            store.save(step, {"x": jnp.ones(3)}, META, {"eval/loss": loss, "eval/tokens": tokens})
            store.wait()
            assert store.steps() == {1: [1], 2: [2], 3: [3], 4: [4], 5: [4, 5], 6: [4, 6]}[step]


DAMAGES = {
    "flipped bit": (lambda folder: flip_a_bit(biggest_file(folder)), "SHA-256 differs"),
    "truncated": (lambda folder: cut_short(biggest_file(folder)), "bytes, not the"),
    "file missing": (lambda folder: biggest_file(folder).unlink(), "is missing"),
    "meta missing": (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "digests.json, written last, is missing"),
    "not JSON": (lambda folder: (folder / MANIFEST).write_bytes(b"\x00\xff" * 30), "digests.json is not readable"),
    "of another kind": (lambda folder: (folder / MANIFEST).write_text("[1]"), "digests.json is not readable"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_step_is_named_and_the_one_before_is_used(tmp_path, damage, words):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoints" / "3")

    lines, before = [], content(tmp_path)
    fields = {"params": make_state(2).params, "variables": make_state(2).variables}
    reader = CheckpointStore(tmp_path, read_only=True, report=lines.append)
    restored, _, step = reader.restore_for_eval(abstract(fields))
    assert step == 2
    assert_equal(restored, fields)
    assert len(lines) == 1 and "step 3 is damaged" in lines[0] and words in lines[0] and "\n" not in lines[0]
    assert content(tmp_path) == before

    lines = []
    with CheckpointStore(tmp_path, report=lines.append) as store:
        restored, _, step = store.restore_latest(abstract(make_state(2)))
        assert step == 2
        assert_equal(restored, make_state(2))
        assert "step 3 is damaged" in lines[0] and words in lines[0]
        assert (tmp_path / "checkpoints_damaged" / "3").is_dir()
        assert store.save(3, make_state(3), META)
    assert latest(tmp_path, make_state(3))[2] == 3


def test_any_flipped_bit_in_any_file_is_noticed(tmp_path):
    save_steps(tmp_path, 1, 2)
    rng = random.Random(0)
    files = [path for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        original = path.read_bytes()
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        lines = []
        reader = CheckpointStore(tmp_path, read_only=True, report=lines.append)
        assert reader.restore_for_eval(abstract({"params": make_state(1).params}))[2] == 1
        assert len(lines) == 1, path
        path.write_bytes(original)


def test_a_damaged_step_is_saved_again_and_moved_to_a_name_of_its_own(tmp_path):
    lines = []
    save_steps(tmp_path, 5)
    for _ in range(2):
        flip_a_bit(biggest_file(tmp_path / "checkpoints" / "5"))
        with CheckpointStore(tmp_path, report=lines.append) as store:
            assert store.save(5, make_state(5), META)
        assert store.restore_latest(abstract(make_state(5)))[2] == 5
    assert sorted(path.name for path in (tmp_path / "checkpoints_damaged").iterdir()) == ["5", "5.1"]


def test_no_whole_step_is_an_error_and_nothing_moves(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in "12":
        flip_a_bit(biggest_file(tmp_path / "checkpoints" / step))
    lines = []
    store = CheckpointStore(tmp_path, report=lines.append)
    for _ in range(2):  # a second start must not mistake the directory for a new one
        with refused(r"no checkpoint in .* is whole", CheckpointError):
            store.restore_latest(abstract(make_state(1)))
    assert store.steps() == [1, 2]
    with refused("is whole", CheckpointError):
        store.restore_for_eval(abstract({"params": make_state(1).params}))


def test_evaluation_reads_only_its_fields(tmp_path):
    """With the optimizer's arrays gone from the disk (and from the digests), params and variables still load."""
    big = {"mu": jax.random.normal(jax.random.key(0), (512, 1024))}
    state = State(**{**vars(make_state(4)), "opt_state": big})
    with CheckpointStore(tmp_path) as store:
        store.save(4, state, META)
    folder = tmp_path / "checkpoints" / "4"
    moments = biggest_file(folder)
    assert moments.stat().st_size > 1_000_000  # 512 * 1024 random floats, and all the rest is small
    moments.unlink()
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    before = content(tmp_path)

    fields = {"params": state.params, "variables": state.variables}
    with CheckpointStore(tmp_path, read_only=True) as reader:
        restored, meta, step = reader.restore_for_eval(abstract(fields), step=4)
        assert_equal(reader.restore_for_eval(abstract(fields, NamedSharding(make_mesh(2, 2, 2), P())))[0], fields)
        with pytest.raises(ValueError, match="read-only"):
            reader.save(5, state, META)
    assert_equal(restored, fields)
    assert (meta, step) == (META, 4)
    assert content(tmp_path) == before


def test_what_is_not_there(tmp_path):
    nowhere = CheckpointStore(tmp_path / "nowhere", read_only=True)
    empty = CheckpointStore(tmp_path, read_only=True)
    wanted = abstract({"params": make_state(1).params})
    for ask in (lambda s: s.restore_for_eval(wanted), lambda s: s.restore_for_eval(wanted, 3), lambda s: s.read_meta()):
        with refused(r"there is no work directory .*nowhere", CheckpointError):
            ask(nowhere)
        with refused("there is no checkpoint in", CheckpointError):
            ask(empty)
    assert list(tmp_path.iterdir()) == []
    save_steps(tmp_path, 10, 20)
    for ask in (lambda: empty.restore_for_eval(wanted, step=15), lambda: empty.read_meta(15)):
        with refused(r"no checkpoint of step 15 in .*; there is 10, 20", CheckpointError):
            ask()
    flip_a_bit(biggest_file(tmp_path / "checkpoints" / "20"))
    with refused(r"step 20 is damaged \(.*SHA-256.*\); there is 10", CheckpointError):
        empty.restore_for_eval(wanted, step=20)


def test_a_model_of_another_shape_is_refused_in_a_line(tmp_path):
    save_steps(tmp_path, 1)
    state = make_state(1)
    extra = {**state.params, "more": state.params["scale"]}
    fewer = {"dense": state.params["dense"]}
    cases = [
        (make_state(1, width=32), r"params\.dense\.kernel.* is float32\[8, 16\] there, but float32\[8, 32\]"),
        (State(**{**vars(state), "params": extra}), r"it has no params\.more"),
        (State(**{**vars(state), "params": fewer}), r"it has params\.scale, which the model lacks"),
    ]
    for other, words in cases:
        with refused(words, CheckpointError):
            latest(tmp_path, other)


def test_a_step_that_a_run_deletes_while_it_is_read_gives_way_to_a_newer_one(tmp_path, monkeypatch):
    """A reader beside a run that keeps one step: what was listed is gone when it is verified, or when it is read."""
    wanted = abstract({"params": make_state(1).params})
    save_steps(tmp_path, 1)
    lines = []

    def replace_by(step):
        save_steps(tmp_path, step, keep_last=1)

    verify = files.find_damage
    with monkeypatch.context() as patch:

        def while_verifying(folder, required):
            patch.setattr(step_folders, "find_damage", verify)
            replace_by(2)
            return verify(folder, required)

        patch.setattr(step_folders, "find_damage", while_verifying)
        reader = CheckpointStore(tmp_path, read_only=True, report=lines.append)
        assert reader.newest_whole() == 2
    replace_by(3)
    assert reader.restore_for_eval(wanted, 2, or_newest=True)[2] == 3
    with refused("there is no checkpoint of step 2", CheckpointError):
        CheckpointStore(tmp_path, read_only=True).restore_for_eval(wanted, 2)

    restore = reader._restore

    def while_reading(step, *args, **kwargs):
        reader._restore = restore
        replace_by(step + 1)
        return restore(step, *args, **kwargs)

    reader._restore = while_reading
    assert reader.restore_for_eval(wanted, 3, or_newest=True)[2] == 4
    reader._restore = while_reading
    with refused("step 4 in .* was deleted while it was read", CheckpointError):
        reader.restore_for_eval(wanted, 4)
    assert lines == []


def test_debris_of_a_killed_run_is_removed(tmp_path):
    save_steps(tmp_path, 1)
    root = tmp_path / "checkpoints"
    for name in ("2.saving", "0.deleting", "2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17"):
        (root / name / "state").mkdir(parents=True)
    (root / "notes").mkdir()
    assert CheckpointStore(tmp_path, read_only=True).steps() == [1]
    assert len(list(root.iterdir())) == 6
    CheckpointStore(tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ["1", "notes"]


def test_checkpoint_files_are_plain(tmp_path):
    save_steps(tmp_path, 7)
    folder = tmp_path / "checkpoints" / "7"
    assert sorted(path.name for path in folder.iterdir()) == ["digests.json", "meta.json", "metrics.json", "state"]
    assert json.loads((folder / "meta.json").read_text()) == META
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    assert set(listed) == files
    assert all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in listed.values())
    shutil.copytree(folder, tmp_path / "moved" / "checkpoints" / "7")
    assert_equal(latest(tmp_path / "moved", make_state(7))[0], make_state(7))
