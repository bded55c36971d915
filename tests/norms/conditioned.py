"""Norms that take an extra input, with their formulas and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import normswap
from tests.norms.beyond import set_buffers
from tests.reference import conditioned as formulas
from tests.reference.data import fill, values

CHANNELS = 6
SAMPLES = 4
SHAPES = [(SAMPLES, CHANNELS, 5), (SAMPLES, CHANNELS, 3, 4), (SAMPLES, CHANNELS, 2, 3, 2)]

#: ``inputs(shape) -> the extra inputs by name``, for an input of a shape.
Inputs = Callable[[tuple[int, ...]], dict[str, Any]]


@dataclass(frozen=True)
class Conditioned:
    """A norm with its options, its formula and its extra inputs."""

    norm: str
    formula: Callable[..., Tensor]
    inputs: Inputs
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def build(self, dim: int = 2) -> nn.Module:
        """The norm in double precision, every number in it different."""
        return set_buffers(fill(normswap.build(self.norm, CHANNELS, dim=dim, **self.options)))

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.norm}({options}){self.name}"


def floats(*sizes: int, name: str, seed: int = 50) -> Inputs:
    return lambda shape: {name: values(shape[0], *sizes, seed=seed)}


def fixed(**given: Any) -> Inputs:
    return lambda shape: given


def segmap(shape: tuple[int, ...], labels: int = 3) -> Tensor:
    """A label map of twice and of half the size, in turn, to be resized."""
    size = [2 * n if at % 2 == 0 else max(n // 2, 1) for at, n in enumerate(shape[2:])]
    generator = torch.Generator().manual_seed(5)
    return torch.randint(labels, (shape[0], *size), generator=generator)


def soft(shape: tuple[int, ...]) -> Tensor:
    """Maps of each label that overlap, with gaps."""
    chosen = formulas.one_hot(segmap(shape), 3, len(shape))
    more = formulas.one_hot(segmap(shape).flip(0), 3, len(shape))
    return (chosen + more * (torch.arange(len(chosen)) % 2).view(-1, *[1] * (chosen.ndim - 1))) * (
        segmap(shape)[:, None] != 1
    )


def mask(shape: tuple[int, ...]) -> Tensor:
    return (segmap(shape) > 0)[:, None]


IDS = torch.tensor([1, 0, 2, 1])
BATCH, OWN = formulas.over_batch, formulas.over_groups(CHANNELS)
CLASSES = {"num_classes": 3}
EMBEDDING = {"condition_dim": 5, "hidden_dim": 7}
BASES = {
    "bn": (BATCH, {}),
    "in": (OWN, {}),
    "gn": (formulas.over_groups(2), {"num_groups": 2}),
    "ln": (formulas.over_groups(1), {}),
    "ghost_bn": (formulas.over_parts(2), {"group_size": 2}),
}
SPADE = {"num_labels": 3, "hidden_dim": 4}
SEAN = {**SPADE, "style_dim": 5}

CASES = [
    Conditioned("dsbn", formulas.by_domain, fixed()),
    Conditioned("dsbn", formulas.by_domain, fixed(domain=2), {"num_domains": 3}, "one"),
    Conditioned("dsbn", formulas.by_domain, fixed(domain=IDS), {"num_domains": 4}, "mixed"),
    Conditioned("split_bn", formulas.by_split, fixed(labelled=IDS == 1)),
    Conditioned("split_bn", formulas.by_split, fixed(labelled=IDS == 1), {"affine": "separate"}),
    Conditioned("split_bn", formulas.by_split, fixed(), {"affine": "separate"}, "all"),
    Conditioned("cond_bn", formulas.by_class(BATCH), fixed(label=IDS), CLASSES),
    Conditioned("cond_bn", formulas.by_class(BATCH), fixed(label=2), CLASSES, "one"),
    Conditioned("cond_in", formulas.by_class(OWN), fixed(label=IDS), CLASSES),
    Conditioned("cond_in", formulas.by_class(OWN), floats(3, name="label"), CLASSES, "mixed"),
    Conditioned("cond_bn", formulas.by_embedding(BATCH), floats(5, name="condition"), EMBEDDING),
    Conditioned("cond_in", formulas.by_embedding(OWN), floats(5, name="condition"), EMBEDDING),
    *(
        Conditioned(
            "cond", formulas.by_class(f), fixed(label=IDS), {**CLASSES, "base": name, **options}
        )
        for name, (f, options) in BASES.items()
    ),
    Conditioned("adain", formulas.by_style_vector, floats(5, name="style"), {"style_dim": 5}),
    *(
        Conditioned(
            "adacon",
            formulas.by_filters(size),
            floats(5, name="style"),
            {"style_dim": 5, "kernel_size": size},
        )
        for size in (3, 5)
    ),
    *(
        Conditioned(
            "spade",
            formulas.by_label_map(f),
            lambda shape: {"segmap": segmap(shape)},
            {**SPADE, "base": name, **options},
        )
        for name, (f, options) in BASES.items()
    ),
    Conditioned(
        "spade", formulas.by_label_map(BATCH), lambda shape: {"segmap": soft(shape)}, SPADE, "soft"
    ),
    *(
        Conditioned(
            "sean",
            formulas.by_region_style(f),
            lambda shape: {"segmap": segmap(shape), "style": values(SAMPLES, 3, 5, seed=51)},
            {**SEAN, "base": name, **options},
        )
        for name, (f, options) in list(BASES.items())[:3]
    ),
    Conditioned(
        "sean",
        formulas.by_region_style(BATCH),
        lambda shape: {"segmap": soft(shape), "style": values(SAMPLES, 3, 5, seed=51)},
        {**SEAN, "kernel_size": 1},
        "overlapping",
    ),
    *(
        Conditioned(
            "rn_b", formulas.by_mask(**options), lambda shape: {"mask": mask(shape)}, options
        )
        for options in ({}, {"per_sample": True}, {"eps_scaled": False, "official_bias": True})
    ),
]
