"""Settings of a layer for tests, those of its method given beside the others."""

import dataclasses
from typing import Any

from default_moe.config import MoEConfig
from default_moe.methods import METHODS


def moe_config(**fields: Any) -> MoEConfig:
    return with_settings(MoEConfig(), **fields)


def with_settings(config: MoEConfig, **fields: Any) -> MoEConfig:
    """`config` with fields changed, those of the method among them: with_settings(config, ema_decay=0.5)."""
    of_layer = {f.name for f in dataclasses.fields(MoEConfig)}
    of_method = {name: fields.pop(name) for name in list(fields) if name not in of_layer}
    method = METHODS[fields.pop("router")]() if "router" in fields else config.method
    return dataclasses.replace(config, router=dataclasses.replace(method, **of_method), **fields)
