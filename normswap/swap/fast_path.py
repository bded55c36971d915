"""torch's fast path through a TransformerEncoderLayer, which reads norms and never calls them.

In eval mode `nn.TransformerEncoderLayer` hands weight, bias and eps of its LayerNorms to one fused
kernel, so a norm put in their place would be ignored. The path is off for layers whose norms were
swapped, and on again once they are back.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from normswap.swap.changes import ABSENT, Changes
from normswap.swap.journal import record_of

__all__ = ["keep_in_step"]

#: By class, the one attribute that serves the fast path only; a false value switches it off.
#: The encoder packs padded tokens for its layers before any of them is asked.
_SWITCHES = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_KEPT = "_normswap_fast_path"


def keep_in_step(model: nn.Module, changes: Changes) -> None:
    """Add to ``changes`` what switches the fast path off or on where they swap norms.

    Args:
        model: the model to be changed.
        changes: its replacements, complete.
    """
    replacement = {id(old): new for old, new in changes.modules}
    for module in model.modules():
        switch = next((name for cls, name in _SWITCHES.items() if isinstance(module, cls)), None)
        if switch is None:
            continue
        norms = (replacement.get(id(part), part) for part in _norms_of_layers(module))
        swapped = any(record_of(norm) is not None for norm in norms)
        if swapped and _KEPT not in vars(module):
            changes.attributes.append((module, _KEPT, getattr(module, switch)))
            changes.attributes.append((module, switch, False))
        elif not swapped and _KEPT in vars(module):
            changes.attributes.append((module, switch, vars(module)[_KEPT]))
            changes.attributes.append((module, _KEPT, ABSENT))


def _norms_of_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The norms that the fast path reads, of one encoder layer or of all in an encoder."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            yield from (layer.norm1, layer.norm2)
