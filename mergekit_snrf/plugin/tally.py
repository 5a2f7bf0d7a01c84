"""What a whole merge did to its tensors: certificates, and what rounding leaves of the update."""

from __future__ import annotations

import logging
import math
import threading

from mergekit_snrf.fusion import Rounding
from mergekit_snrf.lowrank import Certificate

LOG = logging.getLogger(__name__)
LOST_TOO_MUCH = 0.5


class Tally:
    """Counts the edited tensors of one merge and speaks when the last one is done; shared by worker threads."""

    def __init__(self, expected: int) -> None:
        self._lock = threading.Lock()
        self._expected = expected
        self._roundings: list[Rounding] = []

    def add(self, name: str, certificate: Certificate | None, rounding: Rounding) -> None:
        """Take note of one tensor; log the sum, or a warning, with the last."""
        LOG.info("%s: %s, %s", name, rounding, certificate)
        with self._lock:
            self._roundings.append(rounding)
            if len(self._roundings) != self._expected:
                return
        if self.lost > LOST_TOO_MUCH:
            LOG.warning("%s", self.sentence())
        else:
            LOG.info("%s", self.sentence())

    @property
    def lost(self) -> float:
        """Norm of what rounding to the output's dtype takes away, as a share of the norm of the update."""
        update = math.hypot(*(rounding.update for rounding in self._roundings))
        return math.hypot(*(rounding.lost for rounding in self._roundings)) / update if update else 0.0

    def sentence(self) -> str:
        """Say how much of the update survives, and what helps where most of it does not."""
        weights = sum(rounding.weights for rounding in self._roundings)
        changed = sum(rounding.changed for rounding in self._roundings)
        said = (
            f"rounding to the checkpoint's dtype takes {self.lost:.0%} of the update's norm; {changed} of {weights} "
            f"masked weights change"
        )
        if self.lost <= LOST_TOO_MUCH:
            return said
        return f"{said}; write dtype: float32 into the recipe, or export the update with 'snrf lora', to keep it"
