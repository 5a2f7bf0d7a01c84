"""The one exception type of the package."""

from __future__ import annotations


class SnrfError(ValueError):
    """A problem the user can mend; the message is one sentence with the file, the tensor and the remedy."""
