"""Single layers over a mesh, checked against the loops of `reference`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import reference
from helpers.layers import check_results, gradient_of_step, gradients_of, settings_of, variables_of
from helpers.reference import Gradients, Params, Result
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from default_moe.config import MoEConfig

BATCH, LENGTH, D_MODEL, NUM_EXPERTS, TOP_K = 8, 5, 12, 8, 2
TOKENS = BATCH * LENGTH


@functools.cache
def skewed_inputs():
    """Sequence b prefers expert b % 4; experts 4 and 5 get next to nothing, 6 nothing. So means differ by device."""
    x, params, ema, g = reference.make_inputs(0, TOKENS, NUM_EXPERTS)
    kernel = params.kernel
    kernel[0, 4:] = [-2, -2, -9, 0]
    kernel[1:9] = 0.3 * kernel[1:9]
    for b in range(BATCH):
        kernel[1 + b, b % 4] = 4
        x[b * LENGTH : (b + 1) * LENGTH, 1 + b] = 1.25
        x[b * LENGTH : (b + 1) * LENGTH] *= 1 + b / 8  # and outputs differ in size
    x, kernel = (np.float64(np.float32(a)) for a in (x, kernel))
    return x, params._replace(kernel=kernel), ema, g


def skewed_mask() -> np.ndarray:
    """Keeps 0 tokens of the first sequence, 1 of the second and so on."""
    return (np.arange(LENGTH)[None, :] < np.arange(BATCH)[:, None]).astype(np.int32)


@functools.cache
def expected_step(config: MoEConfig, masked: bool = False, update: bool = True) -> tuple[Result, Gradients]:
    return step_by_loops(config, *skewed_inputs(), mask=skewed_mask().ravel() if masked else None, update=update)


def step_by_loops(config: MoEConfig, x, params: Params, ema, g, **options: Any) -> tuple[Result, Gradients]:
    s = settings_of(config, LENGTH)
    result = reference.forward(x, params, ema, s, **options)
    reference.assert_no_near_ties(result.routes)
    return result, gradients_of(config, x, params, result, s, g)


def arrays(config: MoEConfig, mesh, placement: str = "sharded", masked: bool = False) -> tuple:
    """(variables, x, g, mask or None) on the mesh. "sharded": experts over expert, batch over all axes."""
    x, params, ema, g = skewed_inputs()
    names = mesh.axis_names
    tokens, experts = P(names), P("expert" if "expert" in names else None)
    if placement == "replicated":
        tokens = experts = P()

    def put(a, spec, dtype=jnp.float32):
        return jax.device_put(jnp.asarray(a, dtype), NamedSharding(mesh, spec))

    def placed(path, a):
        return put(a, experts if path[-1].key in ("gate", "up", "down", "ema") else P(), a.dtype)

    variables = jax.tree_util.tree_map_with_path(placed, variables_of(config, params, ema))
    x, g = (put(a.reshape(BATCH, LENGTH, D_MODEL), tokens) for a in (x, g))
    return variables, x, g, put(skewed_mask(), tokens, jnp.int32) if masked else None


@functools.cache
def compiled_step(mesh, config: MoEConfig, placement: str = "sharded", masked: bool = False, train: bool = True):
    with jax.set_mesh(mesh):
        return jax.jit(gradient_of_step(config, train)).lower(*arrays(config, mesh, placement, masked)).compile()


def check_step(mesh, config: MoEConfig, placement: str = "sharded", masked: bool = False, train: bool = True) -> None:
    expected, grads = expected_step(dataclasses.replace(config, matmul="auto", expert_parallel="auto"), masked, train)
    got = compiled_step(mesh, config, placement, masked, train)(*arrays(config, mesh, placement, masked))
    check_results(config, got, expected, grads)
    if config.default_vectors:
        _, (_, _, state) = got
        np.testing.assert_array_equal(state["default_vectors"]["ema"][6], skewed_inputs()[2][6])  # idle everywhere
