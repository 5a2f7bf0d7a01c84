"""A function in a fork of this process: as a command of its own, without importing torch again."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch


def forked(function: Callable[[], object]) -> int:
    """Run a function in a child and wait; return its exit code, or minus the number of the signal that ended it."""
    child = start_forked(function)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
