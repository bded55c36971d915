"""What other libraries bring: learned when, and only when, they are imported themselves."""

from __future__ import annotations

import sys

__all__ = ["install_loaded"]

_FROZEN = ("torchvision.ops.misc", "detectron2.layers.batch_norm")


def install_loaded() -> None:
    """Learn from every supported library that the process has imported by now."""
    if "timm.layers" in sys.modules:
        from normswap.integrations.timm import install

        install()
    for name in _FROZEN:
        if name in sys.modules:
            from normswap.integrations import frozen

            frozen.install(sys.modules[name])
