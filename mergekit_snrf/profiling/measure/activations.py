"""Counts of activations above zero, by neuron, while batches run through a model once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.activations import DECODER, VISION, Activation, find_activations
from mergekit_snrf.models.live import LiveDecoder
from mergekit_snrf.profiling.measure.inputs import run_once
from mergekit_snrf.profiling.probes.answers import image_ids
from mergekit_snrf.profiling.probes.batches import ProbeBatch
from mergekit_snrf.profiling.result.domains import KINDS, tokens_key
from mergekit_snrf.profiling.result.statistics import Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Elements that are compared at once: the memory beside the model's own stays small.
_BLOCK = 2**22
_PATCHES = "patch_attention_mask"


class ActivationCounts(Sums):
    """Counts of one domain: whole numbers, so that they are exact for every split of the probes.

    ``parts`` are those of a ``snrf-domains`` file without the axis of the domains; ``tokens`` has one axis more.
    """

    def __init__(self, activations: list[Activation]) -> None:
        self.counts: dict[str, Tensor] = {}
        for one in activations:
            kinds = [len(KINDS)] if one.module == DECODER else []
            self.counts[f"{one.key}.active"] = torch.zeros([*kinds, one.neurons], dtype=torch.int64)
            self.counts.setdefault(tokens_key(one.module), torch.zeros(kinds, dtype=torch.int64))

    def parts(self) -> dict[str, tuple[Tensor, str]]:
        """Return all counts."""
        return {key: (tensor, "sum") for key, tensor in self.counts.items()}


class ActivationCounter:
    """Counts the activations of a model above zero, in one forward pass for each batch.

    Padding never counts, and neither do the patches that pad an image, where the vision tower is given their mask.
    ``SnrfError``: an activation of the text decoder is not a module, or one is not elementwise.
    """

    def __init__(self, model: PreTrainedModel, decoder: LiveDecoder) -> None:
        self.model, self.decoder = model, decoder
        self.activations = find_activations(model, decoder)
        self._images = image_ids(model.config)

    def empty(self) -> ActivationCounts:
        """Return counts of no tokens."""
        return ActivationCounts(self.activations)

    def visit(self, sums: ActivationCounts, batch: ProbeBatch) -> None:
        """Run a batch through the model and count.

        ``SnrfError``: an activation did not run, has another size or gives NaN, or images cannot be counted.
        """
        seen: dict[str, int] = {}
        kinds = self._kinds(batch)
        patches: list[Tensor] = []

        def count(one: Activation, output: Tensor) -> None:
            if output.shape[-1] != one.neurons or (one.module == DECODER and output.shape[:-1] != kinds.shape[1:]):
                raise self._unsupported(f"{one.path} returns {list(output.shape)}")
            where = kinds.flatten(1) if one.module == DECODER else self._patches(one, output, patches)
            active = sums.counts[f"{one.key}.active"]
            active += self._active(one, output.detach().flatten(0, -2), where).view(active.shape)
            seen[one.path] = seen.get(one.path, 0) + int(where.sum())

        with self._hooked(count, patches), torch.no_grad():
            run_once(self.model, batch.inputs)
        self._check(seen, int(kinds.sum()), batch)
        sums.count(len(batch.numbers))
        sums.counts[tokens_key(DECODER)] += kinds.sum(dim=(1, 2)).cpu()
        for module, path in {one.module: one.path for one in self.activations if one.module != DECODER}.items():
            sums.counts[tokens_key(module)] += seen.get(path, 0)

    def _kinds(self, batch: ProbeBatch) -> Bool[Tensor, "kinds batch tokens"]:
        """Return which tokens are of an image, of the prompt otherwise, and of the answer."""
        real = batch.attention_mask != 0
        answer = batch.answer_mask & real
        ids = batch.inputs["input_ids"]
        image = torch.isin(ids, torch.tensor(self._images, device=ids.device, dtype=ids.dtype)) & real & ~answer
        return torch.stack([image, real & ~image & ~answer, answer])

    def _active(
        self, one: Activation, rows: Float[Tensor, "tokens neurons"], where: Bool[Tensor, "kinds tokens"]
    ) -> Int64[Tensor, "kinds neurons"]:
        where = where.to(rows.device)
        total = torch.zeros(len(where), one.neurons, dtype=torch.int64)
        step = max(1, _BLOCK // one.neurons)
        for part, chosen in zip(rows.split(step), where.split(step, dim=1), strict=True):
            if bool((part.isnan().any(1) & chosen.any(0)).any()):
                remedy = "load the model in a dtype of more range such as float32"
                raise SnrfError(self.decoder.model, f"the activation {one.path} gives NaN", remedy)
            # Sums of up to 2^22 ones are exact in float32.
            total += (chosen.float() @ (part > 0).float()).long().cpu()
        return total

    @contextmanager
    def _hooked(self, count: Callable[[Activation, Tensor], None], patches: list[Tensor]) -> Iterator[None]:
        def watched(one: Activation) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda module, args, output: count(one, output)

        def entered(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
            patches[:] = [] if given.get(_PATCHES) is None else [given[_PATCHES]]

        with ExitStack() as stack:
            for one in self.activations:
                stack.enter_context(one.act.register_forward_hook(watched(one)))
            for module in self.model.modules():
                if _PATCHES in inspect.signature(module.forward).parameters:
                    stack.enter_context(module.register_forward_pre_hook(entered, with_kwargs=True))
            yield

    def _patches(self, one: Activation, output: Tensor, masks: list[Tensor]) -> Bool[Tensor, "1 tokens"]:
        """Return which tokens of a vision tower or projector are of an image and not padding."""
        tokens = output.shape[:-1].numel()
        if one.module != VISION or not masks:
            return torch.ones(1, tokens, dtype=torch.bool)
        if masks[0].numel() != tokens:
            raise self._unsupported(f"{one.path} sees {tokens} patches, their mask has {masks[0].numel()}")
        return masks[0].bool().view(1, -1)

    def _check(self, seen: dict[str, int], tokens: int, batch: ProbeBatch) -> None:
        """Check that every layer of the text decoder ran once, and those of a vision tower or projector alike."""
        images = any(name.startswith("pixel_") for name in batch.inputs)
        if images and not self._images:
            raise self._unsupported("its configuration does not name the token that stands for an image")
        if images and not any(one.module == VISION for one in self.activations):
            raise self._unsupported("its vision tower has no MLP whose activation is a module")
        first: dict[str, Activation] = {}
        for one in self.activations:
            before = first.setdefault(one.module, one)
            expected = tokens if one.module == DECODER else seen.get(before.path, 0)
            found = seen.get(one.path, 0)
            if found != expected or (images and not found):
                beside = "it did not run" if not found else f"it ran on {found} tokens, expected {expected}"
                raise self._unsupported(f"{beside}: {one.path}")

    def _unsupported(self, what: str) -> SnrfError:
        return self.decoder.unsupported(f"its activations cannot be counted: {what}")
