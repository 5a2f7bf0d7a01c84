"""Amplify neurons while a model generates, and see which tokens become more frequent (Eq. 7, 8; Fig. 6, 11, 12).

Eq. 7 multiplies a neuron by lambda; the paper calls that its activation, and calls a neuron a row or column of weights.
Here it is the activation, at every position of prompt and answer: the output of the row of attn.q, attn.k, attn.v
(before norm and RoPE) or fwd.up, and the input that the column of fwd.down reads. Multiplying the weights is the same,
but for a row's bias, which the activation includes. In a gated FFN, fwd.up and fwd.down of one index are the two ends
of one hidden unit, and amplifying either gives the same generations.

Each row of a batch may have another neuron amplified, so many neurons share one run.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from mergekit_snrf.errors import SnrfError, problem
from mergekit_snrf.evidence.results import Amplification, AmplifiedNeuron
from mergekit_snrf.evidence.tokens import Classifier, math_share, rank_tokens, token_text
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.loading import tokenizer_of
from mergekit_snrf.models.reference import ModelRef
from mergekit_snrf.neurons.sets import Neuron, NeuronSet, Site
from mergekit_snrf.neurons.shape import check_fit
from mergekit_snrf.profiling.probes.answers import Answer, generate_answers
from mergekit_snrf.profiling.probes.batches import Probes, encode, prepare, probes_sha256
from mergekit_snrf.profiling.probes.rows import Rows
from mergekit_snrf.profiling.probes.source import AnswerRule, ProbeSource
from mergekit_snrf.profiling.settings import SideName, load_profile_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_TOKENS = 128
"""At most as many tokens are generated, where nothing else says how many."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily, or several a probe at a temperature.

    Attributes:
        samples: answers a probe; 0 means the one greedy answer.
        temperature: of the softmax that tokens are drawn from.

    Raises:
        SnrfError: a value is out of range.
    """

    samples: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise SnrfError(f"samples must be 0 (greedy) or positive, got {self.samples}")
        if not 0 < self.temperature < float("inf"):
            raise SnrfError(
                f"temperature must be positive, got {self.temperature}; for greedy answers set samples to 0"
            )


@dataclass(frozen=True)
class Generation:
    """One answer of the model.

    Attributes:
        number: of the probe's row.
        sample: from 0.
        neuron: that was amplified; None for a plain one.
        answer: its tokens.
    """

    number: int
    sample: int
    neuron: Neuron | None
    answer: Answer


@contextmanager
def amplified(model: nn.Module, rows: Sequence[Neuron | None], factor: float) -> Iterator[None]:
    """Multiply the activation of one neuron in each row of every batch that the model runs on (Eq. 7).

    Args:
        model: any loaded model with a text decoder, quantised or not.
        rows: the neuron of each row of the batch; None leaves a row alone.
        factor: lambda.

    Raises:
        SnrfError: the model has no such neuron; later: a batch has another number of rows, or a neuron's projection
            did not run.
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
                handle = module.register_forward_hook(lambda module, args, output, scale=scale: scale(output))
            else:
                handle = module.register_forward_pre_hook(lambda module, args, scale=scale: (scale(args[0]), *args[1:]))
            stack.callback(handle.remove)
        yield
    silent = sorted(places.keys() - ran)
    if silent:
        raise SnrfError(
            f"{decoder.model}: {decoder.path}.{silent[0].layer}.{silent[0].module} did not run as a module, so its "
            f"neurons cannot be amplified; the model is not supported"
        )


def _scaling(
    site: Site, members: Int[Tensor, "members 2"], batch: int, factor: float, ran: set[Site]
) -> Callable[[Tensor], Tensor]:
    def scale(activation: Float[Tensor, "batch tokens neurons"]) -> Float[Tensor, "batch tokens neurons"]:
        if activation.ndim != 3 or len(activation) != batch:
            raise SnrfError(
                f"{site}: activations of shape {list(activation.shape)} are not those of {batch} generations; the "
                f"model is not supported"
            )
        ran.add(site)
        rows, indices = members.to(activation.device).unbind(1)
        activation = activation.clone()
        activation[rows, :, indices] *= factor
        return activation

    return scale


def pick_neurons(neurons: NeuronSet, count: int | None, seed: int = 0) -> list[Neuron]:
    """Draw ``count`` of a set's neurons at random, in the set's order; None: all.

    The draw depends on ``seed`` and on the size of the set only (numpy's legacy MT19937 generator), so a smaller count
    takes a subset of a larger one's.

    Raises:
        SnrfError: the set has no neurons, or fewer than ``count``.
    """
    every = list(neurons.neurons())
    if not every or (count or 0) > len(every):
        raise SnrfError(f"has {len(every)} neurons; {count or 'at least one'} cannot be taken of them")
    if count is None:
        return every
    return [every[place] for place in sorted(np.random.RandomState([seed]).permutation(len(every))[:count])]


