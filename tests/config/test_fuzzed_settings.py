"""Any value of any setting: it makes a config, or is refused in one line. Nothing else is ever raised."""

import sys
from typing import Any

import jax
from absl import flags
from helpers.steps import CONFIG, VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from default_moe import cli
from default_moe.config import Config, ConfigError, default_config, flat_items
from default_moe.training.program import Program

DEFAULTS = dict(flat_items(default_config().to_dict()))
NAMES = [*DEFAULTS, "model", "moe", "moe.default", "train", "no.such", "model.d_modle"]

# Values near bounds are likelier to be right, and to work together.
INTEGERS = st.one_of(
    st.integers(-2, 40),
    st.builds(lambda power, off: 2**power + off, st.integers(3, 70), st.integers(-1, 1)),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 10**400, 10**5000]),
)
FLOATS = st.one_of(st.floats(), st.floats(0, 1), st.sampled_from([1e308, -1e308, 5e-324, 1 - 1e-12, 1.0]))
TEXTS = st.one_of(
    st.text(st.characters(codec=None), max_size=20),
    st.sampled_from(
        ["", "\0", "\ud800", "a\nb", "x" * 10**5, "bpe:\u0663\u0660\u0660", f"bpe:{'9' * 30}", "~nobody/x"]
    ),
    st.sampled_from(["auto", "float32", "bfloat16", "topk", "remoe", "sparsemixer", "sigmoid", "backward", "bpe:300"]),
)
AXES = st.sampled_from(["data", "fsdp", "expert", "batch", "embed", "heads", "mlp", "vocab", "odd", None])
RULES = st.lists(st.tuples(AXES, st.one_of(AXES, st.lists(AXES, max_size=4))), max_size=8)
VALUES = st.one_of(
    INTEGERS,
    FLOATS,
    TEXTS,
    st.booleans(),
    st.none(),
    RULES,
    st.lists(st.one_of(INTEGERS, TEXTS), max_size=3),
    st.dictionaries(TEXTS, INTEGERS, max_size=2),
)
BY_TYPE = {int: INTEGERS, float: FLOATS, str: TEXTS, bool: st.booleans(), tuple: RULES}


def of_its_type(name: str) -> Any:
    return BY_TYPE.get(type(DEFAULTS.get(name)), VALUES)


# A setting and its value, more often than not one of the right type.
SETTINGS = st.sampled_from(NAMES).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(of_its_type(name), of_its_type(name), VALUES))
)
SOME = st.lists(SETTINGS, min_size=1, max_size=2)

SMALL = {int: st.integers(0, 12), float: st.floats(0, 1), str: TEXTS, bool: st.booleans(), tuple: RULES}
# Most of these pass the checks of one setting alone.
FITTING = st.lists(
    st.sampled_from(list(DEFAULTS)).flatmap(
        lambda name: st.tuples(st.just(name), SMALL.get(type(DEFAULTS[name]), SMALL[int]))
    ),
    min_size=1,
    max_size=3,
)


def settings_of(drawn) -> dict[str, Any]:
    mapping = CONFIG.to_dict()
    for name, value in drawn:
        *groups, last = name.split(".")
        section = mapping
        for group in groups:
            inner = section.get(group)
            section[group] = section = inner if isinstance(inner, dict) else {}
        section[last] = value
    return mapping


def checked(make) -> Config | None:
    """The config that is made, if it is; the same again from what it is stored as."""
    try:
        config = make()
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, str(error)
        assert str(error).isprintable()
        return None
    assert Config.from_mapping(config.to_dict()) == config
    return config


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SOME)
def test_a_stored_config_is_right_or_refused_in_one_line(drawn):
    checked(lambda: Config.from_mapping(settings_of(drawn)))


def on_the_command_line(words: list[str]) -> Config:
    """The config of a program with these words behind its name, where `config_flags` looks for them too."""
    values, before = flags.FlagValues(), sys.argv
    sys.argv = ["train.py", "--config=configs/quickstart.py", *words]
    try:
        holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
        cli.parse_flags(sys.argv, values)
        return Config.from_config_dict(holder.value)
    finally:
        sys.argv = before


def as_text(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # Python does not write integers of more than some thousand digits
        return "9" * 5000


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(SOME)
def test_flags_are_right_or_refused_in_one_line(drawn):
    checked(lambda: on_the_command_line([f"--config.{name}={as_text(value)}" for name, value in drawn]))


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(FITTING)
def test_a_program_is_made_or_refused_in_one_line(drawn):
    config = checked(lambda: Config.from_mapping(settings_of(drawn)))
    if config is None:
        return

    def made() -> Config:
        return Program(config, VOCAB, jax.devices()[:1]).config

    checked(made)
