"""What a whole merge did to its tensors: certificates, what rounding leaves, and whether anything changed."""

from __future__ import annotations

import logging
import math
import threading

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fused, Rounding
from mergekit_snrf.fusion.lowrank import Certificate

LOG = logging.getLogger(__name__)
LOST_TOO_MUCH = 0.5


class Tally:
    """Counts the edited tensors of one merge, ``expected`` in all; shared by worker threads."""

    def __init__(self, expected: int, *, allow_noop: bool = False) -> None:
        self._lock = threading.Lock()
        self._expected = expected
        self._allow_noop = allow_noop
        self._certificates: list[Certificate] = []
        self._roundings: list[Rounding] = []

    def add(self, name: str, fused: Fused) -> None:
        """Take note of one tensor; with the last, log the sum. ``SnrfError``: no weight of any tensor changes."""
        LOG.info("%s: %s", name, in_words(fused.certificate, fused.rounding))
        with self._lock:
            self._roundings.append(fused.rounding)
            if fused.certificate is not None:
                self._certificates.append(fused.certificate)
            if len(self._roundings) != self._expected:
                return
        problem = self.problem()
        if problem is not None and not self._allow_noop:
            raise problem
        LOG.info("%s", self.summary())
        LOG.log(logging.WARNING if self.lost > LOST_TOO_MUCH else logging.INFO, "%s", self.sentence())
        if warning := self.zeros():
            LOG.warning(warning)

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

    def problem(self) -> SnrfError | None:
        """Return what is wrong where no tensor changes, or None."""
        if not self._roundings or any(rounding.changed for rounding in self._roundings):
            return None
        if not any(rounding.update for rounding in self._roundings):
            return no_update(len(self._roundings))
        what = "no masked weight changes: rounding to the output's dtype takes the whole update"
        return SnrfError(None, what, "write dtype: float32 into the recipe, or set allow_noop: true")

    def zeros(self) -> str:
        """Say how many tensors have an update of zero; empty if none or all have."""
        count = sum(not rounding.update for rounding in self._roundings)
        return some_without_update(count, len(self._roundings)) if count < len(self._roundings) else ""

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


def no_update(tensors: int) -> SnrfError:
    """Return the error of a merge whose masked differences are all zero."""
    what = f"the update of all {tensors} edited tensors is zero: source and target are equal at the masked neurons"
    return SnrfError(None, what, "check the source (or source_base), or set allow_noop: true")


def some_without_update(count: int, tensors: int) -> str:
    """Return the warning of tensors whose masked difference is zero; empty if there are none."""
    if not count:
        return ""
    return f"{count} of {tensors} edited tensors have an update of zero: the models are equal at their masked neurons"


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
