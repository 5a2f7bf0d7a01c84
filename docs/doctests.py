"""A griffe extension: doctests in docstrings become code blocks."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Put a fence around each block that starts with >>>."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^>>> .*(?:\n.*\S.*)*", r"```pycon\n\g<0>\n```", obj.docstring.value)
