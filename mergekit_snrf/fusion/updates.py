"""The update of the masked neurons of one tensor, from its difference: truncated (Eq. 10) or thinned out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_snrf.fusion.lowrank import Certificate, certified_factors
from mergekit_snrf.neurons.sites import PROJECTIONS, Site

# Random numbers that are drawn at a time.
_PANEL = 2**20


@dataclass(frozen=True)
class Update:
    """M_S(Delta_r) of one tensor: the ``selected`` neurons only, one a row, as ``left @ right``.

    ``left`` None stands for the identity. ``certificate`` is None where nothing was truncated.
    """

    selected: Int[Tensor, " selected"]
    left: Float[Tensor, "selected rank"] | None
    right: Float[Tensor, "rank length"]
    certificate: Certificate | None = None

    def rows(self, panel: slice = slice(None), axis: int = 0) -> Float[Tensor, "rows columns"]:
        """Return the update of the selected neurons: some of its rows, or of a weight's rows where they are columns."""
        left, right = self.left, self.right
        if axis == 1:
            return right[:, panel].mT if left is None else right[:, panel].mT @ left.mT
        return right[panel] if left is None else left[panel] @ right


def low_rank(
    delta: Float[Tensor, "neurons length"], selected: Int[Tensor, " selected"], rank: int, *, mask_first: bool = False
) -> Update:
    """Return the selected rows of the rank-r truncated SVD of ``delta`` (Eq. 10; 0: full rank).

    With ``mask_first`` the selected rows are truncated, and not ``delta`` (Appendix B).
    """
    whole = delta[selected] if mask_first else delta
    side = min(whole.shape)
    if side == 0 or len(selected) == 0:
        return Update(selected, None, delta[selected])
    if rank == 0 or rank >= side:
        return Update(selected, None, whole if mask_first else delta[selected])
    rows = torch.arange(len(whole), device=whole.device) if mask_first else selected
    return Update(selected, *certified_factors(whole, rank, rows))


def dropped(
    delta: Float[Tensor, "neurons length"],
    selected: Int[Tensor, " selected"],
    drop_rate: float,
    seed: int,
    site: Site,
    *,
    rescale: bool = True,
) -> Update:
    """Return the selected rows with a random share of their elements set to zero (DARE), the rest times 1 / (1 - p).

    The draw depends on ``seed``, layer, projection and the number of selected rows only: rows in ascending order, from
    numpy's legacy MT19937 generator, the one whose stream numpy guarantees never to change.
    """
    generator = np.random.RandomState([seed, site.layer, list(PROJECTIONS).index(site.projection)])
    rows = delta[selected]
    for part in rows.split(max(1, _PANEL // max(1, rows.shape[1]))):
        kept = generator.random_sample(tuple(part.shape)) >= drop_rate
        part.mul_(torch.from_numpy(kept).to(part.device))
    return Update(selected, None, rows / (1 - drop_rate) if rescale else rows)
