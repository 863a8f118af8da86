"""The settings of the device mesh."""

from dataclasses import dataclass
from typing import Any

from default_moe.errors import check, closest
from default_moe.methods.settings import check_settings
from default_moe.sharding import AXES, DEFAULT_RULES

_LOGICAL_AXES = [name for name, _ in DEFAULT_RULES]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (-1, once: all that are left), and the mesh axes of each logical axis.

    data: copies of the model.  fsdp: parameters and optimizer state split over it.  expert: experts split over it.
    The batch is split over all three.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    rules: tuple[tuple[str, Any], ...] = DEFAULT_RULES

    def __post_init__(self) -> None:
        check_settings(self, "mesh")
        sizes = (self.data, self.fsdp, self.expert)
        check(
            all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh.data, mesh.fsdp, mesh.expert are {sizes}, but each must be positive, and at most one of them -1",
        )
        check(
            isinstance(self.rules, list | tuple)
            and all(isinstance(r, list | tuple) and len(r) == 2 for r in self.rules),
            f"mesh.rules is {self.rules!r}, but must be pairs of a logical axis and its mesh axes",
        )
        rules = tuple((name, tuple(axes) if isinstance(axes, list | tuple) else axes) for name, axes in self.rules)
        object.__setattr__(self, "rules", rules)
        for name, axes in rules:
            check(name in _LOGICAL_AXES, f"mesh.rules has no logical axis {name!r}{closest(str(name), _LOGICAL_AXES)}")
            for axis in axes if isinstance(axes, tuple) else (axes,):
                check(
                    axis in (*AXES, None),
                    f"mesh.rules maps {name!r} to {axis!r}, but the mesh axes are 'data', 'fsdp' and 'expert'",
                )
