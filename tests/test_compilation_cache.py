"""Compiled programs that are kept: the same ones come back, damage is a miss, and nothing ends a run."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache as jax_cache

from default_moe.compilation_cache import CheckedCache, keep_compiled_programs


@pytest.fixture
def no_cache():
    """JAX as it is where no cache is asked for; afterwards as the other tests have it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax_cache.reset_cache()
    jax.config.update(names[0], None)
    jax.config.update(names[1], 0)
    yield
    jax_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def compiled():
    """What one more program like the others computes: JAX compiles it anew, or finds it."""

    def some_program(x):
        return jnp.tanh(x @ x) + 1

    return np.asarray(jax.jit(some_program)(np.eye(8))).tolist()


def test_a_program_is_compiled_once_and_again_if_its_file_is_damaged(tmp_path, no_cache, monkeypatch, recwarn):
    found = []
    get = CheckedCache.get
    monkeypatch.setattr(CheckedCache, "get", lambda self, key: found.append(get(self, key)) or found[-1])
    folder = tmp_path / "home" / "xla"
    keep_compiled_programs(str(folder))
    first = compiled()
    (entry,) = (path for path in folder.iterdir() if "some_program" in path.name)
    assert found[-1] is None
    assert compiled() == first
    assert found[-1] == entry.read_bytes()[32:]

    whole = entry.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", bytes([*whole[:50], whole[50] ^ 1, *whole[51:]])):
        entry.write_bytes(damaged)
        assert compiled() == first
        assert found[-1] is None
        assert compiled() == first  # it has been written again
        assert found[-1] is not None
    assert folder.stat().st_mode & 0o077 == 0
    assert not recwarn.list


def test_a_folder_that_cannot_be_written_is_no_matter(tmp_path, no_cache, recwarn):
    (tmp_path / "file").write_text("")
    keep_compiled_programs(str(tmp_path / "file" / "xla"))
    keep_compiled_programs("~nosuchuser/xla")
    assert jax.config.values["jax_compilation_cache_dir"] is None
    keep_compiled_programs(str(tmp_path / "gone"))
    (tmp_path / "gone").rmdir()
    assert len(compiled()) == 8
    assert not recwarn.list and not (tmp_path / "gone").exists()


def test_a_cache_that_was_asked_for_is_left_alone(tmp_path, no_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_compiled_programs(str(tmp_path / "ours"))
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    assert not (tmp_path / "ours").exists()


def test_what_was_used_last_stays(tmp_path):
    cache = CheckedCache(tmp_path, most_bytes=3 * 132)
    for index, key in enumerate("abc"):
        cache.put(key, bytes(100))
        os.utime(next(tmp_path.glob(f"*-{key}")), (index, index))
    assert cache.get("a") == bytes(100)
    cache.put("d", bytes(100))
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_programs_of_another_machine_or_packing_are_others(tmp_path, monkeypatch):
    CheckedCache(tmp_path, 1000).put("a", b"program")
    assert CheckedCache(tmp_path, 1000).get("a") == b"program"
    monkeypatch.setattr("default_moe.compilation_cache._cpu_features", lambda: "flags: fewer")
    assert CheckedCache(tmp_path, 1000).get("a") is None
    monkeypatch.undo()
    monkeypatch.setattr(jax_cache, "compress_executable", lambda data: b"other")
    assert CheckedCache(tmp_path, 1000).get("a") is None
