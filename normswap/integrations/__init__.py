"""What other libraries bring: learned when, and only when, they are imported themselves."""

from __future__ import annotations

import sys

__all__ = ["install_loaded"]


def install_loaded() -> None:
    """Learn from every supported library that the process has imported by now."""
    if "timm.layers" in sys.modules:
        from normswap.integrations.timm import install

        install()
