"""A planned merge applied to its loaded target in memory, and its variants: linear, rescaled, DARE, FRANK."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.fusion.fuse import Fusion, fuse_neurons, masked_update
from mergekit_snrf.fusion.lowrank import frobenius_norm
from mergekit_snrf.fusion.threads import Memory, look_ahead
from mergekit_snrf.fusion.updates import Update
from mergekit_snrf.models.decoder import DecoderShape
from mergekit_snrf.models.edits import Edit, fuse_model
from mergekit_snrf.models.live import find_live_decoder
from mergekit_snrf.models.moments import Filters, Moments, filter_at
from mergekit_snrf.models.weights import Weights, bias_name
from mergekit_snrf.neurons.sets import NeuronSet
from mergekit_snrf.neurons.shape import every_neuron
from mergekit_snrf.neurons.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_snrf.merge.plan import MergePlan


@dataclass(frozen=True)
class Merge:
    """A merge that a loaded target can be edited to and back.

    Attributes:
        neurons: those that move; ``fusions`` say how, by site of the weight, ``bias_fusions`` of the bias.
        biases: all sites whose biases could move; none, where the recipe leaves biases alone.
        source_base: what Delta is taken from; None: the target.
        betas: strengths that replace those of ``fusions`` and may exceed 1; None: there are none.
    """

    shape: DecoderShape
    neurons: NeuronSet
    fusions: Mapping[Site, Fusion]
    bias_fusions: Mapping[Site, Fusion]
    biases: tuple[Site, ...]
    source: Weights
    source_base: Weights | None = None
    betas: Mapping[Site, float] | None = None
    moments: Moments | None = None

    def __call__(self, model: PreTrainedModel) -> Edit:
        """Edit a loaded target in place, to be undone with the result; if it fails, the model is as before.

        In the merge's dtype the weights become those that ``mergekit-yaml`` writes.
        """
        moving = NeuronSet({site: self.neurons[site] for site in self.fusions})
        if self.betas is None:
            options: Any = {"source_base": self.source_base, "moments": self.moments}
            edit = fuse_model(model, self.source, moving, self.fusions.__getitem__, **options)
        else:
            edit = Edit()
        try:
            if self.betas is not None:
                self._add(edit, model, self.betas)
            self._move_biases(edit, model)
        except BaseException:
            edit.undo()
            raise
        return edit

    def norms(self, model: PreTrainedModel) -> dict[Site, float]:
        """Return ||M_S(Delta_r)||_F of every site, without the factor beta."""
        norms = {}
        with closing(self._updates(model)) as updates:
            for site, update in updates:
                rows = update.rows()
                norms[site] = frobenius_norm(rows) if rows.numel() else 0.0
        return norms

    def _updates(self, model: PreTrainedModel) -> Generator[tuple[Site, Update]]:
        """Yield the update of every site; on the CPU they are computed ahead."""
        weights, base = find_live_decoder(model), self.source_base
        filters = None if self.moments is None else Filters(self.moments)

        def update(site: Site) -> Update:
            target, fusion = weights.weight(site), self.fusions[site]
            source = self.source.weight(site).to(target.device)
            options: Any = {
                "source_base": None if base is None else base.weight(site).to(target.device),
                "site": site,
                "moments": filter_at(site, fusion, filters),
            }
            name, neurons = weights.name(site), self.neurons[site]
            return masked_update(target, source, neurons, site.axis, fusion, name=name, **options)

        def memory(site: Site) -> Memory:
            size = weights.module(site).weight.nbytes
            return Memory(6 * size + (0 if filters is None else filters.bytes(site)), 2 * size)

        workers = None if all(weights.module(site).weight.device.type == "cpu" for site in self.fusions) else 0
        with look_ahead(self.fusions, update, memory, workers=workers) as ahead:
            yield from ahead

    def _add(self, edit: Edit, model: PreTrainedModel, betas: Mapping[Site, float]) -> None:
        weights = find_live_decoder(model)
        with closing(self._updates(model)) as updates:
            for site, update in updates:
                rows = update.rows()
                parameter = weights.module(site).weight
                before = (parameter.data if site.axis == 0 else parameter.data.mT)[update.selected]
                fused = (before.to(rows.dtype) + betas[site] * rows).to(parameter.dtype)
                if not torch.isfinite(fused).all():
                    what = f"the fused weights overflow {fused.dtype}"
                    raise SnrfError(weights.name(site), what, "use float32", field="dtype")
                edit.write(parameter, site.axis, update.selected, fused)

    def _move_biases(self, edit: Edit, model: PreTrainedModel) -> None:
        weights = find_live_decoder(model)
        for site, fusion in self.bias_fusions.items():
            module, name = weights.module(site), bias_name(weights.name(site))
            ours, theirs = weights.bias(site), self.source.bias(site)
            base = None if self.source_base is None else self.source_base.bias(site)
            if ours is None or theirs is None or (self.source_base is not None and base is None):
                raise SnrfError(name, "is missing in one of the models", "remove biases from the recipe")
            theirs, base = theirs.to(ours.device), None if base is None else base.to(ours.device)
            neurons = self.neurons[site]
            fused = fuse_neurons(ours, theirs, neurons, 0, fusion, name=name, source_base=base).tensor
            edit.write(module.bias, 0, neurons.nonzero().flatten().to(ours.device), fused)


def planned(plan: MergePlan, source: Weights, source_base: Weights | None) -> Merge:
    """Return the merge of a plan, with the weights of its source and source_base."""
    weights = {edit.site: edit.fusion for edit in plan.edits if not edit.is_bias}
    biases = {edit.site: edit.fusion for edit in plan.edits if edit.is_bias}
    shape = plan.target.decoder.shape
    models = [(model.decoder, model.checkpoint.tensors) for model in plan.models.values()]
    movable = [
        site
        for site in shape.sites()
        if site.axis == 0 and all(bias_name(decoder.weight_name(site)) in tensors for decoder, tensors in models)
    ]
    return Merge(
        shape=shape,
        neurons=NeuronSet({edit.site: edit.member for edit in plan.edits}),
        fusions=weights,
        bias_fusions=biases,
        biases=tuple(movable) if biases else (),
        source=source,
        source_base=source_base,
        moments=plan.moments,
    )


def linear(merge: Merge, beta: float) -> Merge:
    """Return the linear merge W_tgt + beta * Delta of all neurons of the five projections."""
    return _of_all(merge, Fusion(beta=beta, rank=0))


def regmean(merge: Merge, keep: float, moments: Moments) -> Merge:
    """Return RegMean at a strength: the merge's own update if it is regmean, else of all neurons at full rank."""
    fusions = {site: replace(fusion, keep=keep) for site, fusion in merge.fusions.items()}
    if fusions and is_regmean(merge):
        return replace(merge, fusions=fusions, moments=moments)
    return replace(_of_all(merge, Fusion(update="regmean", keep=keep)), moments=moments)


