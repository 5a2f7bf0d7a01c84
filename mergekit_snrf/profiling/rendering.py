"""The rows of one side as prompts, before any weights are loaded."""

from __future__ import annotations

from pathlib import Path

from mergekit_snrf.errors import naming
from mergekit_snrf.models.loading import load_config, load_processor
from mergekit_snrf.profiling.probes.batches import Probes, prepare
from mergekit_snrf.profiling.probes.rows import Rows, load_rows
from mergekit_snrf.profiling.settings import ProfileConfig, SideName, model_keys, probe_keys


def side_rows(config: ProfileConfig, name: SideName, folder: Path | None) -> Rows:
    """Return the rows of one side; errors name the keys of profile.yml."""
    with naming(probe_keys(name)):
        return load_rows(config.probes_of(name), answers=config.answer.by == "column", folder=folder)


def side_probes(config: ProfileConfig, name: SideName, rows: Rows) -> Probes:
    """Return the rendered rows of one side, without loading weights; errors name the keys of profile.yml."""
    ref = config.model_of(name)
    with naming(model_keys(name)):
        model_config = load_config(ref)
        processor = load_processor(ref, images=rows.source.images is not None)
    with naming(probe_keys(name)):
        return prepare(
            rows,
            processor,
            rule=config.answer,
            batch_size=config.batch_size,
            token_limit=config.token_limit,
            config=model_config,
            model=ref.model,
        )
