"""Eight simulated CPU devices for every test, set before JAX starts its backend."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_sessionstart() -> None:
    devices = jax.devices()
    if len(devices) != 8:
        raise RuntimeError(f"the tests need 8 simulated CPU devices, but JAX has {devices}")
