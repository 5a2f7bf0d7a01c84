"""The update of the masked neurons of one tensor, from its difference: truncated (Eq. 10), thinned out, rescaled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_snrf.fusion.lowrank import Certificate, certified_factors, frobenius_norm, gram
from mergekit_snrf.neurons.sets import PROJECTIONS, Site

# Random numbers that are drawn at a time.
_PANEL = 2**20
# Up to this side the whole spectrum is as cheap as its leading part.
_DENSE_SIDE = 512


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the maths: float32, or float64 where a tensor is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@dataclass(frozen=True)
class Update:
    """M_S(Delta_r) of one tensor: the selected neurons only, one a row, as ``left @ right``.

    Attributes:
        selected: the indices of the neurons.
        left: None stands for the identity: the rows are ``right`` itself.
        certificate: how good the truncation is; None where nothing was truncated.
    """

    selected: Int[Tensor, " selected"]
    left: Float[Tensor, "selected rank"] | None
    right: Float[Tensor, "rank length"]
    certificate: Certificate | None = None

    def rows(self) -> Float[Tensor, "selected length"]:
        """Return the update of the selected neurons."""
        return self.right if self.left is None else self.left @ self.right


def low_rank(
    delta: Float[Tensor, "neurons length"],
    selected: Int[Tensor, " selected"],
    rank: int,
    *,
    mask_first: bool = False,
    energy: float = 0.0,
) -> Update:
    """Return the selected rows of the rank-r truncated SVD of ``delta`` (Eq. 10), or the SVD of the selected rows.

    Args:
        rank: r, at most the smaller side, 0 for full rank; with ``energy`` the largest r, 0 for no limit.
        mask_first: truncate the selected rows, and not ``delta`` (Appendix B).
        energy: r is the smallest rank that captures this share of the squared norm of what is truncated.
    """
    whole = delta[selected] if mask_first else delta
    side = min(whole.shape)
    if side == 0 or len(selected) == 0:
        return Update(selected, None, delta[selected])
    if energy:
        rank = energy_rank(whole, energy, min(rank or side, side))
    if rank == 0 or rank >= side:
        return Update(selected, None, whole if mask_first else delta[selected])
    rows = torch.arange(len(whole), device=whole.device) if mask_first else selected
    return Update(selected, *certified_factors(whole, rank, rows))


def energy_rank(matrix: Float[Tensor, "rows columns"], energy: float, most: int) -> int:
    """Return the smallest rank whose truncated SVD holds a share ``energy`` of ||matrix||_F^2, or ``most``.

    Ranks are tried in steps of four until the share is reached; a spectrum that would take too many vectors is
    computed whole, from the float64 Gram matrix.

    Args:
        energy: in (0, 1); a share that lies within 1e-6 of a singular value's end may count as reached or not.
        most: in [1, min(rows, columns)].
    """
    side, tried = min(matrix.shape), 16
    norm = frobenius_norm(matrix)
    if norm == 0:
        return 1
    while side > _DENSE_SIDE and min(tried, most) <= side // 8:
        tried = min(tried, most)
        left, right, _ = certified_factors(matrix, tried, torch.arange(len(matrix), device=matrix.device))
        assert left is not None
        # One of the two factors is orthonormal, the other holds the singular values.
        values = left.to(torch.float64).norm(dim=0) * right.to(torch.float64).norm(dim=1) / norm
        found = _reached(values.square().cpu(), energy)
        if found or tried == most:
            return found or most
        tried *= 4
    values = torch.linalg.eigvalsh(gram(matrix, scale=math.ldexp(1.0, -math.frexp(norm)[1]))).flip(0).clamp_min(0)
    return min(_reached((values / values.sum()).cpu(), energy) or most, most)


def _reached(shares: Tensor, energy: float) -> int:
    """Return how many of the leading shares make up ``energy``, 0 if all do not."""
    enough = (shares.cumsum(0) >= energy).nonzero().flatten()
    return int(enough[0]) + 1 if len(enough) else 0


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

    Args:
        drop_rate: p, in [0, 1).
        seed: in [0, 2**32).
    """
    generator = np.random.RandomState([seed, site.layer, list(PROJECTIONS).index(site.projection)])
    rows = delta[selected]
    for part in rows.split(max(1, _PANEL // max(1, rows.shape[1]))):
        kept = generator.random_sample(tuple(part.shape)) >= drop_rate
        part.mul_(torch.from_numpy(kept).to(part.device))
    return Update(selected, None, rows / (1 - drop_rate) if rescale else rows)


def matched(update: Update, delta: Float[Tensor, "neurons length"]) -> Update:
    """Rescale an update to the Frobenius norm of the selected rows of ``delta``.

    An update that is zero, or nothing but the rounding of a truncation, becomes zero.
    """
    if update.right.numel() == 0 or len(update.selected) == 0:
        return update
    rows = update.rows()
    size, wanted = frobenius_norm(rows), frobenius_norm(delta[update.selected])
    whole = update.certificate.norm if update.certificate else wanted
    factor = wanted / size if size > 16 * torch.finfo(rows.dtype).eps * whole else 0.0
    if update.left is None:
        return replace(update, right=update.right * factor)
    return replace(update, left=update.left * factor)
