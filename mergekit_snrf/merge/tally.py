"""What a whole merge did to its tensors: certificates, and what rounding leaves of the update."""

from __future__ import annotations

import logging
import math
import threading

from mergekit_snrf.fusion.fuse import Rounding
from mergekit_snrf.fusion.lowrank import Certificate

LOG = logging.getLogger(__name__)
LOST_TOO_MUCH = 0.5


class Tally:
    """Counts the edited tensors of one merge and speaks when the last one is done; shared by worker threads."""

    def __init__(self, expected: int) -> None:
        self._lock = threading.Lock()
        self._expected = expected
        self._certificates: list[Certificate] = []
        self._roundings: list[Rounding] = []

    def add(self, name: str, certificate: Certificate | None, rounding: Rounding) -> bool:
        """Take note of one tensor, and return whether it was the last; log the sum, or a warning, with that."""
        LOG.info("%s: %s", name, in_words(certificate, rounding))
        with self._lock:
            self._roundings.append(rounding)
            if certificate is not None:
                self._certificates.append(certificate)
            if len(self._roundings) != self._expected:
                return False
        LOG.info("%s", self.summary())
        if self.lost > LOST_TOO_MUCH:
            LOG.warning("%s", self.sentence())
        else:
            LOG.info("%s", self.sentence())
        return True

    @property
    def changed(self) -> int | None:
        """Number of weights that differ from the target's, None as long as tensors are missing."""
        with self._lock:
            if len(self._roundings) != self._expected:
                return None
            return sum(rounding.changed for rounding in self._roundings)

    @property
    def lost(self) -> float:
        """Norm of what rounding to the output's dtype takes away, as a share of the norm of the update."""
        update = math.hypot(*(rounding.update for rounding in self._roundings))
        return math.hypot(*(rounding.lost for rounding in self._roundings)) / update if update else 0.0

    def summary(self) -> str:
        """Say how many tensors were fused, and how well those that were truncated."""
        said = f"{len(self._roundings)} tensors fused, {len(self._certificates)} of them truncated"
        if not self._certificates:
            return said
        ranks = sorted({certificate.rank for certificate in self._certificates})
        shares = [certificate.captured for certificate in self._certificates]
        return (
            f"{said} to rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}, which captures "
            f"{100 * min(shares):.1f} % to {100 * max(shares):.1f} % of the energy, estimated error at most "
            f"{max(certificate.est for certificate in self._certificates):.0e}"
        )

    def sentence(self) -> str:
        """Say how much of the update survives, and what helps where most of it does not."""
        weights = sum(rounding.weights for rounding in self._roundings)
        changed = sum(rounding.changed for rounding in self._roundings)
        said = (
            f"rounding to the output's dtype takes {self.lost:.0%} of the update's norm; {changed} of {weights} "
            f"masked weights change"
        )
        if self.lost <= LOST_TOO_MUCH:
            return said
        return f"{said}; write dtype: float32 into the recipe, or export the update with 'snrf lora', to keep it"


def kept(rounding: Rounding) -> float:
    """Return the share of the update's norm that rounding leaves, in [0, 1]; 1 for an update of zero."""
    return max(0.0, 1 - rounding.lost / rounding.update) if rounding.update else 1.0


def in_words(certificate: Certificate | None, rounding: Rounding) -> str:
    """Describe the update of one tensor: how it was truncated, how well, and what rounding leaves of it."""
    if certificate is None:
        truncated = "not truncated"
    else:
        certain = "not unique" if certificate.degenerate else f"estimated error {certificate.est:.0e}"
        truncated = (
            f"{certificate.method}, rank {certificate.rank}, {certificate.passes} "
            f"{'pass' if certificate.passes == 1 else 'passes'}, captures {100 * certificate.captured:.1f} % of the "
            f"energy, {certain}"
        )
    return f"{truncated}, rounding keeps {100 * kept(rounding):.0f} %"
