"""The device mesh, and how logical axis names map onto it.

Modules name the axes of their variables ("embed", "expert", ...); `mesh.rules` in the config says which mesh axes
those are split over. Code that runs under a mesh finds it with `jax.sharding.get_abstract_mesh()`, set by
`jax.set_mesh`; without one everything works on a single device.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.extend.core import ClosedJaxpr
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from default_moe.errors import ConfigError

AXES = ("data", "fsdp", "expert")
DEFAULT_RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp", "expert")),
    ("expert", "expert"),
    ("embed", "fsdp"),
    ("heads", None),
    ("kv_heads", None),
    ("mlp", None),
    ("vocab", None),
)
# Pairs of logical axes that one array has, whose dimensions cannot be split over the same mesh axis.
_TOGETHER = (
    ("expert", "embed"),
    ("expert", "mlp"),
    ("embed", "mlp"),
    ("embed", "heads"),
    ("embed", "kv_heads"),
    ("embed", "vocab"),
    ("batch", "heads"),
    ("batch", "kv_heads"),
)
_annotating = contextvars.ContextVar("annotating", default=False)


def make_mesh(data: int, fsdp: int, expert: int, devices: list[Any] | None = None) -> Mesh:
    """A mesh of these sizes, -1 for the devices left over. Raises ConfigError if it does not fit all devices."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, expert]
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"{asked} does not fit {len(devices)} device{'s' if len(devices) > 1 else ''}: the product of the three "
            "must be the number of devices (-1 stands for the rest)"
        )
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError:  # a TPU's torus has no sides of these sizes: take parts of its sides
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def rules() -> tuple[tuple[str, Any], ...]:
    """The logical axis rules in force: those of `flax.linen.logical_axis_rules`, else the defaults of the config."""
    return tuple(nn.get_logical_axis_rules()) or DEFAULT_RULES


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """The axes of the mesh in use, of more than one device each, that `logical_axis` is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    for name, axes in rules():
        if name == logical_axis:
            axes = axes if isinstance(axes, tuple) else (axes,)
            return tuple(axis for axis in axes if axis in mesh.axis_names and mesh.shape[axis] > 1)
    return ()


def num_shards(logical_axis: str) -> int:
    """How many parts `logical_axis` is split into under the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical_axis))


def check_rules() -> None:
    """Raises ConfigError if the rules in force split an array, or experts and tokens, as cannot be under this mesh."""
    for one, other in _TOGETHER:
        if shared := [axis for axis in mesh_axes(one) if axis in mesh_axes(other)]:
            raise ConfigError(
                f"mesh.rules split {one!r} and {other!r} both over {_named(shared)}, but there are arrays with both, "
                "which can be split over different axes only"
            )
    experts, tokens = mesh_axes("expert"), mesh_axes("batch")
    shared = [axis for axis in experts if axis in tokens]
    if shared and len(shared) < len(experts):
        raise ConfigError(
            f"mesh.rules split 'expert' over {_named(experts)} and 'batch' over {_named(tokens)}, but the batch must "
            "be split over all axes that experts are split over, or over none of them"
        )


def _named(axes: Iterable[str]) -> str:
    return " and ".join(f"mesh.{axis}" for axis in axes)


def check_divisible(what: str, size: int, logical_axis: str) -> None:
    """Raises ConfigError if an axis of this size cannot be split as `logical_axis` is."""
    shards = num_shards(logical_axis)
    if size % shards:
        raise ConfigError(
            f"{size} {what} cannot be split over {shards} devices by {_named(mesh_axes(logical_axis))}: make the "
            "number a multiple of that"
        )


def weight_spec(*logical_axes: str | None) -> PartitionSpec:
    """How a weight of these logical axes enters `shard_map`, to be made whole there by `whole_weight`.

    It stays split over the mesh axes that tokens are split over too, and over those of "expert".
    """
    return PartitionSpec(*(_split_axes(axis) or None for axis in logical_axes))


