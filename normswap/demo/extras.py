"""What the demo needs beyond normswap itself."""

from __future__ import annotations

from importlib.util import find_spec

from normswap.errors import MissingExtra

__all__ = ["require_extras"]

#: Import name and distribution of every library that the extra ``demo`` brings.
EXTRAS = {"timm": "timm", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def require_extras() -> None:
    """Make sure that the demo can run, before it spends a minute finding out that it cannot.

    Raises:
        MissingExtra: a library is missing; the message names it and the way to install it.
    """
    missing = [distribution for name, distribution in EXTRAS.items() if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"the demo needs {', '.join(missing)}, not installed here; "
            'get all that it needs by: pip install "normswap[demo]"'
        )
