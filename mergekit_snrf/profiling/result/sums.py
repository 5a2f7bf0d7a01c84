"""What a run adds up over probes, which combines over processes and resumed runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_snrf.errors import SnrfError

MAX_PROBES = 2**31 - 1
"""More would overflow the int32 counts."""

_COMBINED: dict[str, Callable[..., Tensor]] = {"min": torch.minimum, "max": torch.maximum, "sum": torch.add}


class Sums(ABC):
    """Tensors that combine element by element with those of other probes; subclasses name them in ``parts``."""

    probes: int = 0

    @abstractmethod
    def parts(self) -> dict[str, tuple[Tensor, str]]:
        """Return every tensor, which is changed in place, with ``min``, ``max``, ``sum``, or ``same`` for a setting."""

    def count(self, probes: int) -> None:
        """Count more probes. Raises ``SnrfError`` if there are too many."""
        if self.probes + probes > MAX_PROBES:
            raise SnrfError(None, f"a profile holds at most {MAX_PROBES} probes")
        self.probes += probes

    def merge(self, other: Any) -> None:
        """Add the sums of other probes through the same model. Raises ``SnrfError`` if they are of another model."""
        mine, theirs = self.parts(), other.parts()
        if {key: tensor.shape for key, (tensor, _) in mine.items()} != {key: t.shape for key, (t, _) in theirs.items()}:
            raise SnrfError(None, "statistics of different models cannot be merged: their sites or neurons differ")
        self.count(other.probes)
        for key, (tensor, operation) in mine.items():
            if operation != "same":
                _COMBINED[operation](tensor, theirs[key][0], out=tensor)

    def reduce(self, reduce: Callable[[Tensor, str], None]) -> None:
        """Combine with other processes; ``reduce`` combines a tensor in place with theirs at the same call."""
        for tensor, operation in self.parts().values():
            if operation != "same":
                reduce(tensor, operation)
        probes = torch.tensor(self.probes)
        reduce(probes, "sum")
        self.probes = int(probes)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a journal, not copied; equal sums have equal states."""
        return {key: tensor for key, (tensor, _) in self.parts().items()}

    def restore(self, tensors: Mapping[str, Tensor], probes: int) -> None:
        """Take over a state of sums of the same model and settings; ``SnrfError`` names a tensor that does not fit."""
        parts = self.parts()
        if tensors.keys() != parts.keys():
            raise SnrfError(None, f"tensor {sorted(tensors.keys() ^ parts.keys())[0]!r} is missing or unknown")
        for key, (tensor, operation) in parts.items():
            found = tensors[key]
            if found.dtype != tensor.dtype or found.shape != tensor.shape:
                wanted = f"{tensor.dtype} of shape {list(tensor.shape)}"
                got = f"{found.dtype} of shape {list(found.shape)}"
                raise SnrfError(None, f"tensor {key!r} must be {wanted}, got {got}")
            if operation == "same" and not torch.equal(found, tensor):
                raise SnrfError(None, f"tensor {key!r} was {found.tolist()} and is {tensor.tolist()}")
        for key, (tensor, _) in parts.items():
            tensor.set_(tensors[key])  # type: ignore[call-overload]
        self.probes = probes
