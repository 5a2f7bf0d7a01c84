"""A running merge: its plan, its look-ahead, what was counted of it, and its card.

mergekit finds it by a key in the configuration. mergekit's executor runs one task after another, in the order of the
tensors' names: it loads a tensor, merges it, and keeps it until a shard is full. The session has the planned edits and
the same order. So while the executor maps, copies and writes on the main thread, a pool of threads reads the tensors
of the next edits from the shards, with plain reads and each byte once, and fuses them; where the executor wants an
edited tensor, it takes it from the session, in most cases finished. mergekit's own loader opens these tensors' files,
but never touches them (``merge/adapter.py``).

``fusion/threads.py`` bounds the memory, and the number of workers (``--num-threads``, by default the cores) changes no
byte. A failure in a worker is raised where the executor takes the tensor, as if it had fused it itself.

On another device than the CPU, and for weights in .bin files, mergekit loads the tensors and the session fuses them on
the executor's own stream.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorEntry
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_snrf.fusion.fuse import Fused, fuse
from mergekit_snrf.fusion.threads import LookAhead, look_ahead, one_thread
from mergekit_snrf.merge.cards import merge_card
from mergekit_snrf.merge.method import SESSIONS
from mergekit_snrf.merge.plan import MergePlan, PlannedEdit
from mergekit_snrf.merge.tally import Tally
from mergekit_snrf.merge.tensors import Tensors, check_cast, kernel_options
from mergekit_snrf.models.moments import Filters
from mergekit_snrf.models.shards import FLOAT_DTYPES


class MergeSession:
    """One merge while mergekit runs it.

    Attributes:
        key: what mergekit finds it by.
        tally: of what was done so far.

    Args:
        recipe: its text, for the card.
    """

    def __init__(self, plan: MergePlan, recipe: str) -> None:
        self.plan = plan
        self.key = f"session {uuid.uuid4()}"
        self.tally = Tally(len(plan.edits), allow_noop=bool(plan.recipe.value("allow_noop")))
        self._recipe = recipe
        self._filters = None if plan.moments is None else Filters(plan.moments)
        self._edits: dict[str, PlannedEdit] = {edit.target_name: edit for edit in plan.edits}
        self._ahead: LookAhead[str, Fused] | None = None

    @contextmanager
    def running(self, options: MergeOptions | None = None) -> Iterator[None]:
        """Let mergekit find the session in the block, and fuse ahead of it; not without options."""
        SESSIONS[self.key] = self
        try:
            if options is None or not self._can_look_ahead(options):
                yield
                return
            tensors = Tensors(self.plan, options)
            with look_ahead(
                sorted(self._edits),
                lambda name: tensors.whole(self._edits[name]),
                lambda name: tensors.memory(self._edits[name], whole=True),
                workers=options.num_threads,
            ) as self._ahead:
                yield
        finally:
            self._ahead = None
            del SESSIONS[self.key]

    def _can_look_ahead(self, options: MergeOptions) -> bool:
        files = (entry.file for model in self.plan.models.values() for entry in model.checkpoint.tensors.values())
        on_cpu = not options.multi_gpu and torch.device(options.device or "cpu").type == "cpu"
        return on_cpu and all(file.endswith(".safetensors") for file in files)

    @property
    def looks_ahead(self) -> bool:
        """Whether edited tensors come from ``fused``, and mergekit need not load them."""
        return self._ahead is not None

    def fused(self, name: str) -> Tensor:
        """Return an edited tensor that was fused ahead; raises as ``merged``."""
        assert self._ahead is not None
        return self._finished(name, self._ahead.take(name))

    def merged(self, name: str, base: TensorEntry, donors: Sequence[TensorEntry]) -> Tensor:
        """Return the output's tensor: fused as planned, or the base's.

        Args:
            name: in the target.
            base: of the target, already in the recipe's dtype.
            donors: of source and, where the recipe has one, source_base.

        Raises:
            SnrfError: a weight is not finite, or a dtype of the recipe cannot hold it.
        """
        edit = self._edits.get(name) if donors else None
        if edit is None:
            self._check_read("target", name, base)
            result = base.tensor
        else:
            for (role, own), entry in zip(edit.names.items(), (base, *donors), strict=True):
                self._check_read(role, own, entry)
            weights = dict(zip(edit.names, (entry.tensor for entry in (base, *donors)), strict=True))
            with one_thread():
                return self._finished(name, fuse(**weights, **kernel_options(edit, self._filters)))
        self._check_written(name, result)
        return result

    def _finished(self, name: str, fused: Fused) -> Tensor:
        self.tally.add(name, fused)
        self._check_written(name, fused.tensor)
        return fused.tensor

    def _check_written(self, name: str, tensor: Tensor) -> None:
        """mergekit casts when it saves; finite weights that are infinite then would go unnoticed."""
        check_cast(tensor, dtype_from_name(self.plan.recipe.out_dtype), name)

    def _check_read(self, role: str, name: str, entry: TensorEntry) -> None:
        """Find weights that became infinite when mergekit read them in the recipe's dtype."""
        stored, tensor = FLOAT_DTYPES.get(self.plan.checkpoints[role].tensors[name].dtype), entry.tensor
        if stored is None or getattr(torch, stored) == tensor.dtype or not tensor.numel():
            return
        if not all(bool(end.isfinite()) for end in tensor.aminmax()):
            check_cast(LoaderCache().get(entry.id).get_tensor(name), tensor.dtype, name)

    def card(self) -> str:
        """Return the README of the merged folder."""
        recipe = self.plan.recipe
        # What mergekit rounds after the method has returned was not counted.
        changed = None if recipe.out_dtype else self.tally.changed
        return merge_card(self.plan, self._recipe, cast=recipe.out_dtype or recipe.dtype, changed=changed)
