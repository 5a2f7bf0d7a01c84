"""What a merge will do, from configurations and headers alone: the edits, their cost, and, of a draft, its problems."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Bool
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion
from mergekit_snrf.merge.recipe import Recipe
from mergekit_snrf.models.checkpoint import Checkpoint
from mergekit_snrf.models.decoder import Decoder
from mergekit_snrf.models.moments import Moments
from mergekit_snrf.models.shards import ITEM_BYTES
from mergekit_snrf.neurons.maskfile import Mask
from mergekit_snrf.neurons.sites import PROJECTIONS, Site


@dataclass(frozen=True)
class OpenedModel:
    """A model of a merge, as the recipe names it with absolute folders, and its headers with an adapter applied."""

    reference: ModelReference
    checkpoint: Checkpoint
    decoder: Decoder


@dataclass(frozen=True)
class PlannedEdit:
    """One tensor that a merge changes: a weight, or the bias beside it, and all that a kernel needs for it.

    Names are those by ``target``, ``source`` and, where the recipe has one, ``source_base``. ``dtype`` is the target's,
    such as ``BF16``; ``member`` says which ``neurons`` rows (or columns) change; ``source_bytes`` are read for it.
    """

    site: Site
    names: Mapping[str, str] = field(hash=False)
    shape: tuple[int, ...]
    dtype: str
    neurons: int
    source_bytes: int
    fusion: Fusion
    member: Bool[Tensor, " neurons"] = field(compare=False, repr=False)

    @property
    def target_name(self) -> str:
        """The name in the target."""
        return self.names["target"]

    @property
    def is_bias(self) -> bool:
        """Whether the tensor is the bias of row neurons."""
        return len(self.shape) == 1

    @property
    def parameters(self) -> int:
        """Number of weights that the edit changes."""
        return self.neurons if self.is_bias else self.neurons * self.shape[1 - self.site.axis]


@dataclass(repr=False)
class PlanDraft:
    """What was found of a merge so far, and every problem; the merge can run only if there is none.

    Attributes:
        warnings: one sentence each.
        checkpoints: those that could be opened, by ``target``, ``source`` and ``source_base``.
        models: those of them that have a text decoder.
        references: all models as the recipe names them, with absolute folders.
        mask: the recipe's, or all neurons of the decoder, where ``mask_path`` is None.
        moments: None: the update needs none.
        edits: in the order of the decoder's layers; none where there was a problem before.
    """

    problems: list[SnrfError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    recipe: Recipe | None = None
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    models: dict[str, OpenedModel] = field(default_factory=dict)
    references: list[ModelReference] = field(default_factory=list)
    mask: Mask | None = None
    mask_path: Path | None = None
    moments: Moments | None = None
    edits: list[PlannedEdit] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.edits)} edits, {len(self.problems)} problems>"

    @property
    def inputs(self) -> list[str]:
        """The local folders and files that the merge reads."""
        parts = [part.path for model in self.references for part in (model.model, model.lora) if part is not None]
        opened = [str(checkpoint.folder) for checkpoint in self.checkpoints.values() if checkpoint.folder]
        files = [str(self.mask_path)] if self.mask_path else []
        files += [self.moments.path] if self.moments is not None else []
        return [*dict.fromkeys([*opened, *(path for path in parts if os.path.isdir(path))]), *files]

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Take what the block raises as a problem."""
        try:
            yield
        except SnrfError as error:
            self.problems.append(error)

    def finish(self) -> MergePlan:
        """Return the plan, or raise ``SnrfError`` with every problem."""
        if self.problems:
            raise SnrfError.several("the merge cannot run", self.problems)
        return MergePlan(**vars(self))


class MergePlan(PlanDraft):
    """A merge that can run."""

    recipe: Recipe
    mask: Mask

    @property
    def target(self) -> OpenedModel:
        """The model whose tensors change."""
        return self.models["target"]

    @property
    def copied(self) -> list[str]:
        """Names of the target's tensors that stay as they are."""
        edited = {edit.target_name for edit in self.edits}
        return [name for name in self.target.checkpoint.tensors if name not in edited]

    @property
    def unmatched(self) -> list[str]:
        """Decoder projections of the target that have no masked neuron, or no strength, and stay as they are."""
        decoder, edited = self.target.decoder, {edit.site for edit in self.edits}
        return [decoder.weight_name(site) for site in decoder.shape.sites() if site not in edited]

    @property
    def source_bytes(self) -> int:
        """Bytes of the source, and of its base, that the merge reads."""
        return sum(edit.source_bytes for edit in self.edits)

    @property
    def parameters_touched(self) -> int:
        """Weights inside the masked rows and columns."""
        return sum(edit.parameters for edit in self.edits)

    @property
    def bytes_touched(self) -> int:
        """Bytes of the masked rows and columns in the target's dtype."""
        return sum(edit.parameters * ITEM_BYTES[edit.dtype] for edit in self.edits)

    @property
    def update(self) -> str:
        """The update in words: beta and what has a part in the variant."""
        if not self.edits:
            return "nothing"
        said = [f"beta {_span([edit.fusion.beta for edit in self.edits])}"]
        fusions = [edit.fusion for edit in self.edits if not edit.is_bias]
        if fusions and fusions[0].update == "dare":
            rescaled = "" if fusions[0].rescale else ", not rescaled"
            rates = _span([fusion.drop_rate for fusion in fusions])
            said.append(f"dare: drop_rate {rates}, seed {fusions[0].seed}{rescaled}")
        elif fusions:
            ranks = [fusion.rank for fusion in fusions]
            if fusions[0].update == "regmean":
                said.append(f"regmean: keep {_span([fusion.keep for fusion in fusions])}")
            order = "" if set(ranks) == {0} else f", {fusions[0].order}"
            said.append(f"rank {_span(ranks)}{' (0: full rank)' if 0 in ranks else ''}{order}")
        if "source_base" in self.models:
            said.append("Delta = source - source_base")
        if len(fusions) < len(self.edits):
            said.append("biases")
        return ", ".join(said)

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Return (weights, neurons changed, neurons in all) by projection."""
        shape = self.target.decoder.shape
        tensors: Counter[str] = Counter()
        changed: Counter[str] = Counter()
        for edit in self.edits:
            if not edit.is_bias:
                tensors[edit.site.projection] += 1
                changed[edit.site.projection] += edit.neurons
        return {name: (tensors[name], changed[name], shape.layers * shape.neurons(name)) for name in PROJECTIONS}


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
