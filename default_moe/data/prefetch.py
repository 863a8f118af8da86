"""Work for later steps done in a background thread."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over load(start), load(start + 1), ..., computed up to `depth` ahead (0: none) in one thread.

    An exception of load(step) is raised by the `next` that would have returned it. Close it, or use it in a `with`.
    """

    def __init__(self, load: Callable[[int], T], start: int, depth: int) -> None:
        self._load = load
        self._next_step = start
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()
        self._closed = False
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        self._ahead.append(self._thread.submit(self._load, self._next_step))
        self._next_step += 1

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        self._submit()
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Cancels what has not begun and waits for the load that has."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
