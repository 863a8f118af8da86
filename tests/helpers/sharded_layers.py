"""Single layers over a mesh, checked against the loops of `reference`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import reference
from helpers.layers import check_aux, gradients_of, losses_of, moe_config, settings_of, variables_of
from helpers.reference import assert_close
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from default_moe.config import MoEConfig
from default_moe.moe import MoELayer
from default_moe.sharding import make_mesh

BATCH, LENGTH, D_MODEL, EXPERT_DIM, NUM_EXPERTS, TOP_K = 8, 5, 12, 10, 8, 2
TOKENS = BATCH * LENGTH


def mesh_of(sizes: tuple[int, int, int]):
    return make_mesh(*sizes)


def make_config(**fields) -> MoEConfig:
    return moe_config(num_experts=NUM_EXPERTS, top_k=TOP_K, expert_dim=EXPERT_DIM, **fields)


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


@functools.cache
def expected_step(config: MoEConfig, masked: bool, update: bool):
    x, params, ema, g = skewed_inputs()
    mask = skewed_mask() if masked else None
    s = settings_of(config, LENGTH)
    result = reference.forward(x, params, ema, s, update=update, mask=mask)
    reference.assert_no_near_ties(result.routes)
    return result, gradients_of(config, x, params, result, s, g, mask)


def skewed_mask() -> np.ndarray:
    """Keeps 0 tokens of the first sequence, 1 of the second and so on."""
    return (np.arange(LENGTH)[None, :] < np.arange(BATCH)[:, None]).reshape(-1).astype(np.int32)


def arrays(config: MoEConfig, mesh, placement: str) -> tuple:
    """(variables, x, g, mask) on the mesh. placement "sharded": experts over expert, batch over all axes."""
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
    x, g = (a.reshape(BATCH, LENGTH, D_MODEL) for a in (x, g))
    return variables, put(x, tokens), put(g, tokens), put(skewed_mask().reshape(BATCH, LENGTH), tokens, jnp.int32)


def make_step(config: MoEConfig, masked: bool = False, train: bool = True):
    layer = MoELayer(config)

    def objective(variables, x, g, mask):
        (y, aux), state = layer.apply(
            variables,
            x,
            train=train,
            mask=mask if masked else None,
            mutable=["default_vectors"],
            rngs={"router": jax.random.key(5)},
        )
        return (g * y).sum() + losses_of(aux), (y, aux, state)

    return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True, allow_int=True))


@functools.cache
def compiled_step(mesh, config: MoEConfig, placement: str, masked: bool, train: bool):
    """Compiled quickly, with plain machine code: partitioning is the same, and this is tested here."""
    with jax.set_mesh(mesh):
        lowered = make_step(config, masked, train).lower(*arrays(config, mesh, placement))
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def check_step(mesh, config: MoEConfig, placement: str = "sharded", masked: bool = False, train: bool = True) -> None:
    same = dataclasses.replace(config, matmul="auto", expert_parallel="auto")
    expected, grads = expected_step(same, masked, train)
    step = compiled_step(mesh, config, placement, masked, train)
    (d_variables, d_x), (y, aux, state) = step(*arrays(config, mesh, placement))
    check_aux(config, aux, expected, skewed_mask() if masked else None)
    assert_close(y.reshape(TOKENS, -1), expected.y, "y")
    if config.default_vectors:
        assert_close(state["default_vectors"]["ema"], expected.ema, "ema")
        np.testing.assert_array_equal(state["default_vectors"]["ema"][6], skewed_inputs()[2][6])  # idle everywhere
        np.testing.assert_array_equal(d_variables["default_vectors"]["ema"], 0)
    assert_close(d_x.reshape(TOKENS, -1), grads.x, "gradient of x")
    assert_close(d_variables["params"]["router"]["kernel"], grads.kernel, "gradient of the router")
    for name in ("gate", "up", "down"):
        assert_close(d_variables["params"]["experts"][name], getattr(grads, name), f"gradient of {name}")
