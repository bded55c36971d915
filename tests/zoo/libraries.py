"""Where whole models come from: timm, torchvision and transformers, built without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.zoo.families import FAMILIES


@dataclass(frozen=True)
class Zoo:
    """A library's models.

    Args:
        names: all of them.
        build: one on the current device, in eval mode.
        inputs: arguments of one forward for it, on a device, for so many samples.
    """

    names: Callable[[], list[str]]
    build: Callable[[str], Any]
    inputs: Callable[[str, Any, str, int], Any]


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def _timm_build(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False).eval()


def _timm_inputs(name: str, model: Any, device: str, batch: int) -> Any:
    size = model.pretrained_cfg.get("input_size") or (3, 224, 224)
    return (torch.randn(batch, *size, device=device),)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [name for name in models.list_models() if not name.startswith("quantized")]


def _torchvision_build(name: str) -> nn.Module:
    from torchvision import models

    backbone = {"weights_backbone": None} if name in _with_backbone() else {}
    device = torch.get_default_device()
    try:
        model: nn.Module = models.get_model(name, weights=None, **backbone)
    except NotImplementedError:  # regnets compute their widths with tensors
        with torch.device("cpu"):
            model = models.get_model(name, weights=None, **backbone).to(device)
    return model.eval()


def _with_backbone() -> list[str]:
    from torchvision import models

    return [
        *models.list_models(models.detection),
        *models.list_models(models.segmentation),
    ]


def _torchvision_inputs(name: str, model: Any, device: str, batch: int) -> Any:
    from torchvision import models

    if name in models.list_models(models.detection):
        return ([torch.rand(3, 64, 64, device=device) for _ in range(batch)],)
    if name in models.list_models(models.optical_flow):
        return tuple(torch.randn(batch, 3, 128, 128, device=device) for _ in range(2))
    if name in models.list_models(models.video):
        frames = 16 if "swin" not in name else 8
        size = 224 if "mvit" in name or name == "s3d" else 112
        return (torch.randn(batch, 3, frames, size, size, device=device),)
    size = {"inception_v3": 299, "vit_h_14": 224}.get(name, 224)
    return (torch.randn(batch, 3, size, size, device=device),)


def _family_build(name: str) -> nn.Module:
    return FAMILIES[name].build().eval()


def _family_inputs(name: str, model: Any, device: str, batch: int) -> Any:
    return {key: value.to(device) for key, value in FAMILIES[name].inputs(batch).items()}


ZOOS = {
    "timm": Zoo(_timm_names, _timm_build, _timm_inputs),
    "torchvision": Zoo(_torchvision_names, _torchvision_build, _torchvision_inputs),
    "transformers": Zoo(lambda: list(FAMILIES), _family_build, _family_inputs),
}
