"""Threads that work on tensors ahead of whoever needs the results, one thread a tensor.

One thread is faster than many on one matrix, and gives the same bits on every machine size. So the threads of a pool
take one tensor each, in the order in which the results are needed, and hold a bounded number of bytes. Each result
depends on its own tensor alone: any number of workers gives the same bytes.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, NamedTuple, TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")
_STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread, also in threads that are started inside the block.

    Several threads on a matrix of a few thousand rows wait for one another, on a busy machine up to 36 times longer
    than one thread takes, and sum in an order that depends on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_not_stopped() -> None:
    """Raise ``CancelledError`` in a worker whose result is not needed any more; long loops call it."""
    stop = _STOP.get()
    if stop is not None and stop.is_set():
        raise CancelledError


@functools.cache
def memory_limit() -> int:
    """Return how many bytes a look-ahead may hold: an eighth of the machine's memory, at least 2 GiB."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf.
        memory = 0
    return max(2**31, memory // 8)


class Memory(NamedTuple):
    """Bytes that one piece of work holds while it runs, and its result afterwards."""

    working: int
    kept: int


class LookAhead(Generic[K, T]):
    """Results that are computed before they are asked for, within a limit of bytes; made by ``look_ahead``.

    Attributes:
        peak: the largest number of bytes that running and waiting results held at once.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        workers: int,
        keys: Iterable[K],
        work: Callable[[K], T],
        memory: Callable[[K], Memory],
        limit: int,
    ) -> None:
        self._pool, self._workers, self._work, self._memory, self._limit = pool, workers, work, memory, limit
        self._keys = list(keys)
        self._next = 0
        self._started: set[K] = set()
        self._futures: dict[K, Future[T]] = {}
        self._held: dict[K, int] = {}
        self._running: set[K] = set()
        self._stop, self._lock = threading.Event(), threading.RLock()
        self.peak = 0

    def begin(self) -> None:
        """Start the first results."""
        self._advance()

    def __iter__(self) -> Iterator[tuple[K, T]]:
        """Yield every key with its result, in order."""
        for key in self._keys:
            yield key, self.take(key)

    def take(self, key: K) -> T:
        """Return a result, and wait for it if need be; raises what the work raised. Each can be taken once."""
        if self._workers == 0:
            return self._work(key)
        with self._lock:
            if key not in self._started:
                # Asked for in another order than expected: it must not wait for room that others take.
                self._submit(key)
            future = self._futures[key]
        result = future.result()
        with self._lock:
            del self._futures[key], self._held[key]
        self._advance()
        return result

    def stop(self) -> None:
        """Cancel what waits, and let what runs give up at its next step."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _advance(self) -> None:
        with self._lock:
            while self._next < len(self._keys) and len(self._running) < self._workers and not self._stop.is_set():
                key = self._keys[self._next]
                if key not in self._started:
                    if self._held and sum(self._held.values()) + self._memory(key).working > self._limit:
                        return
                    self._submit(key)
                self._next += 1

    def _submit(self, key: K) -> None:
        self._started.add(key)
        self._running.add(key)
        self._held[key] = self._memory(key).working
        self.peak = max(self.peak, sum(self._held.values()))
        self._futures[key] = self._pool.submit(self._run, key)

    def _run(self, key: K) -> T:
        token = _STOP.set(self._stop)
        try:
            return self._work(key)
        except BaseException:
            # Whoever takes this result fails; what comes later is not needed.
            self._next = len(self._keys)
            raise
        finally:
            _STOP.reset(token)
            with self._lock:
                self._running.discard(key)
                self._held[key] = self._memory(key).kept
            self._advance()


@contextmanager
def look_ahead(
    keys: Iterable[K],
    work: Callable[[K], T],
    memory: Callable[[K], Memory],
    *,
    workers: int | None = None,
    limit: int | None = None,
) -> Iterator[LookAhead[K, T]]:
    """Give a ``LookAhead`` whose workers have begun; at the end of the block they stop.

    Inside the block torch uses one thread, in every thread.

    Args:
        keys: in the order in which results are needed.
        work: returns the result of a key; runs on any thread.
        memory: that ``work`` needs; a single result may exceed the limit.
        workers: None: as many as torch has threads, which are the cores unless the user says otherwise; 0: results
            are computed by who takes them, as a GPU's one stream wants it.
        limit: None: ``memory_limit()``.
    """
    count = torch.get_num_threads() if workers is None else workers
    with one_thread(), ThreadPoolExecutor(max(1, count)) as pool:
        ahead = LookAhead(pool, count, keys, work, memory, memory_limit() if limit is None else limit)
        try:
            # An interrupt while the first ones start must stop them too: the pool waits for its threads.
            ahead.begin()
            yield ahead
        finally:
            ahead.stop()
