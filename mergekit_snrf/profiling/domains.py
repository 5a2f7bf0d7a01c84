"""A run over domains: probes of every domain through one model, and counts of its active neurons (MMNeuron)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from mergekit_snrf.errors import SnrfError, naming
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.loading import find_device, load_model
from mergekit_snrf.models.reference import ModelName
from mergekit_snrf.profiling.groups import Groups, probes_of, rows_of, started
from mergekit_snrf.profiling.journal import Journals, Tally
from mergekit_snrf.profiling.measure.activations import ActivationCounter
from mergekit_snrf.profiling.probes.source import AnswerRule, ProbeColumns, PromptColumns
from mergekit_snrf.profiling.request import (
    ModelInfo,
    check_model,
    fingerprint,
    model_provenance,
    probes_provenance,
    request_of,
    stem_of,
    versions,
)
from mergekit_snrf.profiling.result.domainsfile import (
    DOMAINS,
    Domains,
    DomainsProvenance,
    read_domains,
    write_domains,
)
from mergekit_snrf.profiling.settings import (
    ANSWER_KEYS,
    MODEL_FIELDS,
    Kind,
    ProfileConfig,
    RunConfig,
    find_beside,
    located_data,
    read_settings,
    validated,
)

_NAME = re.compile(r"\w[\w.-]*")


def _file_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of letters, digits, '_', '-' and '.'")
    return name


class DomainsConfig(ModelName, RunConfig):
    """A checked DOMAINS.yml."""

    domains: dict[Annotated[str, AfterValidator(_file_name)], PromptColumns] = Field(
        min_length=2, description="Names of the domains, each with its data set and columns."
    )
    answer: AnswerRule = Field(default=AnswerRule(by="none"), description="What follows every question.")

    def written(self) -> dict[str, ProbeColumns]:
        """Return all probes by the key under which they are written."""
        return {f"domains.{name}": one for name, one in self.domains.items()}

    def located(self, path: Path) -> DomainsConfig:
        """Return a copy whose relative paths are looked up in the working folder, then beside the file."""
        model = find_beside(self.model, path, "model", "model")
        domains = {name: located_data(one, path, f"domains.{name}") for name, one in self.domains.items()}
        return self.model_copy(update={"model": model, "domains": domains})

    def kinds(self) -> tuple[Kind, ...]:
        """Return the domains, with the model that they go through."""
        found = []
        for name, one in self.domains.items():
            keys = {**ANSWER_KEYS, **{field: f"domains.{name}.{field}" for field in PromptColumns.model_fields}}
            columns = ProbeColumns(**{field: getattr(one, field) for field in ProbeColumns.model_fields})
            model_keys = {**{field: field for field in MODEL_FIELDS}, "images": keys["images"]}
            source = self.source_of(one, one)
            found.append(Kind(name, self.reference(self), columns, source, self.answer, keys, model_keys))
        return tuple(found)


def load_config(path: str | os.PathLike[str]) -> ProfileConfig | DomainsConfig:
    """Return the checked content of a profile.yml, or of one with domains in place of target and source.

    Raises:
        SnrfError: as ``load_profile_config``.
    """
    raw = read_settings(path, "target and source, or model and domains")
    kind: type[DomainsConfig] | type[ProfileConfig] = DomainsConfig if "domains" in raw else ProfileConfig
    return validated(kind, raw, path).located(Path(path))


def count_domains(config: DomainsConfig, out: str | os.PathLike[str], **how: Any) -> Domains | None:
    """Count how often every neuron is active on the tokens of each domain, and write the counts.

    Counts are whole numbers: equal settings give equal bytes, for any number of processes, however often the run was
    interrupted and resumed.

    Args:
        config: a checked DOMAINS.yml.
        out: the file to write.
        how: as of ``groups.started``.

    Returns:
        The file, read again; None on ranks other than the first.

    Raises:
        SnrfError: a problem that the user can fix: the settings, the model, the probes.
    """
    with started(config, out, DOMAINS, **how) as (config, options):
        ranks, path, place = options.ranks, options.out, options.folder
        kinds = config.kinds()
        info = check_model(kinds[0])
        rows = [rows_of(kind, place) for kind in kinds]
        requests = [
            request_of(config, kind, info, each, place, domain=kind.name, device=find_device(config.device).type)
            for kind, each in zip(kinds, rows, strict=True)
        ]
        done = ranks.first and options.resume and path.is_file() and _is_finished(path, fingerprint(requests))
        if not ranks.from_first(done):
            groups = [
                Groups(
                    kind, probes_of(config, kind, each), Journals(stem_of(path, f"domain-{index}"), request), options
                )
                for index, (kind, each, request) in enumerate(zip(kinds, rows, requests, strict=True))
            ]
            _count(config, groups, info, fingerprint(requests))
        return read_domains(path) if ranks.first else None


def _is_finished(path: Path, wanted: str) -> bool:
    if read_domains(path).provenance.fingerprint == wanted:
        return True
    what = "these finished counts were made with other settings, or the data or model have changed"
    raise SnrfError(path, what, "use the same settings, or replace them by a run without resume", field="resume")


def _count(config: DomainsConfig, groups: list[Groups], info: ModelInfo, wanted: str) -> None:
    kind, options = groups[0].kind, groups[0].options
    with naming(kind.model_keys):
        images = any(one.probes.rows.source.images is not None for one in groups)
        model = load_model(kind.model, images=images)[0]
    counter = ActivationCounter(model, find_live_decoder(model, info.shape, name=kind.model.model))
    found, tallies = [], list[Tally]()
    for one in groups:
        done = one.measure(model, counter.empty, counter.visit)
        if options.ranks.first:
            # A run that is interrupted in a later domain starts there again.
            one.journals.write(0, done)
        found.append(done.statistics.counts)
        tallies.append(done.tally)
    if not options.ranks.first:
        return
    tensors = {key: torch.stack([counts[key] for counts in found]) for key in found[0]}
    probes = [
        {"name": one.kind.name, **probes_provenance(one.kind, options.folder, one.probes, tally)}
        for one, tally in zip(groups, tallies, strict=True)
    ]
    provenance = DomainsProvenance(
        names=[one.kind.name for one in groups],
        probes=probes,
        model=model_provenance(kind, info, model, options.folder),
        seed=config.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        versions=versions(),
        fingerprint=wanted,
    )
    write_domains(options.out, tensors, provenance)
    for one in groups:
        one.journals.delete()
