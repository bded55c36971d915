"""What example inputs tell: the shape of a norm's input at every call, and its surroundings."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.graph.models import CHANNELS, Around, Branching, Masked, block, image


def test_the_shape_of_the_input_is_told() -> None:
    (site,) = normswap.find(block(), torch.ones(5, CHANNELS, 7, 6))
    assert site.input_shape == (5, CHANNELS, 7, 6)


def test_without_example_inputs_no_shape_is_told() -> None:
    (site,) = normswap.find(block())
    assert (site.input_shape, site.input_shapes) == (None, None)


def test_every_call_has_its_shape() -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    (site,) = normswap.find(
        nn.Sequential(norm, nn.MaxPool2d(2), norm), torch.ones(1, CHANNELS, 4, 4)
    )
    assert site.input_shapes == ((1, CHANNELS, 4, 4), (1, CHANNELS, 2, 2))
    assert site.calls == 2


def test_a_norm_called_by_keyword_has_its_shape() -> None:
    (site,) = normswap.find(Around(lambda m, x: m.norm(input=x)), image())
    assert site.input_shape == tuple(image().shape)
    assert site.calls == 1


def test_a_norm_that_is_not_called_has_no_shape() -> None:
    _, masked = normswap.find(Masked(), image())
    assert (masked.input_shape, masked.calls) == (None, 0)


def test_example_inputs_see_through_control_flow() -> None:
    (site,) = normswap.find(Branching(nn.BatchNorm2d(CHANNELS)), image())
    assert site.calls == 1


class Scaled(nn.Module):
    """Takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(x * scale)


@pytest.mark.parametrize(
    "example_inputs",
    [
        (image(), torch.tensor(2.0)),
        [image(), torch.tensor(2.0)],
        {"scale": torch.tensor(2.0), "x": image()},
    ],
    ids=["tuple", "list", "mapping"],
)
def test_arguments_come_by_position_or_by_name(example_inputs: object) -> None:
    (site,) = normswap.find(Scaled(), example_inputs)
    assert site.input_shape == tuple(image().shape)


def test_a_batch_of_one_is_enough() -> None:
    (site,) = normswap.find(nn.BatchNorm1d(3), torch.ones(1, 3))
    assert site.input_shape == (1, 3)


def test_no_gradients_are_recorded() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.norm(x)

    assert normswap.find(Watching(), image())[0].calls == 1


# -- the graph of a recorded run ----------------------------------------------------------------


class Winding(nn.Module):
    """A flow that no trace without inputs follows: on sizes, on data, over lists, in place."""

    def __init__(self, *, on_data: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(3))
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.on_data = on_data

    def forward(self, x: Tensor, *, loops: int = 1) -> dict[str, Any]:
        if self.on_data and float(x.sum()) > 1e9:
            return {"none": x}
        kept = []
        for conv, norm, act in zip(self.convs, self.norms, self.acts, strict=True):
            for _ in range(loops if x.shape[2] > 2 else 0):
                x = act(norm(conv(x)))
            kept.append(x)
        both = torch.cat(kept)
        both[:1] = kept[0][:1]
        return {"all": both, "last": kept[-1]}


