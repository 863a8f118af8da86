"""Loading ahead in a thread."""

import threading
import time

import pytest

from default_moe.data import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_steps_come_in_order(depth: int) -> None:
    with Prefetcher(lambda step: step * step, start=3, depth=depth) as squares:
        assert [next(squares) for _ in range(5)] == [9, 16, 25, 36, 49]


@pytest.mark.parametrize(("depth", "ahead"), [(0, 0), (2, 2)])
def test_loads_so_far_ahead_and_no_further(depth: int, ahead: int) -> None:
    loaded = []
    with Prefetcher(loaded.append, start=0, depth=depth) as loads:
        next(loads)
        deadline = time.monotonic() + 5
        while len(loaded) < 1 + ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert loaded == list(range(1 + ahead))


def test_error_comes_at_its_step() -> None:
    def load(step: int) -> int:
        if step == 2:
            raise OSError("step 2")
        return step

    with Prefetcher(load, start=0, depth=4) as loads:
        assert [next(loads), next(loads)] == [0, 1]
        with pytest.raises(OSError, match="step 2"):
            next(loads)


def test_close_is_prompt_and_ends_the_thread() -> None:
    before = threading.active_count()
    loads = Prefetcher(lambda step: time.sleep(0.05), start=0, depth=100)
    next(loads)
    begin = time.monotonic()
    loads.close()
    loads.close()
    assert time.monotonic() - begin < 1  # one load, not a hundred
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loads)
