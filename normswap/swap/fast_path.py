"""torch's fast path through a TransformerEncoderLayer, which reads norms and never calls them.

In eval mode `nn.TransformerEncoderLayer` hands weight, bias and eps of its LayerNorms to one fused
kernel, so a norm put in their place would be ignored. The path is off for layers whose norms were
swapped, and on again once they are back.
"""

from __future__ import annotations

from torch import nn

from normswap.swap.changes import ABSENT, Changes
from normswap.swap.journal import record_of

__all__ = ["keep_in_step"]

#: The one attribute that serves the fast path only; false values switch it off.
_SWITCH = "activation_relu_or_gelu"
_KEPT = "_normswap_fast_path"


def keep_in_step(model: nn.Module, changes: Changes) -> None:
    """Add to ``changes`` what switches the fast path off or on where they swap norms.

    Args:
        model: the model to be changed.
        changes: its replacements, complete.
    """
    replacement = {id(old): new for old, new in changes.modules}
    for layer in model.modules():
        if not isinstance(layer, nn.TransformerEncoderLayer):
            continue
        norms = [replacement.get(id(norm), norm) for norm in (layer.norm1, layer.norm2)]
        swapped = any(record_of(norm) is not None for norm in norms)
        if swapped and _KEPT not in vars(layer):
            changes.attributes.append((layer, _KEPT, getattr(layer, _SWITCH)))
            changes.attributes.append((layer, _SWITCH, 0))
        elif not swapped and _KEPT in vars(layer):
            changes.attributes.append((layer, _SWITCH, vars(layer)[_KEPT]))
            changes.attributes.append((layer, _KEPT, ABSENT))
