"""Settings as ml_collections holds them, in config files and on the command line."""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from default_moe.checks import optional_type
from default_moe.config import Config, flat_items


def default_config() -> ConfigDict:
    """A locked ConfigDict with every setting at its default. Fields that may stay unset are typed placeholders."""
    config = ConfigDict()
    for section in dataclasses.fields(Config):
        config[section.name] = ConfigDict()
        for f in dataclasses.fields(typing.cast(Any, section.type)):
            optional = optional_type(f.type)
            config[section.name][f.name] = config_dict.placeholder(optional) if optional else f.default
    return config.lock()


def to_config_dict(config: Config) -> ConfigDict:
    """The locked ConfigDict that stands for `config`."""
    result = default_config()
    for name, value in flat_items(config.to_dict()):
        if value is not None:
            section, key = name.split(".")
            result[section][key] = value
    return result
