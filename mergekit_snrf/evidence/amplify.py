"""Amplify neurons while a model generates, and see which tokens become more frequent (Eq. 7, 8; Fig. 6, 11, 12).

Eq. 7 multiplies a neuron by lambda; the paper calls that its activation, and calls a neuron a row or column of weights.
Here it is the activation, at every position of prompt and answer: the output of the row of attn.q, attn.k, attn.v
(before norm and RoPE) or fwd.up, and the input that the column of fwd.down reads. Multiplying the weights is the same,
but for a row's bias, which the activation includes. In a gated FFN, fwd.up and fwd.down of one index are the two ends
of one hidden unit, and amplifying either gives the same generations.

Each row of a batch may have another neuron amplified, so many neurons share one run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.evidence.asked import Asked
from mergekit_snrf.evidence.results import Amplification, AmplifiedNeuron
from mergekit_snrf.evidence.tokens import WORDS, is_math, math_share, rank_tokens, token_text, words_sha256
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.loading import tokenizer_of
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import check_fit
from mergekit_snrf.neurons.sites import Neuron, Site
from mergekit_snrf.profiling.probes.answers import Answer, generate_answers
from mergekit_snrf.profiling.probes.batches import Probe, Probes, encode, probes_sha256
from mergekit_snrf.profiling.probes.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP = 10
"""Leading tokens that are classified, K of Fig. 12."""
MIN_COUNT = 2
"""Tokens that are rarer in the amplified answers are not ranked."""
KEEP = 100
"""Ranked tokens in a result."""


@dataclass(frozen=True)
class Generation:
    """One answer to the probe of a row, with ``neuron`` amplified; None for a plain one."""

    number: int
    neuron: Neuron | None
    answer: Answer


@contextmanager
def amplified(model: nn.Module, rows: Sequence[Neuron | None], factor: float) -> Iterator[None]:
    """Multiply the activation of the neuron of each row of every batch that the model runs on (Eq. 7); None: no change.

    ``SnrfError``: the model has no such neuron; later: a batch has another size, or a projection did not run.
    """
    decoder = find_live_decoder(model)
    named = [neuron for neuron in rows if neuron is not None]
    check_fit(named, decoder.shape, where=None, model=decoder.model)
    places: dict[Site, list[tuple[int, int]]] = defaultdict(list)
    for row, neuron in enumerate(rows):
        if neuron is not None:
            places[neuron.site].append((row, neuron.index))
    ran: set[Site] = set()
    with ExitStack() as stack:
        for site, members in places.items():
            scale = _scaling(site, torch.tensor(members), len(rows), factor, ran)
            module = decoder.layers[site.layer].get_submodule(site.module)
            if site.axis == 0:
                hook = module.register_forward_hook(lambda module, args, output, scale=scale: scale(output))
            else:
                hook = module.register_forward_pre_hook(lambda module, args, scale=scale: (scale(args[0]), *args[1:]))
            stack.enter_context(hook)
        yield
    silent = sorted(places.keys() - ran)
    if silent:
        what = f"{decoder.path}.{silent[0].layer}.{silent[0].module} did not run as a module"
        raise SnrfError(decoder.model, what, "the model is not supported")


def _scaling(
    site: Site, members: Int[Tensor, "members 2"], batch: int, factor: float, ran: set[Site]
) -> Callable[[Tensor], Tensor]:
    def scale(activation: Float[Tensor, "batch tokens neurons"]) -> Float[Tensor, "batch tokens neurons"]:
        if activation.ndim != 3 or len(activation) != batch:
            what = f"activations of shape {list(activation.shape)} are not those of {batch} generations"
            raise SnrfError(site, what, "the model is not supported")
        ran.add(site)
        rows, indices = members.to(activation.device).unbind(1)
        activation = activation.clone()
        activation[rows, :, indices] *= factor
        return activation

    return scale


def pick_neurons(neurons: NeuronSet, count: int | None, seed: int = 0) -> list[Neuron]:
    """Draw ``count`` of a set's neurons at random, in the set's order; None: all.

    The draw depends on ``seed`` and the size of the set only; a smaller count takes a subset of a larger one's.
    """
    every = list(neurons.neurons())
    if not every or (count or 0) > len(every):
        raise SnrfError(None, f"has {len(every)} neurons, not {count or 'at least one'}", "use another mask")
    if count is None:
        return every
    return [every[place] for place in sorted(np.random.RandomState([seed]).permutation(len(every))[:count])]


def generate_amplified(
    probes: Probes,
    model: PreTrainedModel,
    processor: Any,
    asked: Asked,
    neurons: Sequence[Neuron],
    factor: float,
    *,
    progress: bool = False,
) -> Iterator[Generation]:
    """Generate the plain answer to every probe, and after it one with each neuron amplified, many in a batch.

    Rows of a batch do not see each other; an answer depends on its batch by the rounding of the model's own arithmetic
    only. ``neurons`` are all different, ``factor`` is lambda.
    """
    order = sorted(probes.probes, key=lambda probe: (-probe.tokens, probe.row.number))
    jobs = [(probe, neuron) for probe in order for neuron in (None, *neurons)]
    with tqdm(total=len(jobs), unit="answer", disable=not progress) as bar:
        for start in range(0, len(jobs), asked.batch_size):
            batch = jobs[start : start + asked.batch_size]
            inputs = encode(probes, [probe for probe, _ in batch], model, model.device)
            with amplified(model, [neuron for _, neuron in batch], factor), _checked(model, batch, factor):
                answers = generate_answers(model, processor, inputs, asked.rule.max_new_tokens)
            for (probe, neuron), answer in zip(batch, answers, strict=True):
                yield Generation(probe.row.number, neuron, answer)
            bar.update(len(batch))


@contextmanager
def _checked(model: nn.Module, batch: Sequence[tuple[Probe, Neuron | None]], factor: float) -> Iterator[None]:
    """Raise ``SnrfError`` at a step whose logits are NaN."""

    def check(module: nn.Module, args: Any, output: Any) -> None:
        bad = output.logits[:, -1].isnan().any(dim=1).nonzero().flatten().tolist()
        if bad:
            probe, neuron = batch[bad[0]]
            cause = f"with {neuron} amplified by {factor:g}" if neuron is not None else "without amplification"
            what = f"the model's logits are not a number {cause}"
            raise SnrfError(f"row {probe.row.number}", what, "use a smaller factor or float32")

    with model.register_forward_hook(check):
        yield


@dataclass
class _Tally:
    """Counts of the generations with one neuron amplified, or of the plain ones."""

    tokens: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    changed: int = 0


def amplify(
    rows: Rows,
    model: PreTrainedModel,
    processor: Any,
    asked: Asked,
    neurons: Sequence[Neuron],
    factor: float = 10.0,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Amplification:
    """Compare the tokens that a model generates with each neuron amplified with those of plain generations.

    Special tokens, the end of an answer among them, are not counted. The paper does not say how many of the classified
    tokens of a neuron must be math tokens for it to count in Fig. 12; here it is more than half. ``factor`` is lambda
    of Eq. 7; ``settings`` are kept in the result.
    """
    neurons = list(dict.fromkeys(neurons))
    if not neurons:
        raise SnrfError(None, "no neuron is named", "name at least one, such as fwd.up.L14.N12953")
    if not abs(factor) < float("inf"):
        raise SnrfError(None, f"must be a finite number, got {factor}", None, field="factor")
    probes = asked.probes(rows, model, processor)
    generations = generate_amplified(probes, model, processor, asked, neurons, factor, progress=progress)
    tallies = _tallies(generations, neurons, tokenizer_of(processor))
    without = tallies.pop(None)
    constants = {"top": TOP, "min_count": MIN_COUNT, "keep": KEEP, "classifier_sha256": words_sha256()}
    known = {"max_new_tokens": asked.rule.max_new_tokens, "generations": len(probes), **constants, **(settings or {})}
    measured = [_of_neuron(neuron, tally, without) for neuron, tally in tallies.items()]
    mathematical, plain = sum((neuron.math_share or 0) > 0.5 for neuron in measured), without.tokens
    math_count = sum(count for token, count in plain.items() if is_math(token))
    classified: dict[str, Any] = {
        "classifier": WORDS,
        "math_neuron_ratio": mathematical / len(measured),
        "plain_math_share": math_count / plain.total() if plain else None,
    }
    return Amplification(
        model=asked.model.model,
        factor=factor,
        probes=asked.source.dataset,
        count=len(probes),
        seed=asked.source.seed,
        neurons=measured,
        settings={"probes_sha256": probes_sha256(probes), **known},
        **classified,
    )


def _tallies(
    generations: Iterator[Generation], neurons: Sequence[Neuron], tokenizer: Any
) -> dict[Neuron | None, _Tally]:
    special = set(tokenizer.all_special_ids)
    text_of = cache(lambda token: token_text(tokenizer, token))
    tallies: dict[Neuron | None, _Tally] = {neuron: _Tally() for neuron in (None, *neurons)}
    plain: Answer | None = None
    for generation in generations:
        tally, answer = tallies[generation.neuron], generation.answer
        tally.tokens.update(text_of(token) for token in answer.ids if token not in special)
        tally.ended += answer.ended
        if generation.neuron is None:
            plain = answer
        tally.changed += plain is not None and answer.ids != plain.ids
    return tallies


def _of_neuron(neuron: Neuron | None, tally: _Tally, without: _Tally) -> AmplifiedNeuron:
    ranked = rank_tokens(tally.tokens, without.tokens, min_count=MIN_COUNT)
    return AmplifiedNeuron(
        neuron=str(neuron),
        tokens=ranked[:KEEP],
        totals=(tally.tokens.total(), without.tokens.total()),
        math_share=math_share(ranked, TOP),
        ended=(tally.ended, without.ended),
        changed=tally.changed,
    )