def is_regmean(merge: Merge) -> bool:
    """Return whether the update of a merge is regmean."""
    return any(fusion.update == "regmean" for fusion in merge.fusions.values())


def _of_all(merge: Merge, fusion: Fusion) -> Merge:
    everything = every_neuron(merge.shape)
    of_biases = dict.fromkeys(merge.biases, fusion.of_bias())
    return replace(
        merge, neurons=everything, fusions=dict.fromkeys(everything, fusion), bias_fusions=of_biases, betas=None
    )


def frank(merge: Merge, strengths: Sequence[float], *, everywhere: bool) -> Merge:
    """Return FRANK's merge, Delta at ``strengths`` by layer, on the merge's own neurons or on all."""
    of = _of_all(merge, Fusion(rank=0)) if everywhere else merge
    fusions, biases = (
        {site: Fusion(beta=strengths[site.layer], rank=0) for site in sites} for sites in (of.fusions, of.bias_fusions)
    )
    return replace(of, fusions=fusions, bias_fusions=biases, source_base=None, betas=None, moments=None)


def rescaled(merge: Merge, model: PreTrainedModel, norms: Mapping[Site, float]) -> Merge:
    """Return a merge whose update ||beta * M_S(Delta_r)||_F has the given norm at every site; one of zero stays zero.

    Raises:
        SnrfError: as a call of ``Merge``.
    """
    own = merge.norms(model)
    return replace(merge, betas={site: norms[site] / norm if norm else 0.0 for site, norm in own.items()})


def dare(merge: Merge, drop_rate: float, seed: int) -> Merge:
    """Return the merge with DARE's update in place of its own, at full rank."""

    def fusion(of: Fusion) -> Fusion:
        return Fusion(beta=of.beta, update="dare", drop_rate=drop_rate, seed=seed)

    return replace(merge, fusions={site: fusion(of) for site, of in merge.fusions.items()})
