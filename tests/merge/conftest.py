from __future__ import annotations

import contextlib
from typing import Any

import mergekit.multigpu_executor as multi_gpu
import pytest
import torch
from pair import Pair, make_pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Remote(Tensor):
    """A tensor that says it lies on another device; its numbers are kept in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the accelerator")


class Accelerator(TorchDispatchMode):
    """Makes of device `meta` an accelerator that computes: tensors must be moved to it, and do not mix with others."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        remote = any(isinstance(tensor, Remote) for tensor in tensors)
        moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if remote and not moves and any(t.ndim and not isinstance(t, Remote) for t in tensors):
            raise RuntimeError(f"{func}: expected all tensors on the same device")
        if kwargs.get("device") is not None:
            remote = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = "cpu"
        if remote:
            self.operations.add(func.overloadpacket._qualified_op_name)
        args_here, kwargs_here = tree_map(lambda t: t.inner if isinstance(t, Remote) else t, (args, kwargs))
        result = func(*args_here, **kwargs_here)
        if func._schema.name.endswith("_"):
            return args[0]
        return tree_map(lambda t: Remote(t) if remote and isinstance(t, Tensor) else t, result)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One pair for all; a test that changes a model works on a copy."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def two_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mergekit's executor for several GPUs run its threads on this CPU."""
    monkeypatch.setattr(multi_gpu, "get_torch_accelerator_type", lambda name=None: "cpu")
    monkeypatch.setattr(multi_gpu, "get_torch_accelerator_count", lambda name=None: 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
