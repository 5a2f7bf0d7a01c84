"""What the intervals of a study support, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_snrf.evidence.intervals import FEW_DRAWS, FEW_ITEMS, scale_of, side_of, size_of, spoken
from mergekit_snrf.evidence.items import Scores
from mergekit_snrf.evidence.results import Condition, Contrast, Study


@dataclass(frozen=True)
class Words:
    """How sentences name a row: ``subject`` (empty: its name), and the only thing in which the claim differs from it.

    ``about`` is empty where it differs in more.
    """

    subject: str = ""
    about: str = ""

    def start(self, name: str) -> str:
        """Return the subject at the start of a sentence."""
        return self.subject[:1].upper() + self.subject[1:] if self.subject else name


class _Writer:
    """Writes the sentences of one study."""

    def __init__(self, study: Study, words: Mapping[str, Words]) -> None:
        self.study, self.words = study, words
        self.conditions = {condition.name: condition for condition in study.conditions}
        self.claim = next(condition for condition in study.conditions if condition.role == "claim")
        self.subject = words[self.claim.name].subject or self.claim.name
        measured = {name: condition.metrics for name, condition in self.conditions.items()}
        self.scales = {metric: scale_of(metric, measured) for metric in study.items}

    def wanted(self, metric: str) -> int:
        """Return 1 where the claim is for more of a metric, -1 where it is for less: an ablation removes a skill."""
        return -1 if self.study.kind == "ablation" and self.study.roles.get(metric) != "keep" else 1

    def rivals(self, contrasts: Sequence[Contrast]) -> list[str]:
        """Name the controls that do better than the claim on some metric: measurably worse on none, or a trade-off.

        Of a sweep, the points at equal perception stand for the trade-offs, where the study has them.
        """
        better: dict[str, list[str]] = {}
        worse: dict[str, list[str]] = {}
        for contrast in contrasts:
            scale, unit = self.scales[contrast.metric]
            good = self.side(contrast) * self.wanted(contrast.metric)
            than = "higher" if contrast.difference.estimate < 0 else "lower"
            size = f"{contrast.metric} {size_of(contrast.difference, scale)}{unit} {than}"
            if good > 0:
                worse.setdefault(contrast.right, []).append(size)
            elif good < 0 and not (self.study.kind == "ablation" and self.study.roles.get(contrast.metric) == "keep"):
                better.setdefault(contrast.right, []).append(size)
        found = [f"{name} ({', '.join(sizes)})" for name, sizes in better.items() if name not in worse]
        if found:
            regmean = any(name.startswith("regmean") for name in better if name not in worse)
            merge = f"{'Another' if regmean else 'A simpler'} merge does better"
            what = "Other neurons have a larger effect" if self.study.kind == "ablation" else merge
            return [f"{what} than {self.subject}, and is not measurably worse on any metric: {'; '.join(found)}."]
        shown = {contrast.right for contrast in self.study.contrasts} if "keep" in self.study.roles.values() else better
        traded = [f"{name} ({', '.join(sizes + worse[name])})" for name, sizes in better.items() if name in shown]
        if not traded or self.study.kind == "ablation":
            return []
        return [f"Better than {self.subject} on some metrics and worse on others: {'; '.join(traded)}."]

    def change(self, metric: str) -> str:
        """Say how the claim changes a metric."""
        change = self.claim.metrics[metric].change
        assert change is not None
        scale, unit = self.scales[metric]
        side = side_of(change, scale)
        if not side:
            return f"No evidence that {self.subject} changes {metric}: {spoken(change, scale, '+')}{unit}."
        start = self.words[self.claim.name].start(self.claim.name)
        return f"{start} {'raises' if side > 0 else 'lowers'} {metric} by {size_of(change, scale)}{unit}."

    def contrast(self, contrast: Contrast) -> str:
        """Say how a control changes a metric, and how the claim differs from it."""
        condition, words = self.conditions[contrast.right], self.words[contrast.right]
        metric = contrast.metric
        scale, unit = self.scales[metric]
        change = condition.metrics[metric].change
        assert change is not None
        start = f"{words.start(condition.name)}{self._draws(condition, metric)} changes {metric} by "
        start += f"{spoken(change, scale, '+')}{unit}"
        side = self.side(contrast)
        good = side * self.wanted(metric)
        verb = "matters" if self.study.kind == "ablation" else "hurts" if good < 0 else "helps"
        if not side:
            difference = f"{self.subject} minus it: {spoken(contrast.difference, scale, '+')}{unit}"
            shown = f"that {words.about} {verb}" if words.about else "of a difference"
            return f"{start}; no evidence {shown} ({difference})."
        effect = ""
        if words.about and (good < 0 or self._claimed(metric)) and (good > 0 or self.study.kind == "comparison"):
            effect = f", so {words.about} {verb}"
        size = f"{size_of(contrast.difference, scale)}{unit} {'higher' if side > 0 else 'lower'}"
        joint = "after" if self.study.kind == "ablation" else "with"
        return f"{start}; {metric} is {size} {joint} {self.subject}{effect}."

    def cautions(self) -> list[str]:
        """Say what weakens the intervals."""
        sentences = []
        compared = len(self.study.contrasts) + len(self.study.items)
        if compared > 1:
            sentences.append(
                f"These are {compared} differences, each with a {100 * self.study.level:g} % interval that is not "
                f"corrected for their number; some exclude zero by chance."
            )
        few = [metric for metric, items in self.study.items.items() if items < FEW_ITEMS]
        if few:
            sentences.append(f"Fewer than {FEW_ITEMS} items of {' and '.join(few)}: the intervals are too narrow.")
        draws = min((c.draws for c in self.study.conditions if "seeds" in c.settings), default=FEW_DRAWS)
        if draws < FEW_DRAWS:
            only = "One draw does" if draws == 1 else f"{draws} draws do"
            sentences.append(f"{only} not show how much draws differ, so the intervals are too narrow; use more.")
        return sentences

    def side(self, contrast: Contrast) -> int:
        """Return 1 or -1 where the claim has more or less of a metric than a control, else 0."""
        return side_of(contrast.difference, self.scales[contrast.metric][0])

    def _claimed(self, metric: str) -> bool:
        """Return whether the claim does to a metric what it is for: where not, nothing can be said to help."""
        change = self.claim.metrics[metric].change
        return change is not None and side_of(change, self.scales[metric][0]) * self.wanted(metric) > 0

    def _draws(self, condition: Condition, metric: str) -> str:
        means = condition.settings.get("means", {}).get(metric, ())
        change = condition.metrics[metric].change
        if condition.draws < 2 or not means or change is None:
            return ""
        scale, _ = self.scales[metric]
        shift = change.estimate - condition.metrics[metric].mean.estimate
        low, high = (f"{round(scale * (mean + shift), 1) + 0.0:+.1f}" for mean in (min(means), max(means)))
        return f" (mean of {condition.draws} draws, {low} to {high})"


def verdict(study: Study, words: Mapping[str, Words], contrasts: Sequence[Contrast]) -> list[str]:
    """Return the sentences of a study; a difference is stated where its interval excludes zero.

    The first names simpler rivals among all ``contrasts`` that do better. Metrics to gain get a sentence for the claim
    and for every control of the study; metrics to keep one for the claim, and for every control that differs from it.
    """
    writer = _Writer(study, words)
    sentences = writer.rivals(contrasts)
    for metric in study.items:
        sentences.append(writer.change(metric))
        sentences += [
            writer.contrast(contrast)
            for contrast in study.contrasts
            if contrast.metric == metric and (study.roles.get(metric) != "keep" or writer.side(contrast))
        ]
    return sentences + writer.cautions()


def format_losses(subject: str, before: Scores, after: Scores) -> list[str]:
    """Return a sentence for every metric some of whose items score lower with an answer that is newly malformed."""
    sentences = []
    for metric, items in after.items():
        malformed, earlier = items.malformed, before[metric].malformed
        if malformed is None or earlier is None:
            continue
        pairs = enumerate(zip(items.scores, before[metric].scores, strict=True))
        lower = [index for index, (new, old) in pairs if new < old]
        broken = sum(malformed[index] and not earlier[index] for index in lower)
        if broken:
            sentences.append(
                f"{subject} lowers the score of {len(lower)} items of {metric}; {broken} of these answers are newly "
                f"malformed, and a broken output format is not lost reasoning."
            )
    return sentences
