"""One thread a tensor: faster than many threads on one matrix, and the same bits on every machine size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread.

    Several threads on a matrix of a few thousand rows wait for one another, on a busy machine up to 36 times longer
    than one thread takes, and sum in an order that depends on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
