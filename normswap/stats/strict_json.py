"""Numbers as strict JSON has them, which knows no infinity and nothing that is no number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["strict"]


def strict(value: Any) -> Any:
    """A value with ``None`` for every number in it that is not finite, however deep."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [strict(part) for part in value]
    return value
