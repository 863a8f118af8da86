"""What is wrong with a setting, said in one line."""

import difflib


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: what is wrong and what would be right."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")


def check_at_least(name: str, value: float, least: float) -> None:
    check(value >= least, f"{name} is {value}, but must be at least {least}")


def check_fraction(name: str, value: float) -> None:
    check(0 <= value <= 1, f"{name} is {value}, but must lie in [0, 1]")


def closest(name: str, known: list[str]) -> str:
    """'; did you mean ...?' with the known name closest to `name`, or an empty string if none is close."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