@pytest.mark.parametrize("on_data", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_run_shows_what_no_trace_can(on_data: bool, device: str) -> None:
    model = Winding(on_data=on_data)
    assert normswap.find(model)[0].producer is None
    if device == "meta":
        if on_data:
            pytest.skip("there is no data to flow on")
        model = model.to("meta")
    found = normswap.find(model, image())
    assert found.blind == {}
    assert [site.producer for site in found] == ["convs.0", "convs.1", "convs.2"]
    assert [site.activation for site in found] == ["acts.0", "acts.1", "acts.2"]
    assert [site.order for site in found] == [0, 1, 2]
    assert [site.calls for site in found] == [1, 1, 1]


def test_every_call_of_a_run_counts() -> None:
    found = normswap.find(Winding(), {"x": image(), "loops": 2})
    assert [site.calls for site in found] == [2, 2, 2]


def test_norms_that_need_their_surroundings_have_them_from_the_run() -> None:
    model = Winding().eval()
    expected = model(image())["last"]
    with pytest.raises(normswap.errors.NothingToConvert):
        normswap.convert(copy.deepcopy(model), "fold")
    normswap.convert(model, "fold", example_inputs=image())
    torch.testing.assert_close(model(image())["last"], expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_an_activation_of_such_a_flow_is_replaced() -> None:
    model = normswap.convert(Winding(), "frn", example_inputs=image())
    assert {site.kind for site in normswap.find(model)} == {"filter_response_norm"}
    taus = [name for name, _ in model.named_parameters() if name.endswith("tau")]
    assert len(taus) == 3


def test_a_run_leaves_nothing_behind() -> None:
    model = Winding(on_data=True).train()
    calls: list[object] = []
    model.norms[0].register_forward_hook(lambda *given: calls.append(given))
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    normswap.find(model, image())
    assert not calls
    assert model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@dataclass
class Pair:
    """A leaf's output that is no tuple."""

    first: Tensor
    second: Tensor


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x, x * 2)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("on purpose")


def around(forward: Any, **parts: nn.Module) -> Any:
    """A model of a convolution, a norm, further parts and a forward."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
            self.norm = nn.BatchNorm2d(CHANNELS)
            self.constant = torch.ones(1)
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Model()


def test_what_no_call_that_is_seen_has_made_is_told() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(torch.from_dlpack(m.conv(x).numpy() * 2))

    found = normswap.find(around(forward), image())
    assert list(found.blind) == ["norm"]
    assert "comes from no call of torch" in found.blind["norm"]
    assert (found[0].producer, found[0].calls) == (None, 1)


def test_a_tensor_that_a_module_keeps_is_no_riddle() -> None:
    found = normswap.find(around(lambda m, x: m.norm(m.conv(x) * m.constant)), image())
    assert found.blind == {}


def test_what_a_run_writes_in_place_is_not_the_callers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            raise ValueError("too large")
        return m.norm(x.add_(1))

    given = image()
    before = given.clone()
    normswap.find(around(forward), given)
    assert torch.equal(given, before)


def into_a_part(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 0].add_(1)
    return m.norm(y)


def into_what_is_given(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch.add(x, 1, out=y)
    return m.norm(y)


def into_itself(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    flat = y.view(-1)
    m.relu(flat)
    return m.norm(y)


@pytest.mark.parametrize("forward", [into_a_part, into_what_is_given, into_itself])
def test_what_was_written_over_is_not_the_convolutions_any_more(forward: Any) -> None:
    (site,) = normswap.find(around(forward, relu=nn.ReLU(inplace=True)), image())
    assert (site.producer, site.calls) == (None, 1)


def test_an_error_that_the_model_catches_ends_with_the_part_that_raised_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with suppress(ValueError):
            m.failing(x)
        return m.norm(m.conv(x))

    found = normswap.find(around(forward, failing=Failing()), image())
    assert (found[0].producer, found[0].calls) == ("conv", 1)
    assert found.blind == {}


def test_what_a_part_returns_is_looked_into() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(m.twice(x).second))

    found = normswap.find(around(forward, twice=Twice()), image())
    assert found.blind == {}
    assert found[0].producer == "conv"


@pytest.mark.filterwarnings("ignore:.*jit.script.*:FutureWarning")
def test_a_scripted_part_is_told_where_it_hides_something() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU()))
    found = normswap.find(around(lambda m, x: m.norm(m.part(x)), part=scripted), image())
    assert found[0].calls == 1
    assert found[0].producer is None


def test_activations_of_a_run_are_let_go() -> None:
    alive: list[Any] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(4):
            x = m.conv(x) + 0
            alive.append(weakref.ref(x))
        assert sum(ref() is not None for ref in alive) <= 2
        return m.norm(x)

    normswap.find(around(forward), image())


def called(model: nn.Module, paths: list[str], inputs: Any) -> Counter[str]:
    """How often a run in eval mode calls each of some modules, as hooks see it."""
    calls: Counter[str] = Counter()
    watched = copy.deepcopy(model).eval()
    for path in paths:
        watched.get_submodule(path).register_forward_hook(
            lambda *given, path=path: calls.update([path])
        )
    with torch.no_grad():
        watched(**inputs) if isinstance(inputs, dict) else watched(inputs)
    return calls


#: timm's models that are hard to trace, or to find norms in.
HARD = [
    "hiera_tiny_224",
    "crossvit_9_240",
    "mvitv2_tiny",
    "nest_tiny",
    "mobilevit_s",
    "mobilevitv2_050",
    "efficientvit_m0",
    "efficientvit_b0",
    "tiny_vit_5m_224",
    "levit_128",
    "resnetv2_50d_frn",
    "regnetz_b16_evos",
    "convnextv2_atto",
    "caformer_s18",
    "swin_tiny_patch4_window7_224",
    "repvgg_a0",
    "fastvit_t8",
]


@pytest.mark.parametrize("name", HARD)
def test_a_run_of_a_hard_model_shows_every_call_of_its_norms(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
        x = torch.randn(2, *model.pretrained_cfg["input_size"])
    found = normswap.find(model, x)
    seen = {site.path: site.calls for site in found if site.calls}
    assert seen == dict(called(model, [site.path for site in found], x))
    assert len({site.order for site in found if site.calls}) == len(seen)
    shapes = [shape for site in found for shape in site.input_shapes or ()]
    assert all(len(shape) >= 2 for shape in shapes)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_both_ways_tell_the_same(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
        x = torch.randn(2, *model.pretrained_cfg["input_size"])
    traced, recorded = normswap.find(model), normswap.find(model, x)
    for one, other in zip(traced, recorded, strict=True):
        assert (one.path, one.calls, one.order) == (other.path, other.calls, other.order)
        assert (one.producer, one.activation) == (other.producer, other.activation)
        assert one.around is not None
        assert other.around is not None
        assert one.around.previous == other.around.previous


@pytest.mark.parametrize("stem", ["Bert", "GPT2", "Llama"])
def test_a_run_of_a_transformer_shows_every_call_of_its_norms(stem: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if stem == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    config = getattr(transformers, f"{stem}Config")(vocab_size=32, **sizes)
    model = getattr(transformers, f"{stem}Model")(config)
    inputs = {"input_ids": torch.arange(6)[None]}
    found = normswap.find(model, inputs)
    assert found
    seen = {site.path: site.calls for site in found}
    assert seen == dict(called(model, [site.path for site in found], inputs))
