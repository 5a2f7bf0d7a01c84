"""The look-ahead: order, bytes in flight, errors, and stopping."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_snrf.fusion.threads import Memory, check_not_stopped, look_ahead


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Memory], int, list[int]]:
    """Bytes of each piece of work, the limit, and the order in which results are taken."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12))
    memory = [Memory(max(pair), min(pair)) for pair in sizes]
    return memory, draw(st.integers(0, 120)), draw(st.permutations(range(len(sizes))))


@settings(max_examples=30, deadline=None)
@given(jobs(), st.integers(1, 5), st.booleans())
def test_results_come_in_any_order_and_within_the_limit(
    job: tuple[list[Memory], int, list[int]], workers: int, as_planned: bool
) -> None:
    memory, limit, order = job
    lock, held, seen, runs = threading.Lock(), 0, 0, []

    def work(key: int) -> int:
        nonlocal held, seen
        with lock:
            runs.append(key)
            held += memory[key].working
            seen = max(seen, held)
        time.sleep(0)
        with lock:
            held -= memory[key].working
        return key * key

    with look_ahead(range(len(memory)), work, memory.__getitem__, workers=workers, limit=limit) as ahead:
        assert torch.get_num_threads() == 1
        for key in range(len(memory)) if as_planned else order:
            assert ahead.take(key) == key * key
    assert sorted(runs) == list(range(len(memory)))
    if as_planned:
        # Only what is larger than the limit by itself may exceed it, and then it is alone.
        assert seen <= ahead.peak <= max([limit, *(one.working for one in memory)])


def test_without_workers_the_taker_computes() -> None:
    threads: list[int] = []
    with look_ahead(
        "ab", lambda key: threads.append(threading.get_ident()), lambda key: Memory(1, 1), workers=0
    ) as ahead:
        assert [key for key, _ in ahead] == ["a", "b"]
    assert threads == [threading.get_ident()] * 2


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_raised_where_its_result_is_taken(workers: int) -> None:
    def work(key: int) -> int:
        if key == 3:
            raise ValueError(f"of {key}")
        return key

    with look_ahead(range(100), work, lambda key: Memory(1, 1), workers=workers, limit=50) as ahead:
        results = iter(ahead)
        assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
        with pytest.raises(ValueError, match="of 3"):
            next(results)


def test_the_end_of_the_block_stops_what_runs() -> None:
    """Both workers would run for ever, and the third piece of work never begins."""
    begun, stopped = [], []

    def work(key: int) -> None:
        begun.append(key)
        try:
            while True:
                check_not_stopped()
                time.sleep(0.001)
        except CancelledError:
            stopped.append(key)
            raise

    with look_ahead(range(3), work, lambda key: Memory(1, 1), workers=2, limit=9):
        while len(begun) < 2:
            time.sleep(0.001)
    assert sorted(begun) == sorted(stopped) == [0, 1]
    check_not_stopped()


def test_an_interrupt_while_the_first_ones_start_stops_them() -> None:
    begun, ended = threading.Event(), []

    def work(key: str) -> None:
        begun.set()
        until = time.monotonic() + 20
        try:
            while time.monotonic() < until:
                check_not_stopped()
                time.sleep(0.01)
        except CancelledError:
            ended.append(key)
            raise

    def memory(key: str) -> Memory:
        if key == "second":
            assert begun.wait(20)
            raise KeyboardInterrupt
        return Memory(1, 1)

    with pytest.raises(KeyboardInterrupt), look_ahead(["first", "second"], work, memory, workers=2):
        pass
    assert ended == ["first"]
