"""What the device can do at best: bytes copied and a plain matrix product, on random data."""

import jax
import jax.numpy as jnp

from default_moe.bench.accelerator.results import Results
from default_moe.bench.accelerator.scale import scale
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately


def measure(results: Results) -> None:
    s = scale()

    def copy() -> Row:
        x = jax.random.normal(jax.random.key(0), (s.copied_bytes // 4,), jnp.float32)
        timing = time_alternately({"": lambda: jax.jit(jnp.negative)(x)}, s.rounds)[""]
        return {"GB/s": 2 * s.copied_bytes / timing.seconds / 1e9, "ms": timing.seconds * 1e3}

    def matmul() -> Row:
        a, b = (jax.random.normal(jax.random.key(i), (s.matrix, s.matrix), s.dtype) for i in range(2))
        timing = time_alternately({"": lambda: jax.jit(jnp.matmul)(a, b)}, s.rounds)[""]
        return {"TFLOP/s": 2 * s.matrix**3 / timing.seconds / 1e12, "ms": timing.seconds * 1e3, "size": s.matrix}

    results.guarded("copy, bytes read and written", copy)
    results.guarded(MATRIX_PRODUCT, matmul)


MATRIX_PRODUCT = "matrix product"


def matmul_ceiling(rows: list[Row]) -> float | None:
    """FLOP/s of the matrix product among earlier results, None if that failed."""
    return next((row["TFLOP/s"] * 1e12 for row in rows if row.get("name") == MATRIX_PRODUCT and "TFLOP/s" in row), None)
