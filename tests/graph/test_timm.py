"""timm's models: hard to trace, and with norms that carry their activation."""

from __future__ import annotations

import pytest
from torch import nn

import normswap

timm = pytest.importorskip("timm", minversion="1.0")


def test_resnet50_shows_all_its_norms_and_what_stands_around_them() -> None:
    sites = normswap.find(timm.create_model("resnet50"))
    assert sites.counts() == {"batch_norm": 53}
    assert sites.blind == {}
    assert all(site.calls == 1 and site.producer for site in sites)
    # Every bottleneck adds its input between the third norm and the activation.
    assert sum(site.activation is not None for site in sites) == 1 + 2 * 16


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("efficientvit_b0", {"batch_norm": 26, "layer_norm": 1}),
        ("hiera_tiny_224", {"layer_norm": 25}),
        ("crossvit_9_240", {"layer_norm": 44}),
        ("levit_128", {"batch_norm": 64}),
    ],
)
def test_models_that_are_hard_to_trace_are_searched(name: str, counts: dict[str, int]) -> None:
    sites = normswap.find(timm.create_model(name))
    assert sites.counts() == counts
    assert any(site.calls for site in sites)


def test_no_norm_of_an_efficientvit_is_taken_for_unused() -> None:
    sites = normswap.find(timm.create_model("efficientvit_b0"))
    assert [site.path for site in sites if site.calls == 0] == []


def test_a_norm_that_carries_its_activation_is_one_site() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), timm.layers.BatchNormAct2d(4))
    (site,) = normswap.find(model)
    assert (site.path, site.kind, site.producer) == ("1", "batch_norm", "0")
    assert site.activation == "1.act"


def test_a_norm_that_carries_no_activation_has_none() -> None:
    model = nn.Sequential(timm.layers.BatchNormAct2d(4, apply_act=False), nn.Conv2d(4, 4, 1))
    assert normswap.find(model)[0].activation is None


def test_an_activation_after_a_norm_that_carries_none_is_seen() -> None:
    model = nn.Sequential(timm.layers.BatchNormAct2d(4, apply_act=False), nn.ReLU())
    assert normswap.find(model)[0].activation == "1"
