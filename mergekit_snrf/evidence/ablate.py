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

REFERENCE, CLAIM, RANDOM, LEAST = "as it is", "masked neurons", "random neurons", "least important neurons"


def ablation_rows(neurons: NeuronSet, *, least: NeuronSet | None = None, draws: int = 3, seed: int = 0) -> list[Row]:
    """Return the model as it is, then with the neurons and with those of the controls deactivated.

    Random neurons are drawn with ``seed``, ``seed + 1``, ...; ``least`` are the least important ones, if any.
    """
    if draws < 1:
        raise SnrfError(None, f"must be at least 1, got {draws}", field="draws")
    count = neurons.count()
    if not count:
        raise SnrfError(None, "has no neurons", "give a mask with at least one", field="mask")
    seeds = [(seed + draw) % 2**32 for draw in range(draws)]
    random = tuple(_without(neurons.random(one)) for one in seeds)
    masked = f"deactivating the {count} masked neurons" if count > 1 else "deactivating the masked neuron"
    others = Words(f"deactivating {count} random neurons instead", "the choice of neurons")
    rows = [
        Row(REFERENCE, "reference"),
        Row(CLAIM, "claim", (_without(neurons),), count, Words(masked)),
        Row(RANDOM, "control", random, count, others, settings={"seeds": seeds}),
    ]
    if least is not None:
        words = Words(f"deactivating the {count} least important neurons instead", "the choice of important neurons")
        rows.append(Row(LEAST, "control", (_without(least),), count, words))
    return rows


def _without(neurons: NeuronSet) -> Draw:
    return partial(deactivate, neurons=neurons)
