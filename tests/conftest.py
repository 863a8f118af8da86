"""Eight simulated CPU devices for every test, set before JAX starts its backend."""

import os

# Tests compile far more than they compute: without LLVM's optimisation (XLA's own stays) that takes a quarter of the
# time. Child processes inherit it.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

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


@pytest.fixture
def tokamax_everywhere(monkeypatch):
    """Everything about that backend but its kernels, in the place of which `jax.lax.ragged_dot` computes on a CPU."""
    from default_moe import grouped_matmul

    monkeypatch.setattr(grouped_matmul, "_tokamax_runs", lambda: True)
