"""Which kernels are chosen where, and that no fault known of them reaches a result."""

import contextlib
import inspect
import re
import warnings
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.products import UNITS, check, random_arrays
from helpers.reference import assert_close
from helpers.refusals import refused

from default_moe import hardware
from default_moe.config import Config, ModelConfig, MoEConfig
from default_moe.model import attention
from default_moe.model.splash_attention import splash_attention
from default_moe.moe.experts import backends, grouped_matmul, mosaic
from default_moe.moe.experts.backends import available_backends, resolve_backend
from default_moe.moe.experts.grouped_matmul import MATRICES_GRADIENT, SlowKernel
from default_moe.sharding import make_mesh
from default_moe.training.program import Program

HOPPER = {"platform": "gpu", "nvidia": True, "hopper": True}


@pytest.fixture
def on(monkeypatch):
    """A function that makes a platform look in use, with or without tokamax."""

    def use(platform: str, nvidia: bool = False, hopper: bool = False, tokamax: bool = True) -> None:
        for module in (backends, grouped_matmul, attention):
            monkeypatch.setattr(module, "platform", lambda: platform)
            monkeypatch.setattr(module, "is_nvidia", lambda: nvidia, raising=False)
        monkeypatch.setattr(backends, "is_hopper", lambda: hopper)
        monkeypatch.setattr(backends, "_tokamax_installed", lambda: tokamax)
        monkeypatch.setattr(grouped_matmul, "_warned_of", set())

    return use


def faulty(lhs, rhs, sizes, dimensions):
    """A kernel that leaves rows of no group as they were, reads them, and computes nonsense for an empty group."""
    out = jax.lax.ragged_dot_general(lhs, rhs, sizes, dimensions)
    if dimensions != MATRICES_GRADIENT:
        return jnp.where((jnp.arange(out.shape[0]) < sizes.sum())[:, None], out, jnp.nan)
    read = jnp.isfinite(lhs).all() & jnp.isfinite(rhs).all()
    return jnp.where(read & (sizes > 0)[:, None, None], out, jnp.nan)


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS.keys())
def test_faults_of_kernels_reach_no_result(units, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "kernel_of", lambda backend: faulty)
    lhs, rhs, g = random_arrays(np.random.default_rng(0))
    # A name of its own: compiled products are remembered by it.
    check(lhs, rhs, [8 * u for u in units], g, "faulty")


def test_the_output_gradient_past_the_last_group_counts_for_nothing(monkeypatch):
    """It is NaN here; a kernel that reads it would spoil the matrices' gradient."""
    monkeypatch.setattr(grouped_matmul, "kernel_of", lambda backend: faulty)
    lhs, rhs, g = (jnp.asarray(a) for a in random_arrays(np.random.default_rng(1)))
    sizes = jnp.array([8, 0, 16, 8])
    _, gradients = jax.vjp(lambda lhs, rhs: grouped_matmul.grouped_matmul(lhs, rhs, sizes, "faulty too"), lhs, rhs)
    d_lhs, d_rhs = gradients(g.at[32:].set(jnp.nan))
    assert np.isfinite(d_lhs).all() and np.isfinite(d_rhs).all()
    assert_close(d_rhs[3], np.asarray(lhs[24:32], np.float64).T @ np.asarray(g[24:32], np.float64))


