"""mergekit's planner, except that tensors which a session fuses ahead are taken from it."""

from __future__ import annotations

from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.graph import Task
from mergekit.plan import MergePlanner
from torch import Tensor

from mergekit_snrf.merge.session import find_session


class FusedTensor(Task[Tensor]):
    """An edited tensor of a running session: nothing is loaded for it."""

    key: str
    name: str

    def arguments(self) -> dict[str, Task]:
        """Return no tasks."""
        return {}

    def group_label(self) -> str:
        """Return the name: mergekit's executor sorts by it, as the session does."""
        return self.name

    def execute(self, **_: Any) -> Tensor:
        """Return the tensor."""
        return find_session(self.key).fused(self.name)


class SessionPlanner(MergePlanner):
    """Plans the configuration of ``rewritten``."""

    def plan_tensor(self, weight: WeightInfo, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        """Plan one tensor of the output; an edited one is that which has a source."""
        key = str((self.config.parameters or {}).get("masks"))
        if len(models) > 1 and find_session(key).looks_ahead:
            self._tensors.append((weight, FusedTensor(key=key, name=weight.name)))
        else:
            super().plan_tensor(weight, weights_in, models, cfg_reader)
