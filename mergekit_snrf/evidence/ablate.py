"""The rows of an ablation (Table 3): a model without the neurons of a mask, and without as many others.

The claim is that the masked neurons carry a skill. Controls have the same counts at every layer and projection.
"""

from __future__ import annotations

from functools import partial

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.study import Draw, Row
from mergekit_snrf.evidence.verdict import Words
from mergekit_snrf.models.edits import deactivate
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.sites import PROJECTIONS, TOWERS, Site

REFERENCE, CLAIM, RANDOM, LEAST = "as it is", "masked neurons", "random neurons", "least important neurons"


def ablation_rows(
    neurons: NeuronSet,
    *,
    least: NeuronSet | None = None,
    draws: int = 3,
    seed: int = 0,
    called: str = "masked neurons",
    paired: bool = False,
) -> list[Row]:
    """Return the model as it is, then with the neurons and with those of the controls deactivated.

    Random neurons are drawn with ``seed``, ``seed + 1``, ...; ``least`` are the least important ones, if any.

    Args:
        called: what sentences call the neurons, after their number.
        paired: a row of fwd.up and the column of fwd.down with its index count and are drawn as one neuron.
    """
    if draws < 1:
        raise SnrfError(None, f"must be at least 1, got {draws}", field="draws")
    drawn = neurons.of(*(name for name in (*PROJECTIONS, *TOWERS) if name != "fwd.down")) if paired else neurons
    count = drawn.count()
    if not count:
        raise SnrfError(None, "has no neurons", "give a mask with at least one", field="mask")
    seeds = [(seed + draw) % 2**32 for draw in range(draws)]
    sets = [drawn.random(one) for one in seeds]
    random = tuple(_without(with_columns(one) if paired else one) for one in sets)
    several = f"{count} {called}" if count > 1 else called.replace("neurons", "neuron", 1)
    others = Words(f"deactivating {count} random neurons instead", "the choice of neurons")
    rows = [
        Row(REFERENCE, "reference"),
        Row(CLAIM, "claim", (_without(neurons),), count, Words(f"deactivating the {several}")),
        Row(RANDOM, "control", random, count, others, settings={"seeds": seeds}),
    ]
    if least is not None:
        words = Words(f"deactivating the {count} least important neurons instead", "the choice of important neurons")
        rows.append(Row(LEAST, "control", (_without(least),), count, words))
    return rows


def with_columns(neurons: NeuronSet) -> NeuronSet:
    """Return neurons with the columns of fwd.down that have the indices of their rows of fwd.up."""
    columns = {Site(site.layer, "fwd.down"): member for site, member in neurons.of("fwd.up").items()}
    return NeuronSet({**neurons, **columns})


def _without(neurons: NeuronSet) -> Draw:
    return partial(deactivate, neurons=neurons)
