"""Errors that a user sees."""

import contextlib
from collections.abc import Iterator

import pytest

from default_moe.errors import ConfigError


@contextlib.contextmanager
def refused(words: str, kind: type[Exception] = ConfigError) -> Iterator[pytest.ExceptionInfo]:
    """What is done meanwhile raises one line that `words`, a regular expression, matches."""
    with pytest.raises(kind, match=words) as error:
        yield error
    assert "\n" not in str(error.value)
