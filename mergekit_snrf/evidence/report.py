"""One self-contained HTML page about a mask and what was measured with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_snrf import __version__
from mergekit_snrf.errors import SnrfError, printable
from mergekit_snrf.evidence import wording
from mergekit_snrf.evidence.drawing import Drawing, svg
from mergekit_snrf.evidence.overlap import overlaps, site_order
from mergekit_snrf.evidence.results import (
    Amplification,
    DomainAblation,
    Lens,
    Overlap,
    OverlapPairs,
    Result,
    Study,
    Tuning,
)
from mergekit_snrf.evidence.sections import (
    amplification_section,
    domains_section,
    lens_section,
    mask_section,
    overlap_section,
    provenance_section,
    study_section,
    tuning_section,
)
from mergekit_snrf.files import references
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.profiling.result.profilefile import Profile

if TYPE_CHECKING:
    from jinja2 import Environment

_COMMANDS = {
    "overlap": ("The overlap of both models", "snrf overlap TARGET.profile SOURCE.profile --curve --json overlap.json"),
    "ablation": ("Whether these neurons matter", "snrf ablate MODEL --mask MASK --eval EVAL --json ablation.json"),
    "comparison": (
        "Whether the merge beats simpler baselines",
        "snrf compare RECIPE.yml --eval EVAL --json comparison.json",
    ),
    "amplification": (
        "What single neurons promote",
        "snrf amplify MODEL --neuron NEURON --factor 10 --probes PROBES --json amplification.json",
    ),
    "lens": ("What the model would predict after each layer", "snrf lens MODEL --probes PROBES -o lens.json"),
}


def report(mask: Mask, profiles: Sequence[Profile] = (), results: Sequence[Result] = ()) -> str:
    """Return the report as HTML: no scripts, nothing loaded, equal inputs give equal text.

    Args:
        mask: as ``read_mask`` returns it.
        profiles: of the models, for their overlap under the mask's own selection rule (top ratio 0.1 if it has none).
        results: of the analyses, in the order to show them.

    Raises:
        SnrfError: the mask's file cannot be read, or the profiles are of different shapes.
    """
    from markupsafe import Markup

    numbers = count(1)

    def draw(drawing: Drawing) -> Markup:
        # The SVG is built by an XML writer, which escapes every text in it.
        return Markup(svg(drawing.figure, drawing.caption, drawing.text, f"f{next(numbers)}", "currentColor"))

    digest = references.sha256(mask.path)
    computed = _from_profiles(mask, profiles)
    pairs = [
        [one] if isinstance(one, Overlap) else one.pairs for one in results if isinstance(one, Overlap | OverlapPairs)
    ]
    read = [pair for of_result in pairs for pair in of_result]
    sections = [mask_section(mask), *(overlap_section(title, pair) for title, pair in _titled(computed, read))]
    for result in results:
        if isinstance(result, Study):
            sections.append(study_section(result, digest, mask.neurons))
        elif isinstance(result, DomainAblation):
            sections.append(domains_section(result))
        elif isinstance(result, Amplification):
            sections.append(amplification_section(result))
        elif isinstance(result, Lens):
            sections.append(lens_section(result))
        elif isinstance(result, Tuning):
            sections.append(tuning_section(result))
    shown = {section.name for section in sections}
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            title=_title(mask),
            file=Path(mask.path).name,
            digest=digest,
            sections=[*sections, provenance_section(mask, digest)],
            draw=draw,
            missing=[words for name, words in _COMMANDS.items() if name not in shown],
            version=__version__,
        )
    )


def environment() -> Environment:
    """Return what renders the package's pages: all text is escaped, and characters not for display are written out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("mergekit_snrf.evidence", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Markup made here passes.
        finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
    )


def _title(mask: Mask) -> str:
    models = (mask.provenance.target, mask.provenance.source)
    target, source = (wording.without_folders(model.path or "") if model is not None else "" for model in models)
    if target and source:
        return f"Shared neurons of {target} and {source}"
    return f"Neurons of {target or source or Path(mask.path).name}"


def _from_profiles(mask: Mask, profiles: Sequence[Profile]) -> list[Overlap]:
    if len(profiles) < 2:
        if profiles:
            raise SnrfError(profiles[0].path, "is the only profile", "give the profiles of both models")
        return []
    rule = {
        name: value
        for name, value in (mask.provenance.selection or {}).items()
        if name in ("top_ratio", "sigma") or (name == "at_least" and type(value) in (int, float))
    }
    if not rule.keys() & {"top_ratio", "sigma"}:
        rule = {"top_ratio": 0.1}
    return overlaps(profiles, curve=True, **rule)


def _titled(computed: Sequence[Overlap], read: Sequence[Overlap]) -> list[tuple[str, Overlap]]:
    """Give every overlap a title of its own; of those that say the same one is kept, with a curve if one has it."""
    kept: dict[str, tuple[str, Overlap]] = {}
    for origin, overlap in [*(("profiles", one) for one in computed), *(("a result file", one) for one in read)]:
        content = _content(overlap)
        if content not in kept or (overlap.curve and not kept[content][1].curve):
            kept[content] = kept.get(content, (origin, overlap))[0], overlap
    pairs = [overlap for _, overlap in kept.values()]
    titles = [f"Overlap of {overlap.names[0]} and {overlap.names[1]}" for overlap in pairs]
    titles = _distinct(titles, [f" by {wording.rule(overlap.rule)}" for overlap in pairs])
    titles = _distinct(titles, [f", of {origin}" for origin, _ in kept.values()])
    numbers = [f" ({titles[:place].count(title) + 1})" for place, title in enumerate(titles)]
    return list(zip(_distinct(titles, numbers), pairs, strict=True))


def _distinct(titles: Sequence[str], more: Sequence[str]) -> list[str]:
    """Add more to the titles that are not alone."""
    counts = Counter(titles)
    return [title + part if counts[title] > 1 else title for title, part in zip(titles, more, strict=True)]


def _content(overlap: Overlap) -> str:
    """Return what an overlap says of its sites, whichever of the two models comes first."""
    order = sorted((0, 1), key=lambda side: overlap.names[side])
    sites = [
        [site.layer, site.projection, site.neurons, site.shared, *(site.only[side] for side in order)]
        for site in sorted(overlap.sites, key=site_order)
    ]
    return json.dumps([[overlap.names[side] for side in order], overlap.rule, sites], sort_keys=True)
