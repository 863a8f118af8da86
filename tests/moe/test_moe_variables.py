"""The layer's variables: what they are at first, and what happens to default vectors that are passed around."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers, reference
from helpers.layers import BATCH, D_MODEL, EXPERT_DIM, LENGTH, batched, inputs, make_config
from helpers.reference import assert_close

from default_moe.config import MoEConfig
from default_moe.moe import MoELayer


@functools.cache
def initialised(config: MoEConfig, d_model: int = D_MODEL) -> dict:
    x = jnp.ones((BATCH, LENGTH, d_model))
    return jax.jit(functools.partial(MoELayer(config).init, train=True))(jax.random.key(0), x)


def test_variables_after_init():
    """As documented, and no update of the default vectors has happened: they are exactly zero."""
    variables = initialised(make_config())
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype.name), variables)
    into = ((8, D_MODEL, EXPERT_DIM), "float32")
    assert shapes == {
        "params": {
            "router": {"kernel": ((D_MODEL, 8), "float32")},
            "experts": {"gate": into, "up": into, "down": ((8, EXPERT_DIM, D_MODEL), "float32")},
        },
        "default_vectors": {"ema": ((8, D_MODEL), "float32")},
    }
    np.testing.assert_array_equal(variables["default_vectors"]["ema"], 0)
    assert set(initialised(make_config(router="topk"))) == {"params"}


def test_gaussian_default_vectors():
    """64 * 256 = 16384 draws: the mean's error is std / 128, that of the std std / 181; five of them each."""
    ema = initialised(make_config(64, 2, ema_init="gaussian", ema_init_std=0.5), d_model=256)["default_vectors"]["ema"]
    assert abs(float(ema.mean())) < 5 * 0.5 / 128
    assert abs(float(ema.std()) - 0.5) < 5 * 0.5 / 181


@pytest.mark.parametrize(
    ("train", "mutable", "collections", "words"),
    [
        (True, ["default_vectors"], ["params"], "'default_vectors' is missing"),
        (False, False, ["params"], "'default_vectors' is missing"),
        (True, False, ["params", "default_vectors"], "default_vectors"),
    ],
)
def test_vectors_that_are_missing_or_may_not_change_are_an_error_and_no_fresh_start(train, mutable, collections, words):
    variables = initialised(make_config())
    given = {name: variables[name] for name in collections}
    with pytest.raises(Exception, match=words):
        MoELayer(make_config()).apply(given, jnp.ones((BATCH, LENGTH, D_MODEL)), train=train, mutable=mutable)


class Wrapped(nn.Module):
    config: MoEConfig

    @nn.compact
    def __call__(self, x):
        return MoELayer(self.config, name="moe")(x, train=True)[0]


@pytest.mark.parametrize("kind", ["nn.remat", "jax.checkpoint"])
def test_rematerialisation_updates_the_vectors_once(kind):
    """Twice would give 0.81 E^ + 0.19 mean in place of 0.9 E^ + 0.1 mean."""
    config = make_config(matmul="blocks")
    x, params, ema, g = inputs(12)
    s = layers.settings_of(config)
    expected = reference.forward(x, params, ema, s)
    grads = reference.gradients(x, params, expected, s, g, 0, 0)
    variables = {c: {"moe": tree} for c, tree in layers.variables_of(config, params, ema).items()}
    model = (nn.remat(Wrapped) if kind == "nn.remat" else Wrapped)(config)
    run = functools.partial(model.apply, mutable=["default_vectors"])
    run = jax.checkpoint(run) if kind == "jax.checkpoint" else run

    def objective(variables, x):
        y, state = run(variables, x)
        return (batched(g) * y).sum(), (y, state)

    d_variables, (y, state) = jax.jit(jax.grad(objective, has_aux=True))(variables, batched(x))
    assert_close(y, batched(expected.y), "y")
    assert_close(state["default_vectors"]["moe"]["ema"], expected.ema, "ema")
    assert_close(d_variables["params"]["moe"]["router"]["kernel"], grads.kernel, "gradient of the router")
    assert_close(d_variables["params"]["moe"]["experts"]["down"], grads.down, "gradient of down")
