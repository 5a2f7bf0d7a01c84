"""The strength of RegMean without labels: the smallest ``keep`` whose merge stays close to its target.

How far an edited target moves from its own answers is measured on held-out probes to keep.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.evidence.controls import Merge, regmean
from mergekit_snrf.evidence.study_results import TunedPoint, Tuning
from mergekit_snrf.models.moments import Moments
from mergekit_snrf.profiling.probes.answers import placeholder_ids
from mergekit_snrf.profiling.probes.batches import ProbeBatch, Probes, prepare, probe_batches, probes_sha256
from mergekit_snrf.profiling.probes.rows import count_rows, load_rows
from mergekit_snrf.profiling.probes.source import DATA_SUFFIXES, AnswerRule, ProbeSource, Prompting
from mergekit_snrf.profiling.settings import ProfileConfig, keep_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOWEST, HIGHEST, STEPS = 0.05, 300.0, 9
"""Where ``keep`` is looked for, and how often the interval of its logarithm is halved."""
LEAST, MOST = 96, 128
"""Held-out probes of a kind: at least, and at most."""
_SOURCE = ("dataset", "config", "split", "revision", "question", "images", *Prompting.model_fields, "limit", "seed")


def tune(
    merge: Merge,
    model: PreTrainedModel,
    held_out: Sequence[HeldOut],
    max_kl: float,
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    visit: Callable[[TunedPoint], None] | None = None,
) -> Tuning:
    """Find the smallest ``keep`` within a bound by bisection; the model is edited in memory and put back.

    Args:
        merge: of a recipe with ``update: regmean`` into ``model``.
        held_out: probes of every kind to keep.
        max_kl: bound of the mean KL(target || merge) per token of the target's answers, averaged over the kinds.
        evaluate: returns means of metrics of the model as it is, for every point.
        visit: is given every point as it is measured.

    Raises:
        SnrfError: even the largest ``keep`` is not within the bound.
    """
    moments = merge.moments
    if moments is None:
        raise ValueError("the merge has no moments")
    points: dict[float, TunedPoint] = {}

    def within(keep: float) -> bool:
        with regmean(merge, keep, moments)(model):
            found: dict[str, tuple[float, float]] = {one.name: one.distance(model) for one in held_out}
            kl, changed = (sum(of) / len(found) for of in zip(*found.values(), strict=True))
            scores = {} if evaluate is None else evaluate()
        points[keep] = TunedPoint(keep=keep, kl=kl, changed=changed, kinds=found, scores=scores)
        if visit is not None:
            visit(points[keep])
        return points[keep].kl <= max_kl

    target = {} if evaluate is None else evaluate()
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if within(_rounded(middle)):
            high = middle
        else:
            low = middle
    keep = _rounded(high)
    if keep not in points and not within(keep):
        what = f"keep {keep:g} has a KL of {points[keep].kl:.3g}, more than {max_kl:g}"
        raise SnrfError(None, what, "allow more, or take the moments on more probes to keep", field="max_kl")
    tried = tuple(points[one] for one in sorted(points))
    return Tuning(
        keep=keep, max_kl=max_kl, points=tried, probes={one.name: one.probes for one in held_out}, target=target
    )


def _rounded(place: float) -> float:
    return float(f"{math.exp(place):.3g}")


@dataclass(frozen=True)
class Kind:
    """One kind of probes to keep, with the limit and seed of the moments; the target answers by itself.

    ``sha256`` is of the probes that the moments used, where they say so.
    """

    name: str
    source: ProbeSource
    rule: AnswerRule
    sha256: str | None = None


class Distance(NamedTuple):
    """How far a merge is from its target on one kind of probes.

    ``kl`` is the mean KL(target || merge) per token of the target's answers, in nats; ``changed`` the share of the
    probes whose greedy answer is another one.
    """

    kl: float
    changed: float


def kinds_of(moments: Moments, config: ProfileConfig | None = None) -> list[Kind]:
    """Return the kinds of probes to keep that moments were taken on, by their profile.yml or else by the moments file.

    ``SnrfError``: the moments do not say where their probes come from, or the profile draws other ones.
    """
    known = moments.provenance.keep or []
    if not known:
        raise SnrfError(moments.path, "does not say which probes to keep it used", "take the moments again")
    if config is not None and len(config.keep) != len(known):
        what = f"has {len(config.keep)} kinds of probes to keep, but {moments.path} has {len(known)}"
        raise SnrfError(None, what, "give the profile.yml of these moments", field="profile")
    kinds = []
    for index, entry in enumerate(known):
        source = ProbeSource(**{key: entry[key] for key in _SOURCE if entry.get(key) is not None})
        if config is not None:
            mine = config.kept()[index].source
            if (mine.limit, mine.seed) != (source.limit, source.seed):
                what = f"keep.{index} draws {mine.limit} rows by seed {mine.seed}, but {moments.path} was taken on "
                what += f"{source.limit} by seed {source.seed}"
                raise SnrfError(None, what, "give the profile.yml of these moments", field="profile")
            source = mine.model_copy(update={"answer": None})
        answer = entry.get("answer") or {}
        tokens = answer.get("max_new_tokens")
        rule = AnswerRule() if tokens is None else AnswerRule(max_new_tokens=tokens)
        name = str(entry.get("name") or Path(source.dataset).stem)
        kinds.append(Kind(name, source, rule, entry.get("sha256") if answer.get("by") == "model" else None))
    return kinds


def held_out(kinds: Sequence[Kind], model: PreTrainedModel, processor: Any, folders: Sequence[Path]) -> list[HeldOut]:
    """Return the held-out probes of every kind: the rows of the same permutation behind those of the moments.

    Relative data files are looked for in the working folder, then in ``folders``. ``SnrfError``: a data set cannot be
    read, is not that of the moments, or has too few rows.
    """
    found = []
    for index, kind in enumerate(kinds):
        used, dataset = kind.source.limit, kind.source.dataset
        local = next((one for one in folders if os.path.exists(one / dataset)), None)
        if local is None and Path(dataset).suffix in DATA_SUFFIXES and not os.path.exists(dataset):
            looked = " and ".join(dict.fromkeys(map(str, folders))) or "the working folder"
            what = f"is not in {looked}, but the moments were taken on it"
            raise SnrfError(dataset, what, "give the profile.yml of the moments, beside which it lies")
        with naming(keep_keys(index)):
            total = count_rows(kind.source, local)
            left = 0 if used is None else total - used
            if used is None or left < LEAST:
                taken = total if used is None else min(used, total)
                what = f"{total} rows, of which the moments used {taken}, leave {max(left, 0)} held-out probes to keep"
                raise SnrfError(dataset, what, f"at least {LEAST} are needed; lower the limit or add rows")
            options: dict[str, Any] = {"rule": kind.rule, "batch_size": 16, "config": model.config}
            if kind.sha256 is not None:
                before = prepare(load_rows(kind.source, answers=False, folder=local), processor, **options)
                if probes_sha256(before) != kind.sha256:
                    what = "gives other probes than those that the moments used"
                    raise SnrfError(dataset, what, "use the same data file, or take the moments again")
            source = kind.source.model_copy(update={"limit": MOST})
            rows = load_rows(source, answers=False, folder=local, behind=used)
            found.append(HeldOut.of(kind, prepare(rows, processor, **options), model))
    return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out probes of one kind, with the target's answers and its logits on them.

    The logits of the answers' tokens are held in the model's dtype: tokens x vocabulary x 2 bytes in bfloat16.
    """

    name: str
    probes: int
    batches: tuple[ProbeBatch, ...]
    logits: tuple[Float[Tensor, "tokens vocabulary"], ...]
    banned: tuple[int, ...]

    @classmethod
    def of(cls, kind: Kind, probes: Probes, model: PreTrainedModel) -> HeldOut:
        """Let the target answer; the model must not be edited."""
        processor = probes.renderer.processor
        batches = tuple(probe_batches(probes, model, processor, rule=kind.rule, device=model.device))
        logits = tuple(_answer_logits(model, batch).cpu() for batch in batches)
        return cls(kind.name, len(probes), batches, logits, placeholder_ids(model.config))

    def distance(self, model: PreTrainedModel) -> Distance:
        """Return how far a model, the edited target, is from what the target answered.

        A greedy answer changes where at some token of it the most probable token is another one.
        """
        total, tokens, changed = 0.0, 0, 0
        for batch, before in zip(self.batches, self.logits, strict=True):
            before = before.to(model.device)
            after = _answer_logits(model, batch)
            ours, theirs = (one.float().log_softmax(dim=-1) for one in (before, after))
            total += float((ours.exp() * (ours - theirs)).sum(dim=-1).double().sum())
            tokens += len(before)
            differs = self._greedy(before) != self._greedy(after)
            probe = batch.answer_mask[:, 1:].nonzero()[:, 0]
            changed += len(probe[differs].unique())
        return Distance(total / tokens, changed / self.probes)

    def _greedy(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        # Generation never takes them.
        logits[:, list(self.banned)] = -torch.inf
        return logits.argmax(dim=-1)


@torch.no_grad()
def _answer_logits(model: PreTrainedModel, batch: ProbeBatch) -> Float[Tensor, "tokens vocabulary"]:
    """Return the logits from which the answers' tokens were chosen; the first token of a row has none."""
    logits: Tensor = model(**batch.inputs, use_cache=False).logits
    return logits[:, :-1][batch.answer_mask[:, 1:]]