def test_what_tokamax_does_not_take_is_computed_all_the_same_with_one_warning(monkeypatch):
    """It has no kernel for a CPU, so all three products fall back."""
    monkeypatch.setattr(grouped_matmul, "_warned_of", set())
    lhs, rhs, g = random_arrays(np.random.default_rng(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(lhs, rhs, [8, 0, 16, 8], g, "tokamax")
    messages = [str(w.message) for w in caught if "tokamax" in str(w.message)]
    assert len(messages) == 1
    # The second is what a version says that has no Triton kernels without triton.
    reasons = r"(Not supported on cpu\.|Unknown implementation: triton)"
    assert re.search(rf"no kernel for float32 \[40, 5\] x \[4, 5, 3\] here \(tokamax: {reasons}\)", messages[0])
    assert "jax.lax.ragged_dot computes this product" in messages[0]


def test_tokamax_is_not_asked_for_kernels_that_are_wrong(on, monkeypatch):
    """Mosaic's for Hopper give wrong gradients of the matrices."""
    import tokamax

    asked = []

    def ragged_dot_general(lhs, rhs, sizes, dimensions, implementation):
        asked.append(implementation)
        return jax.lax.ragged_dot_general(lhs, rhs, sizes, dimensions)

    monkeypatch.setattr(tokamax, "ragged_dot_general", ragged_dot_general)
    for platform in ("gpu", "tpu"):
        on(platform, nvidia=platform == "gpu")
        grouped_matmul.grouped_matmul(jnp.ones((8, 128)), jnp.ones((1, 128, 256)), jnp.array([8]), "tokamax")
    (on_gpu,), (on_tpu,) = asked
    assert on_gpu == "triton" and type(on_tpu).__name__ == "PallasMosaicTpuRaggedDot"


def test_a_tokamax_made_for_another_jax_is_reported_in_one_line(monkeypatch):
    import tokamax

    def ragged_dot_general(*args, **kwargs):
        raise TypeError("Mesh.__init__() got an unexpected keyword argument 'out_shape'")

    monkeypatch.setattr(tokamax, "ragged_dot_general", ragged_dot_general)
    with refused(r"tokamax [\d.]+ and jax [\d.]+ .* do not go together \(TypeError: Mesh"):
        grouped_matmul.grouped_matmul(jnp.ones((8, 128)), jnp.ones((1, 128, 128)), jnp.array([8]), "tokamax")


@pytest.fixture
def hopper_kernels(monkeypatch):
    """JAX's kernels for Hopper replaced by `jax.lax.ragged_dot_general`, which refuses tiles that they do not take."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    product = inspect.signature(ragged_dot_mgpu.ragged_dot)
    gradient = inspect.signature(transposed_ragged_dot_mgpu.transposed_ragged_dot)

    def checked(columns, depth, block_m, block_n, block_k, max_concurrent_steps, grid_block_n):
        assert columns % (block_n * grid_block_n) == 0 and depth % block_k == 0
        assert block_m % 64 == 0 and block_n % 8 == 0
        # In bfloat16: what is in flight, and the tile of the output.
        assert 2 * (max_concurrent_steps * (block_m + block_n) * block_k + block_m * block_n) <= 227 * 1024
        return block_m

    def ragged_dot(lhs, rhs, *, group_sizes, transpose_rhs, **tiles):
        product.bind(lhs, rhs, group_sizes=group_sizes, transpose_rhs=transpose_rhs, **tiles)
        checked(rhs.shape[1 if transpose_rhs else 2], lhs.shape[1], **tiles)
        dimensions = grouped_matmul.ROWS_GRADIENT if transpose_rhs else grouped_matmul.PRODUCT
        return faulty(lhs, rhs, group_sizes, dimensions)

    def transposed_ragged_dot(lhs, rhs, *, group_sizes, **tiles):
        gradient.bind(lhs, rhs, group_sizes=group_sizes, **tiles)
        assert lhs.shape[1] % checked(rhs.shape[1], len(lhs), **tiles) == 0
        return faulty(lhs, rhs, group_sizes, MATRICES_GRADIENT)

    monkeypatch.setattr(ragged_dot_mgpu, "ragged_dot", ragged_dot)
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "transposed_ragged_dot", transposed_ragged_dot)


@pytest.mark.parametrize(("d_model", "width"), [(128, 192), (64, 1408), (256, 384)])
def test_hopper_kernels_are_asked_for_the_three_products(d_model, width, hopper_kernels, monkeypatch):
    monkeypatch.setattr(mosaic, "unsupported", lambda dtype, sizes: None)  # to compare in float32
    rng = np.random.default_rng(3)
    lhs, rhs, g = (
        rng.normal(size=size).astype(np.float32) for size in ((128, d_model), (4, d_model, width), (128, width))
    )
    check(lhs, rhs / d_model**0.5, [40, 0, 56, 16], g / width**0.5, "mosaic")


def test_what_hopper_kernels_do_not_take_is_computed_all_the_same_with_a_warning(hopper_kernels, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "_warned_of", set())
    lhs, rhs = jnp.ones((64, 64)), jnp.ones((1, 64, 64))
    reasons = {
        "bfloat16 and float16": (lhs, rhs),
        "multiples of 64": (lhs.astype(jnp.bfloat16), rhs[:, :, :40].astype(jnp.bfloat16)),
    }
    for reason, (a, b) in reasons.items():
        with pytest.warns(SlowKernel, match=f"Hopper's kernels take .*{reason}"):
            out = grouped_matmul.grouped_matmul(a, b, jnp.array([64]), "mosaic")
        assert float(jnp.abs(out - 64).max()) == 0
    assert mosaic.unsupported(jnp.bfloat16, (64, 128, 704)) is None


@pytest.mark.parametrize(
    ("where", "chosen", "available"),
    [
        ({"platform": "cpu"}, "blocks", ["blocks", "ragged"]),
        ({"platform": "tpu"}, "tokamax", ["blocks", "ragged", "tokamax"]),
        ({"platform": "gpu", "nvidia": True}, "tokamax", ["blocks", "ragged", "tokamax"]),
        (HOPPER | {"tokamax": False}, "mosaic", ["blocks", "ragged", "mosaic", "hopper"]),
        ({"platform": "gpu"}, "ragged", ["blocks", "ragged"]),
    ],
    ids=str,
)
def test_the_choice_of_backend(on, where, chosen, available):
    on(**where)
    assert (resolve_backend("auto"), available_backends()) == (chosen, available)


def test_the_choice_on_hopper_depends_on_dtype_and_sizes(on):
    on(**HOPPER)
    assert resolve_backend("auto", "bfloat16", (64, 96)) == "tokamax"
    on(**HOPPER, tokamax=False)
    with pytest.warns(SlowKernel, match="because Hopper's kernels take bfloat16 and float16, and tokamax"):
        assert resolve_backend("auto", "float32", (64, 64)) == "ragged"


@pytest.mark.parametrize(("capability", "expected"), [("9.0", True), ("8.9", False), ("10.0", False), (None, False)])
def test_what_is_a_hopper_gpu(capability, expected, monkeypatch):
    monkeypatch.setattr(hardware, "is_nvidia", lambda: True)
    device = SimpleNamespace(compute_capability=capability) if capability else SimpleNamespace()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert hardware.is_hopper() is expected


def test_a_backend_that_cannot_run_here_is_refused_in_one_line(on):
    on("cpu")
    with refused("'tokamax', but its kernels run on NVIDIA GPUs and TPUs, and this is 'cpu'"):
        resolve_backend("tokamax")
    with refused(r"'mosaic', but its kernels run on Hopper GPUs .*, and this is 'cpu'"):
        resolve_backend("mosaic")
    on("gpu", nvidia=True, tokamax=False)
    with refused("tokamax is not installed: pip install"):
        resolve_backend("tokamax")
    with pytest.warns(SlowKernel, match="falls back to 'ragged', which computes every expert .* tokamax is not"):
        assert resolve_backend("auto") == "ragged"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert resolve_backend("auto") == "ragged"


def test_a_program_refuses_what_cannot_run_here_before_anything_is_compiled():
    with refused(r"moe\.matmul is 'tokamax'"):
        Program(Config(moe=MoEConfig(matmul="tokamax")), 257)
    with refused(r"model\.attention is 'cudnn', but it runs on NVIDIA GPUs, .* 'cpu'"):
        Program(Config(model=ModelConfig(attention="cudnn")), 257)
    with refused(r"model\.attention is 'splash', but it runs on TPUs, .* 'cpu'"):
        Program(Config(model=ModelConfig(attention="splash")), 257)


def test_cudnn_is_not_asked_for_a_mask_of_odd_length(on):
    on("gpu", nvidia=True)
    config = ModelConfig(dtype="bfloat16")
    chosen = [attention.resolve_attention(config, length, masked=True) for length in (16, 17)]
    assert chosen == ["cudnn", "xla"]


def test_a_window_and_documents_are_too_much_for_cudnn(on):
    on("gpu", nvidia=True)
    config = ModelConfig(dtype="bfloat16", attention_window=8)
    chosen = [attention.resolve_attention(config, 16, masked) for masked in (False, True)]
    assert chosen == ["cudnn", "xla"]
    with refused(r"model\.attention is 'cudnn', but with model\.attention_window it keeps no documents apart"):
        asked = ModelConfig(dtype="bfloat16", attention_window=8, attention="cudnn")
        attention.resolve_attention(asked, 16, masked=True)


def test_the_choice_of_attention_on_a_tpu(on):
    on("tpu")
    chosen = [attention.resolve_attention(ModelConfig(), length, masked=True) for length in (128, 640, 200)]
    assert chosen == ["splash", "splash", "xla"]
    with refused(r"a multiple of 128 tokens, but train\.sequence_length is 200: use 'auto'"):
        attention.resolve_attention(ModelConfig(attention="splash"), 200, masked=False)


@pytest.mark.parametrize(("masked", "kv_heads", "window"), [(False, 4, None), (True, 2, 100)])
def test_splash_attention_is_attention(masked, kv_heads, window):
    """The kernel, interpreted, on two meshes and none: its value and gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, kv_heads, kv_heads, 4)
    q, k, v, g = (jax.random.normal(key, (4, 256, num, 8)) for key, num in zip(keys, heads, strict=True))
    documents = jnp.cumsum(jax.random.bernoulli(keys[0], 0.02, (4, 256)), axis=1) if masked else None

    def expected(q, k, v):
        behind = jnp.subtract.outer(jnp.arange(256), jnp.arange(256))
        mask = ((behind >= 0) & (behind < (window or 256)))[None, None]
        if documents is not None:
            mask &= (documents[:, :, None] == documents[:, None, :])[:, None]
        return (g * jax.nn.dot_product_attention(q, k, v, mask=mask)).sum()

    def actual(q, k, v):
        return (g * splash_attention(q, k, v, documents, window)).sum()

    wanted = jax.value_and_grad(expected, argnums=(0, 1, 2))(q, k, v)
    # Each device takes its sequences; or its head, for which it needs keys and values that another one needs too.
    for mesh, rules in ((None, ()), ((2, 2, 1), ()), ((1, 1, 4), (("heads", "expert"),))):
        with (
            jax.set_mesh(make_mesh(*mesh, jax.devices()[:4])) if mesh else contextlib.nullcontext(),
            nn.logical_axis_rules(rules),
        ):
            got = jax.jit(jax.value_and_grad(actual, argnums=(0, 1, 2)))(q, k, v)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted)


@pytest.mark.parametrize(
    "settings,chosen",
    [
        ({"dtype": "bfloat16"}, "cudnn"),
        ({"dtype": "bfloat16", "attention": "xla"}, "xla"),
        ({"dtype": "float32"}, "xla"),
        ({"dtype": "bfloat16", "d_model": 512, "num_heads": 2}, "xla"),  # heads of 256
        ({"dtype": "bfloat16", "d_model": 48, "num_heads": 4}, "xla"),  # heads of 12
    ],
)
def test_the_choice_of_attention_on_an_nvidia_gpu(on, settings, chosen):
    on("gpu", nvidia=True)
    assert attention.resolve_attention(ModelConfig(**settings), 16, masked=False) == chosen
    if chosen == "xla" and "attention" not in settings:
        with refused("use 'auto' or 'xla'"):
            attention.resolve_attention(ModelConfig(**settings, attention="cudnn"), 16, masked=False)
