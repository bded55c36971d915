"""LayerNorms of residual streams as RMSNorms that keep the function, or the reason why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import CannotRevert, NothingToConvert
from tests.swap.helpers import Snapshot, filled, same_bits

SIZE = 12
TOLERANCE = 1e-10


class Block(nn.Module):
    """Attention and an MLP, each behind a norm; dropout before what they add."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE, eps=1e-3)
        self.attention = nn.MultiheadAttention(SIZE, 2, batch_first=True)
        self.up, self.act = nn.Linear(SIZE, 2 * SIZE), nn.GELU()
        self.down, self.drop = nn.Linear(2 * SIZE, SIZE, bias=False), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop(self.attention(y, y, y, need_weights=False)[0])
        y = self.drop(self.down(self.act(self.up(self.norm2(x)))))
        y += x
        return y


class Vision(nn.Module):
    """A small ViT: patches, a class token, positions, blocks, a norm, a head."""

    block: Callable[[], nn.Module] = Block

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, SIZE, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, SIZE))
        self.positions = nn.Parameter(torch.zeros(1, 10, SIZE))
        self.blocks = nn.ModuleList(type(self).block(**options) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, 5)

    def stem(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()


def trained(model: nn.Module) -> Any:
    """In double precision, with numbers in all tensors, far from a mean of 0."""
    model = filled(model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3
    return model


def converted(model: nn.Module, x: Any, to: str = "rms") -> Any:
    return normswap.convert(model, to, exact=True, example_inputs=x, strict=True)


def test_a_vision_transformer_computes_the_same() -> None:
    model = trained(Vision())
    before, expected = Snapshot(model), model(image())
    plan = normswap.plan(model, "rms", exact=True, example_inputs=image())
    assert [str(step.fidelity) for step in plan] == ["exact"] * 5
    assert all("write to its stream" in step.start.note for step in plan)
    plan.apply()
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    torch.testing.assert_close(model(image()), expected, rtol=TOLERANCE, atol=TOLERANCE)
    model.train()
    torch.testing.assert_close(model(image()), expected, rtol=TOLERANCE, atol=TOLERANCE)
    normswap.revert(model.eval())
    before.assert_kept(model)
    assert same_bits(model(image()), expected)


def test_without_it_the_function_is_another() -> None:
    model = trained(Vision())
    expected = model(image())
    normswap.convert(model, "rms", example_inputs=image())
    assert (model(image()) - expected).abs().max() > 1e-2


def test_what_writes_has_no_mean_over_channels_afterwards() -> None:
    model = converted(trained(Vision()), image())
    stream = model.stem(image())
    for block in model.blocks:
        assert stream.mean(-1).abs().max() < TOLERANCE
        stream = block(stream)
    assert stream.mean(-1).abs().max() < TOLERANCE


def test_dropout_on_the_stream_leaves_it_exact_in_evaluation() -> None:
    model = trained(Vision(p=0.5))
    expected = model(image())
    plan = normswap.plan(model, "rms", exact=True, example_inputs=image())
    assert {str(step.fidelity) for step in plan} == {"eval"}
    torch.testing.assert_close(plan.apply()(image()), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_part_of_the_norms_may_stay() -> None:
    model = trained(Vision())
    expected = model(image())
    normswap.convert(model, "rms", where="blocks.0.*", exact=True, example_inputs=image())
    assert isinstance(model.norm, nn.LayerNorm)
    torch.testing.assert_close(model(image()), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_twice_is_once() -> None:
    model = converted(trained(Vision()), image())
    state = copy.deepcopy(model.state_dict())
    plan = normswap.plan(model, "rms", exact=True, example_inputs=image())
    assert {step.action for step in plan} == {"already"}
    assert all(same_bits(value, state[key]) for key, value in plan.apply().state_dict().items())


class Channels(Vision):
    """Its stream is a map, channels first; 1 x 1 convolutions write to it."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normswap.build("ln2d", SIZE)
            self.one, self.act = nn.Conv2d(SIZE, 7, 1), nn.ReLU()
            self.other = nn.Conv2d(7, SIZE, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.act(self.one(self.norm(x)))) + x

    block = Part

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean((2, 3))))


def test_a_stream_of_maps_computes_the_same() -> None:
    model = trained(Channels())
    expected = model(image())
    normswap.convert(model, "rms2d", exact=True, example_inputs=image(), strict=True)
    assert {site.state.norm for site in normswap.find(model)} == {"rms2d"}
    torch.testing.assert_close(model(image()), expected, rtol=TOLERANCE, atol=TOLERANCE)


class LayerScale(nn.Module):
    """A parameter for each channel, last or first, that what is added is multiplied by."""

    def __init__(self, *ones: int, inplace: bool = False) -> None:
        super().__init__()
        self.gamma, self.ones, self.inplace = nn.Parameter(torch.ones(SIZE)), ones, inplace

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(-1, *self.ones)
        return x.mul_(gamma) if self.inplace else x * gamma


class LayerScaled(Vision):
    class Part(Block):
        def __init__(self, p: float = 0.0) -> None:
            super().__init__()
            self.scale1, self.scale2 = LayerScale(), LayerScale(inplace=True)
            self.drop.p = p

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            x = x + self.scale1(self.drop(self.attention(y, y, y, need_weights=False)[0]))
            return x + self.drop(self.scale2(self.down(self.act(self.up(self.norm2(x))))))

    block = Part


class ScaledChannels(Channels):
    class Part(Channels.Part):
        def __init__(self) -> None:
            super().__init__()
            self.scale = LayerScale(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale(self.other(self.act(self.one(self.norm(x)))))

    block = Part


@pytest.mark.parametrize(("make", "to"), [(LayerScaled, "rms"), (ScaledChannels, "rms2d")])
def test_what_scales_the_channels_stays_as_it_is(make: Any, to: str) -> None:
    model = trained(make())
    before, expected = Snapshot(model), model(image())
    scales = {key: value.clone() for key, value in model.state_dict().items() if "gamma" in key}
    plan = normswap.plan(model, to, where="*", exact=True, example_inputs=image())
    assert all(str(step.fidelity) == "exact" for step in plan)
    converted(model, image(), to)
    torch.testing.assert_close(model(image()), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert all(same_bits(model.state_dict()[key], value) for key, value in scales.items())
    stream = model.patches(image()) if to == "rms2d" else model.stem(image())
    for block in model.blocks:
        stream = block(stream)
        assert stream.mean(1 if to == "rms2d" else -1).abs().max() < TOLERANCE
    normswap.revert(model)
    before.assert_kept(model)
    assert same_bits(model(image()), expected)


def test_scaled_and_dropped_it_is_exact_in_evaluation() -> None:
    plan = normswap.plan(trained(LayerScaled(p=0.5)), "rms", exact=True, example_inputs=image())
    assert {str(step.fidelity) for step in plan} == {"eval"}


# -- where it cannot be ---------------------------------------------------------------------------


class PostNorm(Vision):
    class Part(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(x + self.down(self.act(self.up(x))))

    block = Part


class ReadByALinear(Vision):
    class Part(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x))

    block = Part


class Returned(Vision):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return x, self.head(self.norm(x))


class Scaled(Vision):
    """Multiplies what it adds, channel by channel."""

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x) * self.positions.exp()


class ReadBeforeItsScale(Vision):
    class Part(LayerScaled.Part):
        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(self.norm1(x)))
            return x + self.scale1(y) + self.down(self.up(self.norm2(y)))

    block = Part


class ScaledTwice(Vision):
    class Part(LayerScaled.Part):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale1(self.scale2(self.down(self.up(self.norm1(x)))))

    block = Part


class ScaledInTwoWays(Vision):
    class Part(LayerScaled.Part):
        def forward(self, x: Tensor) -> Tensor:
            y = self.scale1(self.down(self.up(self.norm1(x))))
            return x + y + self.scale2(self.down(self.up(self.norm2(x + y))))

    block = Part


class ScaledByPosition(Vision):
    """With as many positions as there are channels."""

    class Part(LayerScaled.Part):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(SIZE, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.down(self.up(self.norm1(x)))

    block = Part

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(torch.cat([x, x[:, :, :, :2]], 3))[:, :SIZE]

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, SIZE + 1, SIZE))


class ScaleIsAdded(Vision):
    class Part(LayerScaled.Part):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale1(self.down(self.up(self.norm1(x)))) + self.scale1.gamma

    block = Part


class ScaledByASum(Vision):
    class Part(LayerScaled.Part):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.scale1.gamma + self.scale2.gamma
            return x + scale * self.down(self.up(self.norm1(x)))

    block = Part


class ScaledByAConstant(Vision):
    class Part(LayerScaled.Part):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("waves", torch.arange(1.0, SIZE + 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.waves * self.down(self.up(self.norm1(x)))

    block = Part


class Given(Vision):
    """Adds what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(2, 9, SIZE))


class Constant(Vision):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", torch.ones(1, 10, SIZE))

    def stem(self, x: Tensor) -> Tensor:
        return super().stem(x) + self.waves


class Elsewhere(Vision):
    """Uses a layer that writes to the stream for something else, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.patches(x).flatten(1).sum(1, keepdim=True)


class Tied(Vision):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(2 * SIZE, SIZE, bias=False)
        self.tied.weight = self.blocks[0].down.weight


class Rectified(Vision):
    """A layer that writes into what it is given is no dropout that hands it on."""

    class Part(Block):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.down(self.up(self.norm1(x))))

    block = Part


def hooked() -> Vision:
    model = Vision()
    model.blocks[1].down.register_forward_hook(lambda module, args, output: None)
    return model


def hooked_before_a_scale() -> Vision:
    model = LayerScaled()
    model.blocks[1].scale2.register_forward_pre_hook(lambda module, args: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (PostNorm, r"norm2 \(LayerNorm\) writes to its stream|up reads its stream"),
        (ReadByALinear, "reads its stream"),
        (Returned, "the model's output reads its stream"),
        (Scaled, "mul makes what is added|mul reads its stream"),
        (ReadBeforeItsScale, "reads what is scaled for its stream|added to its stream with two"),
        (ScaledTwice, "mul_ makes what is added to its stream"),
        (ScaledInTwoWays, "with two scales"),
        (ScaledByPosition, "mul makes what is added to its stream"),
        (ScaleIsAdded, "mul reads its stream"),
        (ScaledByASum, "mul makes what is added to its stream"),
        (ScaledByAConstant, "waves, which is no parameter, scales what is added"),
        (Given, "an input of the model makes what is added"),
        (Constant, "waves, which is no parameter, is added"),
        (Elsewhere, "patches.* is also used elsewhere|flatten reads its stream"),
        (Tied, "the weight of a Linear is shared with another layer"),
        (Rectified, r"act \(ReLU\) writes to its stream"),
        (hooked, "a hook sees what blocks.1.down adds"),
        (hooked_before_a_scale, "a hook sees what blocks.1.scale2 adds"),
    ],
)
def test_what_cannot_be_exact_stays_with_the_reason(make: Any, reason: str) -> None:
    model = trained(make())
    x = torch.ones(2, 9, SIZE).double() if make is Given else image()
    before = Snapshot(model)
    with pytest.raises(NothingToConvert, match=reason):
        normswap.convert(model, "rms", exact=True, example_inputs=x, where="norm")
    before.assert_kept(model, untouched=True)


def test_a_channel_that_is_scaled_by_zero_takes_nothing_out() -> None:
    model = trained(LayerScaled())
    with torch.no_grad():
        model.blocks[1].scale2.gamma[3] = 0.0
    before = Snapshot(model)
    with pytest.raises(NothingToConvert, match="weight of a Linear has no mean to be taken out"):
        normswap.convert(model, "rms", exact=True, example_inputs=image())
    before.assert_kept(model, untouched=True)


def test_a_weight_that_shares_its_memory_is_not_rewritten() -> None:
    model = trained(Vision())
    model.tied = nn.Parameter(model.blocks[0].down.weight.data)
    with pytest.raises(NothingToConvert, match="the weight of a Linear is shared with another"):
        normswap.convert(model, "rms", exact=True, example_inputs=image())


def test_without_example_inputs_it_says_so() -> None:
    with pytest.raises(NothingToConvert, match="give example_inputs"):
        normswap.convert(trained(Vision()), "rms", exact=True)


def test_another_eps_or_another_kind_of_norm_is_not_exact() -> None:
    with pytest.raises(NothingToConvert, match="another eps"):
        normswap.convert(trained(Vision()), "rms", exact=True, eps=0.1, example_inputs=image())
    model = nn.Sequential(nn.Conv2d(3, SIZE, 1), nn.BatchNorm2d(SIZE)).eval()
    with pytest.raises(NothingToConvert, match="no layer normalization"):
        normswap.convert(model, "rms", where="*", exact=True, example_inputs=image().float())


# -- back, and on disk ----------------------------------------------------------------------------


def test_trained_on_it_comes_back_with_what_it_has_learned() -> None:
    model = converted(trained(Vision()), image())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(image()).square().sum().backward()
    optimizer.step()
    learned = copy.deepcopy(model.state_dict())
    normswap.revert(model)
    assert isinstance(model.norm, nn.LayerNorm)
    assert all(same_bits(value, learned[key]) for key, value in model.state_dict().items())


def test_a_part_that_others_rely_on_does_not_come_back_alone() -> None:
    model = converted(trained(Vision()), image())
    expected = model(image())
    with pytest.raises(CannotRevert, match="revert the whole model"):
        normswap.revert(model.blocks[0])
    assert same_bits(model(image()), expected)


def test_saved_it_loads_with_equal_outputs(tmp_path: Any) -> None:
    model = converted(trained(Vision()), image())
    normswap.save(model, tmp_path / "model.safetensors")
    fresh = normswap.load(trained(Vision()), tmp_path / "model.safetensors")
    assert same_bits(fresh(image()), model(image()))


def test_its_recipe_asks_for_example_inputs() -> None:
    model = trained(Vision())
    other = copy.deepcopy(model)
    expected, recipe = model(image()), normswap.recipe(converted(model, image()))
    with pytest.raises(NothingToConvert, match=r"become what was asked(?s:.*)give example_inputs"):
        normswap.apply_recipe(copy.deepcopy(other), recipe)
    again = normswap.apply_recipe(other, recipe, example_inputs=image())
    torch.testing.assert_close(again(image()), expected, rtol=TOLERANCE, atol=TOLERANCE)


# -- models that people use -----------------------------------------------------------------------


def small_timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32)
    return made


def small_cait() -> nn.Module:
    """It scales what it adds, and its class token has a stream of its own at the end."""
    timm = pytest.importorskip("timm")
    made: nn.Module = timm.create_model("cait_xxs24_224", depth=2, img_size=32)
    return made


def small_torchvision() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    made: nn.Module = models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=5)
    return made


def small_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 32}
    made: nn.Module = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    return made


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("make", [small_timm, small_cait, small_torchvision, small_gpt2])
def test_a_model_that_people_use_computes_the_same(make: Callable[[], nn.Module]) -> None:
    model = trained(make())
    x: Any = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    if make is small_gpt2:
        x = {"input_ids": torch.arange(6)[None]}

    def output() -> Tensor:
        y = model(**x)["last_hidden_state"] if isinstance(x, dict) else model(x)
        return y.detach()

    expected = output()
    converted(model, x)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    torch.testing.assert_close(output(), expected, rtol=1e-8, atol=1e-8)
