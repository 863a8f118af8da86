"""Work for later steps done in a background thread."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def prefetched(load: Callable[[int], T], start: int, depth: int) -> Iterator[Iterator[T]]:
    """An iterator over load(start), load(start + 1), ..., computed up to `depth` ahead (0: none) in one thread.

    An exception of load(step) is raised by the `next` that would have returned it. On leaving, what has not begun is
    cancelled, and a load that has is waited for.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    results = (thread.submit(load, step) for step in itertools.count(start))
    ahead = deque(itertools.islice(results, depth))

    def in_order() -> Iterator[T]:
        for result in results:
            ahead.append(result)
            yield ahead.popleft().result()

    try:
        yield in_order()
    finally:
        thread.shutdown(cancel_futures=True)
