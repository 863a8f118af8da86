"""Eight simulated CPU devices for every test, set before JAX starts its backend."""

import importlib.metadata
import os
import shutil
import tempfile

# Tests compile far more than they compute. Without LLVM's optimisation (XLA's own stays) that takes a quarter of the
# time, and less than half of it again with the simpler of two code generators for fusions and no LLVM module split for
# threads, which have no cores left beside the other test processes. Child processes inherit it.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # XLA ends the process on a flag that it does not know, as in other versions.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jax").startswith("0.10.") else "",
    )
)

# Programs that tests start would start themselves again for it.
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"

# What one test compiles is there for all that need the same program: test processes and children inherit the folder.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"default_moe_tests_{os.getpid()}")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_sessionstart() -> None:
    devices = jax.devices()
    if len(devices) != 8:
        raise RuntimeError(f"the tests need 8 simulated CPU devices, but JAX has {devices}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: none of them is what all processes wait for at the end."""
    names = (
        "kill_and_resume",
        "compare_runs",
        "many_processes",
        "analysis",
        "train_step",
        "runs",
        "mesh_training",
        "bench",
    )
    slow = [f"test_{name}" for name in names]
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


def pytest_unconfigure() -> None:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if cache.endswith(f"_{os.getpid()}"):  # made by this process
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for runs, with texts in `text`."""
    from helpers.tiny_runs import write_corpus

    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "text")
    return folder


@pytest.fixture
def tokamax_everywhere(monkeypatch):
    """Everything about that backend but its kernels, in the place of which `jax.lax.ragged_dot` computes on a CPU."""

    from default_moe.moe.experts import backends

    monkeypatch.setattr(backends, "_tokamax_runs", lambda: True)
