"""What comes from the coordinator's port, which anybody may reach, is not trusted."""

from typing import Any

import pytest
from helpers.refusals import refused

from default_moe.errors import AnotherProcessFailed, TrainingFailed
from default_moe.processes import distributed


class Said:
    """The key-value store, with what somebody wrote there."""

    def __init__(self, **said: str):
        self._said = said

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(f"{folder}{name}", text) for name, text in self._said.items()]

    def key_value_set(self, key: str, value: str) -> None:
        pass


def linked(**said: str) -> Any:
    """This process, the first of two, without the thread that watches."""
    link = object.__new__(distributed._Processes)
    link.index, link.failure, link._count, link._round, link._client = 0, None, 2, 0, Said(**said)
    return link


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ('["process 1: no", 2]', ("process 1: no", 2)),
        ('["all is well", 0]', ("all is well", 1)),
        ('["x", true]', ("x", 1)),
        ('["x", 256]', ("x", 1)),
        ('["x", -9]', ("x", 1)),
        ('["x", "2"]', ("x", 1)),
        ('["\\u001b]0;title\\u0007\\n", 3]', ("\\x1b]0;title\\x07\\n", 3)),
        ("{}", ("{}", 1)),
        ("[1]", ("[1]", 1)),
        ("hello \x1b[2J", ("hello \\x1b[2J", 1)),
        ("[" * 100_000, ("[" * 1997 + "...", 1)),
    ],
)
def test_what_another_process_says_of_its_end_is_not_trusted(text, failure):
    """Whoever reaches the coordinator's port can say it."""
    with pytest.raises(AnotherProcessFailed) as error:
        linked(**{"1": text, "stranger": "[]", "7": "[]", "-1": "[]"}).look()
    assert (str(error.value), error.value.code) == failure


@pytest.mark.parametrize("text", ["no JSON", "[" * 100_000, '"\x00'])
def test_what_another_process_shares_is_json_or_ends_the_run(text):
    with refused("a stranger on the coordinator's port", TrainingFailed):
        linked(**{"0": "1", "1": text}).share(1)
