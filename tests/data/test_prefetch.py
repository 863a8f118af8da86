"""Loading ahead in a thread."""

import threading
import time

import pytest

from default_moe.data import prefetched


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_steps_come_in_order(depth):
    with prefetched(lambda step: step * step, start=3, depth=depth) as squares:
        assert [next(squares) for _ in range(5)] == [9, 16, 25, 36, 49]


@pytest.mark.parametrize("ahead", [0, 2])
def test_loads_so_far_ahead_and_no_further(ahead):
    loaded = []
    with prefetched(loaded.append, start=0, depth=ahead) as loads:
        next(loads)
        deadline = time.monotonic() + 5
        while len(loaded) < 1 + ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert loaded == list(range(1 + ahead))


def test_error_comes_at_its_step():
    with prefetched(lambda step: 1 // (2 - step), start=0, depth=4) as loads:
        assert [next(loads), next(loads)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            next(loads)


def test_leaving_is_prompt_and_ends_the_thread():
    before = threading.active_count()
    with prefetched(lambda step: time.sleep(0.05), start=0, depth=100) as loads:
        next(loads)
        begin = time.monotonic()
    assert time.monotonic() - begin < 1  # one load, not a hundred
    assert threading.active_count() == before
