"""A running merge: its plan, what was counted of it, and its card; mergekit finds it by a key in the configuration."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorEntry
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.threads import one_thread
from mergekit_snrf.merge.cards import merge_card
from mergekit_snrf.merge.plan import MergePlan, PlannedEdit
from mergekit_snrf.merge.tally import Tally
from mergekit_snrf.merge.tensors import check_cast, filters_of, fuse_edit
from mergekit_snrf.models.headers import FLOAT_DTYPES


class MergeSession:
    """One merge while mergekit runs it.

    Attributes:
        key: what mergekit finds it by.
        tally: of what was done so far.

    Args:
        recipe: its text, for the card.
        name: of the merged model, for the card.
    """

    def __init__(self, plan: MergePlan, recipe: str, name: str = "merged") -> None:
        self.plan = plan
        self.key = f"session {uuid.uuid4()}"
        self.tally = Tally(len(plan.edits), allow_noop=bool(plan.recipe.value("allow_noop")))
        self._recipe, self._name = recipe, name
        self._filters = filters_of(plan)
        self._edits: dict[str, PlannedEdit] = {edit.target_name: edit for edit in plan.edits}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let mergekit find the session in the block."""
        _SESSIONS[self.key] = self
        try:
            yield
        finally:
            del _SESSIONS[self.key]

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
            names = {"target": name, "source": edit.source_name, "source_base": edit.source_base_name}
            for (role, own), entry in zip(names.items(), (base, *donors), strict=False):
                self._check_read(role, str(own), entry)
            tensors = [entry.tensor for entry in donors]
            with one_thread():
                second = tensors[1] if len(tensors) > 1 else None
                fused = fuse_edit(edit, base.tensor, tensors[0], second, self._filters)
            self.tally.add(name, fused)
            result = fused.tensor
        # mergekit casts when it saves; finite weights that are infinite then would go unnoticed.
        check_cast(result, dtype_from_name(self.plan.recipe.out_dtype), name)
        return result

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
        return merge_card(self.plan, self._name, self._recipe, cast=recipe.out_dtype or recipe.dtype, changed=changed)


_SESSIONS: dict[str, MergeSession] = {}


def find_session(key: str) -> MergeSession:
    """Return the running session of a key.

    Raises:
        SnrfError: there is none.
    """
    if key not in _SESSIONS:
        what = f"no snrf merge with masks {key!r} is running"
        raise SnrfError(None, what, "import mergekit_snrf.merge before run_merge, and call run_merge")
    return _SESSIONS[key]
