"""What the commands that measure a loaded model share: loading it, the options in messages, and a study as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergekit_snrf.cli.common import table
from mergekit_snrf.errors import SnrfError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_snrf.evidence.results import Study

_LOADING = {
    "set trust_remote_code: true to allow it": "give --trust-remote-code to allow it",
    "use device_map: auto, a smaller dtype, or device: cpu": "use a smaller --dtype, or --device cpu",
    "use device: cpu": "use --device cpu",
}
"""Remedies of the profiler, which speaks of the keys of its file, and those of the commands."""


def loaded(
    load: Callable[..., tuple[PreTrainedModel, Any]], of: Any, settings: dict[str, Any], **options: Any
) -> tuple[PreTrainedModel, Any]:
    """Load a model with its processor, and note how it was loaded.

    Args:
        load: ``evaluation.load_model`` or ``profiler.probes.load_model``.
        of: what to load.
        settings: of the result; how the model was loaded is added.
        options: device, dtype and trust_remote_code.

    Raises:
        SnrfError: as ``load``, with the options of the command for the keys of profile.yml; or a weight is not finite,
            with which every answer would be nonsense.
    """
    with reworded(_LOADING):
        model, processor = load(of, **options)
    _check_finite(model)
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    return model, processor


def _check_finite(model: PreTrainedModel) -> None:
    import torch

    for name, weight in model.named_parameters():
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or weight.is_meta:
            continue
        # Both ends are NaN where one weight is, and no copy is made.
        if weight.numel() and not all(end.isfinite() for end in weight.detach().aminmax()):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise SnrfError(
                f"{model.name_or_path}: weight {name} holds NaN or infinity in {dtype}; get the checkpoint again, or "
                f"choose another --dtype"
            )


@contextmanager
def reworded(words: Mapping[str, str]) -> Iterator[None]:
    """Put the words of this command in place of those of what it calls, in the messages of ``SnrfError``."""
    try:
        yield
    except SnrfError as error:
        message = str(error)
        for theirs, ours in words.items():
            message = message.replace(theirs, ours)
        raise SnrfError(message) from error


def report(study: Study) -> str:
    """Return a study as text: a table a metric, and the verdict."""
    from mergekit_snrf.evidence.intervals import scale_of, spoken

    measured = {condition.name: condition.metrics for condition in study.conditions}
    parts = []
    for metric, items in study.items.items():
        scale, _ = scale_of(metric, measured)
        against = {c.right: c.difference for c in study.contrasts if c.metric == metric}
        claim = next(condition.name for condition in study.conditions if condition.role == "claim")
        rows = []
        for condition in study.conditions:
            value = condition.metrics[metric]
            name = f"{condition.name}, {condition.draws} draws" if condition.draws > 1 else condition.name
            change = "-" if value.change is None else spoken(value.change, scale, "+")
            difference = spoken(against[condition.name], scale, "+") if condition.name in against else "-"
            malformed = "-" if value.malformed is None else f"{100 * value.malformed:.1f} %"
            neurons = condition.neurons or "-"
            rows.append((name, neurons, spoken(value.mean, scale), change, difference, malformed))
        unit = " in %" if scale == 100 else ""
        header = (f"{metric}{unit}, {items} items", "neurons", "mean", "change", f"{claim} minus it", "malformed")
        parts.append(table(header, rows))
    parts.append(
        f"[{100 * study.level:g} % intervals]: paired bootstrap over items and draws, seed {study.seed}.\n"
        + "\n".join(study.verdict)
    )
    return "\n\n".join(parts)
