"""FRANK (arXiv 2505.16151): how much of the source's change each layer takes, from the sizes of both models' changes.

With theta_0 the model that target (V) and source (R) were trained from, ``n_t = ||theta_t - theta_0||^2`` over all
parameters of a layer. The merge is ``theta_0 + lambda_V tau_V + lambda_R tau_R``. As ``lambda_V + lambda_R = 1``, it is
``W_tgt + lambda_R (W_src - W_tgt)``: the update of rank 0 whose beta is ``lambda_R`` of the layer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_snrf.errors import SnrfError


@dataclass(frozen=True)
class Prior:
    """How the attention to images falls with depth, and the weight of the target in each layer (Eq. 15, 45).

    Attributes:
        alpha: of ``exp(-alpha l)``, from least squares of the logarithms.
        weights: w_V by layer; they sum to 1 over the layers, and w_R is 1 - w_V.
    """

    alpha: float
    weights: tuple[float, ...]


def prior_of(shares: Sequence[float]) -> Prior:
    """Return the prior that follows from the share of text tokens' attention that goes to images, by layer.

    ``SnrfError``: there are fewer than two layers, or a share is not above 0.
    """
    if len(shares) < 2 or not all(share > 0 for share in shares):
        what = f"the attention to images of {len(shares)} layers must be above 0 in two or more"
        raise SnrfError(None, what, "take the lens on probes with images, or leave it out")
    layers = range(len(shares))
    alpha = -statistics.linear_regression(layers, [math.log(share) for share in shares]).slope
    scores = [-alpha * layer for layer in layers]
    powers = [math.exp(score - max(scores)) for score in scores]
    return Prior(alpha, tuple(power / math.fsum(powers) for power in powers))


def source_strengths(norms: Sequence[tuple[float, float]], prior: Prior | None = None) -> list[float]:
    """Return lambda_R of every layer (Eq. 13; Eq. 15 with a prior).

    Args:
        norms: n_V and n_R by layer.
        prior: None weighs both models alike.

    Raises:
        SnrfError: neither model differs from the base in some layer, or the prior has another number of layers.
    """
    weights = (0.5,) * len(norms) if prior is None else prior.weights
    if len(weights) != len(norms):
        raise SnrfError(None, f"is of {len(weights)} layers, the models have {len(norms)}", "take it on this target")
    strengths = []
    for layer, ((of_target, of_source), weight) in enumerate(zip(norms, weights, strict=True)):
        target, source = weight * of_target, (1 - weight) * of_source
        if not target + source > 0:
            what = f"neither target nor source differs from the base in layer {layer}"
            raise SnrfError(None, what, "give the model that both were trained from", field="base")
        strengths.append(source / (target + source))
    return strengths
