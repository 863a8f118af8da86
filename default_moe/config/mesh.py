"""The settings of the device mesh."""

from dataclasses import dataclass
from typing import Any

from default_moe.errors import check, closest, quoted
from default_moe.methods.settings import at_least, check_settings, setting
from default_moe.sharding import AXES, DEFAULT_RULES

_LOGICAL_AXES = [name for name, _ in DEFAULT_RULES]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (-1, once: all that are left). The batch is split over all of them."""

    data: int = setting(-1, "Copies of the model.", at_least(-1))
    fsdp: int = setting(1, "Devices that parameters and optimizer state are split over.", at_least(-1))
    expert: int = setting(1, "Devices that experts are split over.", at_least(-1))
    rules: tuple[tuple[str, Any], ...] = setting(
        DEFAULT_RULES, "Pairs of a logical axis of arrays and the mesh axes that it is split over."
    )

    def __post_init__(self) -> None:
        check_settings(self, "mesh")
        sizes = (self.data, self.fsdp, self.expert)
        check(
            0 not in sizes and sizes.count(-1) <= 1,
            f"mesh.data, mesh.fsdp, mesh.expert are {sizes}, but each must be positive, and at most one of them -1",
        )
        check(
            isinstance(self.rules, list | tuple)
            and all(isinstance(r, list | tuple) and len(r) == 2 for r in self.rules),
            f"mesh.rules is {quoted(self.rules)}, but must be pairs of a logical axis and its mesh axes",
        )
        rules = tuple((name, tuple(axes) if isinstance(axes, list | tuple) else axes) for name, axes in self.rules)
        object.__setattr__(self, "rules", rules)
        for index, (name, axes) in enumerate(rules):
            check(
                name in _LOGICAL_AXES,
                f"mesh.rules gives {quoted(name)}, but the logical axes are {', '.join(map(repr, _LOGICAL_AXES))}"
                f"{closest(quoted(name), _LOGICAL_AXES)}",
            )
            check(name not in dict(rules[:index]), f"mesh.rules gives {name!r} twice, but must once, with all its axes")
            several = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
            check(
                all(axis in AXES for axis in several) and len(set(several)) == len(several),
                f"mesh.rules maps {name!r} to {quoted(axes)}, but must to 'data', 'fsdp', 'expert', each once at most",
            )
