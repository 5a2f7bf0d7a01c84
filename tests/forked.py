"""A function in a fork of this process: as a command of its own, without importing torch again."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

import torch


def forked(function: Callable[[], object]) -> int:
    """Run a function in a child and wait; return its exit code, or minus the number of the signal that ended it."""
    child = start_forked(function)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked_ranks(function: Callable[[], object]) -> list[int]:
    """Run a function in two children, the ranks of one run as torchrun starts them; return their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}

    def start(rank: str) -> int:
        def ranked() -> None:
            os.environ |= {**place, "RANK": rank, "LOCAL_RANK": rank}
            function()

        return start_forked(ranked)

    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [start(rank) for rank in "01"]]


def start_forked(function: Callable[[], object]) -> int:
    """Start a function in a child and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    os._exit(code)
