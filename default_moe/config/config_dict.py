"""Settings as ml_collections holds them, in config files and on the command line."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from default_moe.config.eval_sets import SetsReference
from default_moe.config.mappings import flat_items
from default_moe.config.run import Config
from default_moe.methods import groups_of_settings
from default_moe.methods.settings import optional_type


def default_config() -> ConfigDict:
    """A locked ConfigDict with every setting at its default. Fields that may stay unset are typed placeholders."""
    config = _defaults(Config)
    for name, method in groups_of_settings().items():
        if dataclasses.fields(method):
            config.moe[name] = _defaults(method)
    del config.eval.sets
    config.eval.sets = SetsReference(None, field_type=str)
    return config.lock()


def _defaults(section: Any) -> ConfigDict:
    values = ConfigDict()
    for f in dataclasses.fields(section):
        optional = optional_type(f.type)
        if optional:
            values[f.name] = config_dict.placeholder(optional)
        else:
            values[f.name] = _defaults(f.type) if dataclasses.is_dataclass(f.type) else f.default
    return values


def to_config_dict(config: Config) -> ConfigDict:
    """The locked ConfigDict that stands for `config`."""
    result = default_config()
    result.update_from_flattened_dict({name: v for name, v in flat_items(config.to_dict()) if v is not None})
    return result
