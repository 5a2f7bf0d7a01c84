"""Shared Neuron Low-Rank Fusion (SNRF) for mergekit.

Importing this package imports neither torch nor mergekit; a public name loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergekit_snrf.files.shown import show_with

if TYPE_CHECKING:
    from mergekit_snrf.errors import SnrfError as SnrfError
    from mergekit_snrf.evidence.ablate import ablate as ablate
    from mergekit_snrf.evidence.comparison import compare as compare
    from mergekit_snrf.evidence.evaluation import evaluation as evaluation
    from mergekit_snrf.evidence.overlap import overlap as overlap
    from mergekit_snrf.evidence.results import Overlap as Overlap
    from mergekit_snrf.evidence.results import Study as Study
    from mergekit_snrf.evidence.results import read_result as read_result
    from mergekit_snrf.evidence.study_results import Sweep as Sweep
    from mergekit_snrf.evidence.sweeps import sweep as sweep
    from mergekit_snrf.fusion.fuse import Fusion as Fusion
    from mergekit_snrf.models.checkpoint import open_checkpoint as open_checkpoint
    from mergekit_snrf.models.edits import Edit as Edit
    from mergekit_snrf.models.edits import deactivate as deactivate
    from mergekit_snrf.models.edits import fuse_model as fuse_model
    from mergekit_snrf.models.edits import fuse_state_dict as fuse_state_dict
    from mergekit_snrf.neurons.maskfile import Mask as Mask
    from mergekit_snrf.neurons.maskfile import load_mask as load_mask
    from mergekit_snrf.neurons.maskfile import write_mask as write_mask
    from mergekit_snrf.neurons.sets import NeuronSet as NeuronSet
    from mergekit_snrf.neurons.sites import Neuron as Neuron
    from mergekit_snrf.neurons.sites import Site as Site
    from mergekit_snrf.profiling.measure.meter import Measure as Measure
    from mergekit_snrf.profiling.notebook import profile as profile
    from mergekit_snrf.profiling.result.profilefile import Profile as Profile
    from mergekit_snrf.profiling.result.profilefile import read_profile as read_profile
    from mergekit_snrf.profiling.result.profilefile import write_profile as write_profile
    from mergekit_snrf.profiling.result.selection import Selection as Selection
    from mergekit_snrf.profiling.result.selection import select as select

__version__ = "0.2.0"

_MODULES = {
    "errors": ("SnrfError",),
    "evidence.ablate": ("ablate",),
    "evidence.comparison": ("compare",),
    "evidence.evaluation": ("evaluation",),
    "evidence.overlap": ("overlap",),
    "evidence.results": ("Overlap", "Study", "read_result"),
    "evidence.sweeps": ("sweep",),
    "evidence.study_results": ("Sweep",),
    "fusion.fuse": ("Fusion",),
    "models.checkpoint": ("open_checkpoint",),
    "models.edits": ("Edit", "deactivate", "fuse_model", "fuse_state_dict"),
    "neurons.maskfile": ("Mask", "load_mask", "write_mask"),
    "neurons.sets": ("NeuronSet",),
    "neurons.sites": ("Neuron", "Site"),
    "profiling.measure.meter": ("Measure",),
    "profiling.notebook": ("profile",),
    "profiling.result.profilefile": ("Profile", "read_profile", "write_profile"),
    "profiling.result.selection": ("Selection", "select"),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    # Python asks for submodules here too, before it looks for their files.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


show_with(lambda: import_module(f"{__name__}.evidence.views"))


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
