"""How the package says no: one error, of one line."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from default_moe.errors import ConfigError


@contextlib.contextmanager
def refused(pattern: str, error: type[Exception] = ConfigError) -> Iterator[None]:
    with pytest.raises(error) as caught:
        yield
    assert re.search(pattern, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