@dataclass(frozen=True)
class Asked:
    """What a model is asked, and how.

    Attributes:
        model: which model.
        source: of the probes.
        rule: of the generated answers.
        batch_size: answers generated at once.
        token_limit: tokens of a probe with its answer, at most.
    """

    model: ModelRef
    source: ProbeSource
    rule: AnswerRule
    batch_size: int = 8
    token_limit: int | None = None


def load_asked(
    path: str | os.PathLike[str],
    model: str,
    *,
    question: str | None = None,
    images: str | None = None,
    template: str | None = None,
    side: str | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Asked:
    """Return how a data file, or one side of a profile.yml, becomes probes of ``model`` with its own answers.

    Args:
        path: a .jsonl, .json, .parquet or .csv file, or a profile.yml.
        model: a folder or a hub id.
        question: column of the data file; None: ``question``, unless there is a template.
        images: column of the data file.
        template: as in profile.yml, which it overrides.
        side: of profile.yml, ``target`` or ``source``; None: ``target``.
        max_new_tokens, limit, batch_size, seed: override profile.yml.

    Raises:
        SnrfError: the file is missing or not valid, or an argument does not go with it.
    """
    from pydantic import ValidationError

    path = Path(path)
    ref: dict[str, Any] = {"model": model}
    given = {"limit": limit, "seed": seed, "template": template}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    tokens, size, token_limit = NEW_TOKENS, 8, None
    if path.suffix in (".yml", ".yaml"):
        if question is not None or images is not None:
            raise SnrfError(path, "names its columns itself", "leave out question and images")
        config = load_profile_config(path)
        name: SideName = "source" if side == "source" else "target"
        own = config.model_of(name)
        if "max_new_tokens" in config.answer.model_fields_set:
            tokens = config.answer.max_new_tokens
        size, token_limit = config.batch_size, config.token_limit
        # A revision and a GGUF file are those of the profile's own model.
        if Path(own.model).absolute() == Path(model).absolute():
            ref |= {"revision": own.revision, "gguf_file": own.gguf_file}
        values = {**config.probes_of(name).model_dump(), **values}
    else:
        if side is not None:
            raise SnrfError(path, "is not a profile.yml, so it has no sides", "leave out side")
        column = question or (None if template else "question")
        values |= {"dataset": str(path), "question": column, "images": images}
    try:
        source, rule = ProbeSource(**values), AnswerRule(max_new_tokens=max_new_tokens or tokens)
        return Asked(ModelRef(**ref), source, rule, batch_size or size, token_limit)
    except ValidationError as error:
        raise SnrfError(f"{path}: {problem(error.errors()[0])}") from None


def generate_amplified(
    probes: Probes,
    model: PreTrainedModel,
    processor: Any,
    asked: Asked,
    neurons: Sequence[Neuron],
    factor: float,
    sampling: Sampling | None = None,
    *,
    progress: bool = False,
) -> Iterator[Generation]:
    """Generate the plain answer to every probe, and one with each neuron amplified, many in a batch.

    The plain answer to a probe comes before the amplified ones. Rows of a batch do not see each other; an answer
    depends on its batch by the rounding of the model's own arithmetic only. A sample's random numbers depend on the
    source's seed, the probe's row number, the sample and the token's position only: they are the same with every
    neuron amplified and with none.

    Args:
        probes: of ``prepare``.
        model: in eval mode.
        processor: of the model.
        asked: for rule, batch_size and seed.
        neurons: all different.
        factor: lambda.
        sampling: None: greedy.
        progress: show a progress bar on stderr.

    Raises:
        SnrfError: the model cannot generate, has no such neuron, or its logits are not finite any more.
    """
    sampling = sampling or Sampling()
    order = sorted(probes.probes, key=lambda probe: (-probe.tokens, probe.row.number))
    jobs = [
        (probe, sample, neuron)
        for probe in order
        for sample in range(sampling.samples or 1)
        for neuron in (None, *neurons)
    ]
    with tqdm(total=len(jobs), unit="answer", disable=not progress) as bar:
        for start in range(0, len(jobs), asked.batch_size):
            batch = jobs[start : start + asked.batch_size]
            inputs = encode(probes, [probe for probe, _, _ in batch], model, model.device)
            chosen = [neuron for _, _, neuron in batch]
            keys = [(probe.row.number, sample) for probe, sample, _ in batch]
            temperature = sampling.temperature if sampling.samples else None
            with amplified(model, chosen, factor), _logits(model, chosen, keys, factor, asked.source.seed, temperature):
                answers = generate_answers(model, processor, inputs, asked.rule.max_new_tokens)
            for (probe, sample, neuron), answer in zip(batch, answers, strict=True):
                yield Generation(probe.row.number, sample, neuron, answer)
            bar.update(len(batch))


@contextmanager
def _logits(
    model: nn.Module,
    rows: Sequence[Neuron | None],
    keys: Sequence[tuple[int, int]],
    factor: float,
    seed: int,
    temperature: float | None,
) -> Iterator[None]:
    """Check the logits of every step and, with a temperature, make a greedy choice a draw.

    argmax(logits + temperature * g), g of the standard Gumbel distribution, is a draw from
    softmax(logits / temperature).
    """
    streams = {key: np.random.RandomState([seed, *key]) for key in keys}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        logits = output.logits[:, -1].float()
        bad = logits.isnan().any(dim=1).nonzero().flatten().tolist()
        if bad:
            neuron, (number, _) = rows[bad[0]], keys[bad[0]]
            cause = f"with {neuron} amplified by {factor:g}" if neuron is not None else "without amplification"
            raise SnrfError(
                f"row {number}: the model's logits are not a number {cause}; use a smaller factor or float32"
            )
        if temperature is not None:
            drawn = {key: stream.gumbel(size=logits.shape[1]) for key, stream in streams.items()}
            noise = np.stack([drawn[key] for key in keys]).astype(np.float32)
            output.logits = (logits + temperature * torch.from_numpy(noise).to(logits.device))[:, None]
        return output

    handle = model.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


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
    sampling: Sampling | None = None,
    classifier: Classifier | None = None,
    top: int = 10,
    min_count: int = 2,
    keep: int = 100,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Amplification:
    """Compare the tokens that a model generates with each neuron amplified with those of plain generations.

    Special tokens, the end of an answer among them, are not counted: they are no text. The paper says which tokens of a
    neuron are classified for Fig. 12, but not how many of them must be math tokens for the neuron to count; here it is
    more than half.

    Args:
        rows: of ``load_rows``.
        model: in eval mode.
        processor: of the model.
        asked: of the rows, for rule, batch_size, token_limit and seed.
        neurons: at least one.
        factor: lambda of Eq. 7.
        sampling: None: one greedy answer a probe.
        classifier: of tokens; None counts no math tokens.
        top: leading tokens that are classified, K of Fig. 12.
        min_count: see ``rank_tokens``.
        keep: ranked tokens in the result.
        name: of the model, for the result.
        settings: kept in the result.
        progress: show a progress bar on stderr.

    Raises:
        SnrfError: as ``prepare`` and ``generate_amplified``, or a number is out of range.
    """
    neurons, sampling = list(dict.fromkeys(neurons)), sampling or Sampling()
    if not neurons:
        raise SnrfError("no neuron is named; name at least one, such as fwd.up.L14.N12953")
    if not abs(factor) < float("inf"):
        raise SnrfError(f"factor must be a finite number, got {factor}")
    if min(top, min_count, keep) < 1:
        raise SnrfError(f"top, min_count and keep must be at least 1, got {top}, {min_count} and {keep}")
    probes = prepare(
        rows,
        processor,
        rule=asked.rule,
        batch_size=asked.batch_size,
        token_limit=asked.token_limit,
        config=model.config,
        model=asked.model.model,
    )
    tokenizer = tokenizer_of(processor)
    special = set(tokenizer.all_special_ids)
    text_of = cache(lambda token: token_text(tokenizer, token))
    tallies: dict[Neuron | None, _Tally] = {neuron: _Tally() for neuron in (None, *neurons)}
    plain: dict[tuple[int, int], Answer] = {}
    for generation in generate_amplified(probes, model, processor, asked, neurons, factor, sampling, progress=progress):
        tally, answer, key = tallies[generation.neuron], generation.answer, (generation.number, generation.sample)
        tally.tokens.update(text_of(token) for token in answer.ids if token not in special)
        tally.ended += answer.ended
        if generation.neuron is None:
            plain = {key: answer}
        else:
            tally.changed += answer.ids != plain[key].ids
    without = tallies.pop(None)
    found = []
    for neuron, tally in tallies.items():
        assert neuron is not None
        ranked = rank_tokens(tally.tokens, without.tokens, min_count=min_count)
        found.append(
            AmplifiedNeuron(
                neuron=str(neuron),
                tokens=ranked[:keep],
                totals=(tally.tokens.total(), without.tokens.total()),
                math_share=None if classifier is None else math_share(ranked, classifier, top),
                ended=(tally.ended, without.ended),
                changed=tally.changed,
            )
        )
    mathematical = [entry for entry in found if entry.math_share is not None and entry.math_share > 0.5]
    return Amplification(
        model=name or str(model.config.name_or_path),
        factor=factor,
        probes=asked.source.dataset,
        count=len(probes),
        seed=asked.source.seed,
        classifier=None if classifier is None else classifier.name,
        neurons=found,
        math_neuron_ratio=None if classifier is None else len(mathematical) / len(found),
        plain_math_share=None if classifier is None else _share(without.tokens, classifier),
        settings={
            "probes_sha256": probes_sha256(probes),
            "max_new_tokens": asked.rule.max_new_tokens,
            "samples": sampling.samples,
            "temperature": sampling.temperature if sampling.samples else None,
            "generations": len(probes) * (sampling.samples or 1),
            "top": top,
            "min_count": min_count,
            "keep": keep,
            "classifier_sha256": None if classifier is None else classifier.sha256,
            **(settings or {}),
        },
    )


def _share(tokens: Counter[str], classifier: Classifier) -> float | None:
    """Return the share of math tokens among all that were generated."""
    total = tokens.total()
    return sum(count for token, count in tokens.items() if classifier(token)) / total if total else None
