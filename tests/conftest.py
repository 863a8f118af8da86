"""Eight simulated CPU devices for every test, set before JAX starts its backend."""

import importlib.metadata
import os

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

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_sessionstart() -> None:
    devices = jax.devices()
    if len(devices) != 8:
        raise RuntimeError(f"the tests need 8 simulated CPU devices, but JAX has {devices}")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For modules that make the same programs anew: each is compiled the first time alone."""
    from run_helpers import compile_cache

    with compile_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for runs, with texts in `text`; what they make anew is compiled the first time alone."""
    from run_helpers import compile_cache, write_corpus

    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "text")
    with compile_cache(folder / "cache"):
        yield folder


@pytest.fixture
def tokamax_everywhere(monkeypatch):
    """Everything about that backend but its kernels, in the place of which `jax.lax.ragged_dot` computes on a CPU."""
    from default_moe import grouped_matmul

    monkeypatch.setattr(grouped_matmul, "_tokamax_runs", lambda: True)