def whole_weight(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Inside `shard_map`, the weight of which each device has a part by `weight_spec`, whole but for "expert".

    It varies over all axes that tokens are split over. So its gradient, summed over their devices, is scattered as it
    is summed, where XLA left to itself may give every device all of it.
    """
    split = tuple(axis for name in logical_axes for axis in _split_axes(name))
    others = tuple(axis for axis in mesh_axes("batch") if axis not in split)
    x = _finish_gradient(x)
    if others:
        x = jax.lax.pcast(x, others, to="varying")
    for dimension, name in enumerate(logical_axes):
        if name != "expert" and (axes := _split_axes(name)):
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x


@jax.custom_vjp
def _finish_gradient(x: jax.Array) -> jax.Array:
    """`x`, whose gradient is finished before it is added to others: XLA for TPU fails where it tries to add first."""
    return x


_finish_gradient.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def _split_axes(logical_axis: str | None) -> tuple[str, ...]:
    axes = mesh_axes(logical_axis) if logical_axis else ()
    return axes if logical_axis == "expert" else tuple(axis for axis in axes if axis in mesh_axes("batch"))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Ask for `x` to be laid out by its logical axes; nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(*((mesh_axes(axis) or None) if axis else None for axis in logical_axes))
    return jax.lax.with_sharding_constraint(x, spec)


def whole_matrices(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Ask for a stack of matrices to be laid out so that none is split over devices; nothing without a mesh.

    The devices that held parts of each share out the matrices instead, where their number allows.
    logical_axes: of the leading axes, those of the stack.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    split = [list(mesh_axes(axis)) if axis else [] for axis in logical_axes]
    for axis in mesh_axes("embed"):
        for size, axes in zip(x.shape, split, strict=False):
            if size % math.prod(mesh.shape[name] for name in [*axes, axis]) == 0:
                axes.append(axis)
                break
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(tuple(axes) or None for axes in split)))


def with_axes(init: Callable[..., Any], *logical_axes: str | None) -> Callable[..., Any]:
    """`init`, its result annotated with logical axes while shardings are being worked out, and plain otherwise.

    So variables are plain arrays wherever a user meets them, and the names stay beside the variables they describe.
    """

    def annotated(*args: Any, **kwargs: Any) -> Any:
        wrapped = nn.with_logical_partitioning(init, logical_axes) if _annotating.get() else init
        return wrapped(*args, **kwargs)

    return annotated


@contextlib.contextmanager
def _annotations() -> Iterator[None]:
    token = _annotating.set(True)
    try:
        yield
    finally:
        _annotating.reset(token)


def trace_annotated(init: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Trace `init(*args)`. Return what it computes, and the shapes of its result.

    The shapes are in boxes that hold the names of axes, where there are any.
    """
    with _annotations(), nn.logical_axis_rules(()):  # with rules Flax would constrain what it unboxes
        # A function of its own: JAX remembers traces by function, and must not mix these with ones without names.
        return jax.make_jaxpr(lambda *a: init(*a), return_shape=True)(*args)


def unboxed(annotated: Any) -> Any:
    """Return what `trace_annotated` gives without the names of axes."""
    with nn.logical_axis_rules(()):
        return nn.unbox(annotated)


def abstract_arrays(annotated: Any, mesh: Mesh, mesh_rules: tuple) -> Any:
    """Return shape, dtype and NamedSharding of every array of boxed shapes, as `trace_annotated` gives them.

    Raises ConfigError where an axis is not divisible by the mesh axes it is split over.
    """
    # Where an optimizer leaves a parameter to another one, optax puts an empty node into the box.
    annotated = jax.tree.map(
        lambda box: box if jax.tree.leaves(box) else unboxed(box),
        annotated,
        is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata),
    )
    shapes = unboxed(annotated)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(annotated), mesh, mesh_rules)
    # What an optimizer derives from a parameter by leaving out axes has its names, but not its axes. It is small.
    shardings = jax.tree.map(
        lambda leaf, s: NamedSharding(mesh, PartitionSpec()) if len(s.spec) > len(leaf.shape) else s, shapes, shardings
    )
    jax.tree_util.tree_map_with_path(_check_divisible, shapes, shardings)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


def _check_divisible(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> None:
    for size, axes in zip(leaf.shape, sharding.spec, strict=False):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        parts = math.prod(sharding.mesh.shape[axis] for axis in names)
        if size % parts:
            raise ConfigError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} of shape {leaf.shape} cannot be split into "
                f"{parts} parts along its axis of {size} by {_named(names)}"
            )
