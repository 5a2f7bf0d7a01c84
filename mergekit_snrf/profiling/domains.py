"""A run over domains: probes of every domain through one model, and counts of its active neurons (MMNeuron)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, Field

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.loading import find_device
from mergekit_snrf.profiling.groups import Groups, Prompts, loaded, started
from mergekit_snrf.profiling.measure.activations import ActivationCounter
from mergekit_snrf.profiling.probes.source import AnswerRule, ProbeColumns, PromptColumns
from mergekit_snrf.profiling.request import fingerprint, opened
from mergekit_snrf.profiling.result.domains import DOMAINS, Domains, DomainsProvenance, read_domains, write_domains
from mergekit_snrf.profiling.settings import Kind, LocatedModel, ProfileConfig, RunConfig, read_settings, validated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = re.compile(r"\w[\w.-]*")


def _file_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of letters, digits, '_', '-' and '.'")
    return name


class DomainsConfig(LocatedModel, RunConfig):
    """A checked DOMAINS.yml."""

    domains: dict[Annotated[str, AfterValidator(_file_name)], PromptColumns] = Field(
        min_length=2, description="Names of the domains, each with its data set and columns."
    )
    answer: AnswerRule = Field(default=AnswerRule(by="none"), description="What follows every question.")

    def written(self) -> dict[str, ProbeColumns]:
        """Return all probes by the key under which they are written."""
        return {f"domains.{name}": one for name, one in self.domains.items()}

    def kinds(self) -> tuple[Kind, ...]:
        """Return the domains, with the model that they go through."""
        return tuple(
            self.kind_of(
                name, (self, ""), one, one, {field: f"domains.{name}.{field}" for field in PromptColumns.model_fields}
            )
            for name, one in self.domains.items()
        )


def load_config(path: str | os.PathLike[str]) -> ProfileConfig | DomainsConfig:
    """Return the checked content of a profile.yml, or of one with domains in place of target and source.

    ``SnrfError`` as ``load_profile_config``.
    """
    raw = read_settings(path, "target and source, or model and domains")
    kind: type[DomainsConfig] | type[ProfileConfig] = DomainsConfig if "domains" in raw else ProfileConfig
    return validated(kind, raw, path, beside=Path(path).parent)


def count_domains(config: DomainsConfig, out: str | os.PathLike[str], **how: Any) -> Domains | None:
    """Count how often every neuron is active on the tokens of each domain, and write the counts.

    Counts are whole numbers: equal settings give equal bytes, for any number of processes, however often the run was
    interrupted and resumed. ``SnrfError``: a problem that the user can fix: the settings, the model, the probes.

    Args:
        config: a checked DOMAINS.yml.
        out: the file to write.
        how: further fields of ``groups.RunOptions``.

    Returns:
        The file, read again; None on ranks other than the first.
    """
    with started(config, out, DOMAINS, **how) as (config, options):
        ranks, path, kinds = options.ranks, options.out, config.kinds()
        info, device = opened(kinds[0])[0], find_device(config.device).type
        groups = []
        for index, kind in enumerate(kinds):
            prompts, more = Prompts(config, kind, options.folder), {"domain": kind.name, "device": device}
            groups.append(Groups(prompts, info, options, f"domain-{index}", more))
        wanted = fingerprint([one.request for one in groups])
        done = ranks.first and options.resume and path.is_file() and _is_finished(path, wanted)
        if not ranks.from_first(done):
            _count(groups, loaded([one.ready() for one in groups]), wanted)
        return read_domains(path) if ranks.first else None


def _is_finished(path: Path, wanted: str) -> bool:
    if read_domains(path).provenance.fingerprint == wanted:
        return True
    what = "these finished counts were made with other settings, or the data or model have changed"
    raise SnrfError(path, what, "use the same settings, or replace them by a run without resume", field="resume")


def _count(groups: list[Groups], model: PreTrainedModel, wanted: str) -> None:
    first = groups[0]
    counter = ActivationCounter(model, find_live_decoder(model, first.info.shape, name=first.kind.model.model))
    found = [one.measure(model, counter.empty, counter.visit, hold=True) for one in groups]
    if not first.options.ranks.first:
        return
    counts = [done.statistics.counts for done in found]
    origins = [one.origin(done.tally) for one, done in zip(groups, found, strict=True)]
    names = [one.kind.name for one in groups]
    probes = [{"name": name, **origin} for name, origin in zip(names, origins, strict=True)]
    provenance = first.provenance(DomainsProvenance, model, wanted, names=names, probes=probes)
    tensors = {key: torch.stack([one[key] for one in counts]) for key in counts[0]}
    write_domains(first.options.out, tensors, provenance)
    for one in groups:
        one.journals.delete()
