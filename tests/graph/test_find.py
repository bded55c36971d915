"""Which modules are found, under which names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.graph.models import CHANNELS, block

NORMS = {
    "batch_norm": [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4)],
    "group_norm": [nn.GroupNorm(2, 4)],
    "instance_norm": [nn.InstanceNorm1d(4), nn.InstanceNorm2d(4), nn.InstanceNorm3d(4)],
    "layer_norm": [nn.LayerNorm(4), nn.LayerNorm((4, 3, 3))],
}


def paths(model: nn.Module) -> list[str]:
    return [site.path for site in normswap.find(model)]


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        pytest.param(kind, norm, id=f"{type(norm).__name__}-{index}")
        for kind, norms in NORMS.items()
        for index, norm in enumerate(norms)
    ],
)
def test_torchs_norms_are_found(kind: str, norm: nn.Module) -> None:
    (site,) = normswap.find(nn.Sequential(nn.Identity(), norm))
    assert (site.path, site.kind, site.origin, site.num_features) == ("1", kind, "module", 4)
    assert site.module is norm


def test_sites_come_in_the_order_of_the_modules() -> None:
    model = nn.Sequential(block(), nn.LayerNorm(3), nn.Sequential(block()))
    assert paths(model) == ["0.1", "1", "2.0.1"]


def test_a_model_without_norms_has_no_sites() -> None:
    assert len(normswap.find(nn.Linear(2, 2))) == 0


def test_the_model_itself_may_be_a_norm() -> None:
    (site,) = normswap.find(nn.BatchNorm2d(3))
    assert site.path == ""
    assert "the model itself" in site.label


def test_one_object_under_two_names_is_one_site() -> None:
    shared = nn.BatchNorm2d(CHANNELS)
    model = nn.Module()
    model.first, model.second = shared, shared
    (site,) = normswap.find(model)
    assert (site.path, site.aliases, site.names) == ("first", ("second",), ("first", "second"))


def test_one_object_under_two_parents_is_one_site() -> None:
    shared = nn.BatchNorm2d(CHANNELS)
    (site,) = normswap.find(nn.Sequential(nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared)))
    assert site.names == ("0.0", "1.1")


def test_a_norm_in_a_shared_parent_has_all_its_names() -> None:
    shared = block()
    (site,) = normswap.find(nn.Sequential(shared, shared))
    assert site.names == ("0.1", "1.1")


def test_a_subclass_is_its_family() -> None:
    class Renamed(nn.BatchNorm2d):
        pass

    (site,) = normswap.find(Renamed(CHANNELS))
    assert (site.kind, site.obstacle) == ("batch_norm", "")


def test_a_subclass_with_a_forward_of_its_own_is_found_with_an_obstacle() -> None:
    class Doubling(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    (site,) = normswap.find(Doubling(CHANNELS))
    assert site.kind == "batch_norm"
    assert "overrides the forward" in site.obstacle


def test_a_forward_replaced_on_the_instance_is_an_obstacle() -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    assert "replaced on the instance" in normswap.find(norm)[0].obstacle


def test_an_uninitialised_lazy_norm_is_found_with_an_obstacle() -> None:
    (site,) = normswap.find(nn.Sequential(nn.LazyBatchNorm2d()))
    assert site.kind == "batch_norm"
    assert "run one batch" in site.obstacle


def test_what_is_inside_a_norm_is_its_own() -> None:
    outer = nn.BatchNorm2d(CHANNELS)
    outer.inner = nn.BatchNorm2d(CHANNELS)
    assert paths(nn.Sequential(outer)) == ["0"]


@pytest.mark.parametrize(
    ("to", "kind"), [("gn", "group_norm"), ("sync_bn", "batch_norm"), ("identity", "identity")]
)
def test_a_converted_models_norms_are_found_where_the_old_ones_were(to: str, kind: str) -> None:
    model = normswap.convert(nn.Sequential(block(), block()), to, carry="fresh")
    assert [(site.path, site.kind) for site in normswap.find(model)] == [
        ("0.1", kind),
        ("1.1", kind),
    ]


def test_tokens_have_their_channels_last() -> None:
    first, second = normswap.find(nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4)))
    assert (first.channel_dim, second.channel_dim) == (1, -1)


def test_a_slice_of_sites_is_sites_again() -> None:
    sites = normswap.find(nn.Sequential(block(), block(), block()))[1:]
    assert [site.path for site in sites] == ["1.1", "2.1"]
    assert sites[0].producer == "1.0"


def test_sites_are_counted_by_kind() -> None:
    sites = normswap.find(nn.Sequential(block(), block(), nn.LayerNorm(3)))
    assert sites.counts() == {"batch_norm": 2, "layer_norm": 1}


def test_sites_cannot_be_changed() -> None:
    (site,) = normswap.find(block())
    with pytest.raises(AttributeError):
        site.path = "elsewhere"  # type: ignore[misc]


def test_a_model_on_the_meta_device_stays_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(block(), block())
    sites = normswap.find(model)
    assert [(site.path, site.activation) for site in sites] == [("0.1", "0.2"), ("1.1", "1.2")]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_on_the_meta_device_takes_example_inputs_there() -> None:
    with torch.device("meta"):
        (site,) = normswap.find(block(), torch.empty(2, CHANNELS, 5, 5))
    assert site.input_shape == (2, CHANNELS, 5, 5)


def test_the_table_shows_path_class_and_surroundings() -> None:
    shared = block()
    printed = str(normswap.find(nn.Sequential(shared, nn.LayerNorm(7), shared)))
    for text in ("0.1", "BatchNorm2d", "0.0", "0.2", "2.1", "LayerNorm", "layer_norm", "7"):
        assert text in printed
