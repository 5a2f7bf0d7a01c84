"""Shared Neuron Low-Rank Fusion (SNRF) for mergekit.

Importing this package imports neither torch nor mergekit; the names of ``mergekit_snrf.api`` load when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_snrf.api import *  # noqa: F403

__version__ = "0.2.0"

# Python asks for submodules here too, before it looks for their files, so the names must be known without an import.
_API = {
    *("Edit", "Fusion", "Mask", "Measure", "Neuron", "NeuronSet", "Profile", "Site", "SnrfError"),
    *("deactivate", "fuse_model", "fuse_state_dict"),
    *("load_mask", "open_checkpoint", "profile", "read_profile", "select", "write_mask", "write_profile"),
}


def __getattr__(name: str) -> Any:
    """Load the Python interface when one of its names is first used."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mergekit_snrf import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """Return the names of the Python interface, too."""
    return sorted({*globals(), *_API})
