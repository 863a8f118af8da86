"""The settings as `--help` lists them."""

import dataclasses

from default_moe.config import Config, describe_settings
from default_moe.methods import METHODS


def fields(section):
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(f.type):
            yield from fields(f.type)
        else:
            yield f


def test_every_setting_says_what_it_means():
    for f in [*fields(Config), *(f for method in METHODS.values() for f in fields(method))]:
        assert len(f.metadata["meaning"]) > 10 and f.metadata["meaning"].endswith("."), f.name


def test_settings_are_told_with_default_meaning_and_range():
    text = describe_settings(width=80)
    assert "\n  --config.optim.b1=0.9\n      Decay of the first moment. Must be in [0, 1].\n" in text
    assert "\n\nmoe.loss_free: " in text and "\n\nmoe.topk" not in text
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("      "))
