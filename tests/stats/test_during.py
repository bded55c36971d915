"""What the model does while it is warmed up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.stats.models import assert_keeps_all_of, cut, images, net, one_norm


class Recorder(nn.Module):
    """Notes its mode, and whether gradients are recorded, and passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.gradients: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        self.gradients.append(torch.is_grad_enabled())
        return x


def recorded(model: nn.Sequential) -> tuple[Recorder, Recorder]:
    """The model with a recorder before it, and one fused into its first norm."""
    model.insert(0, Recorder())
    converted = normswap.convert(model, "bn", where="2", sync=True)
    converted[2].act = Recorder()
    converted[2].tail = ("act",)
    return model[0], converted[2].act


@pytest.mark.parametrize("training", [True, False])
def test_only_norms_are_in_train_mode(training: bool) -> None:
    model = net()
    before, fused = recorded(model)
    normswap.warmup(model.train(training), cut(images(6), [4, 2]))
    assert before.modes == fused.modes == [False, False]


def test_no_gradients_are_recorded() -> None:
    model = net()
    before, fused = recorded(model)
    normswap.warmup(model, [images(6)])
    assert before.gradients == fused.gradients == [False]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(2)).double().train(training)
    normswap.warmup(model, [images(6)])
    assert_keeps_all_of(model[1], images(6))


def test_an_activation_in_place_does_not_disturb_what_the_norm_saw() -> None:
    model = one_norm().append(nn.ReLU(inplace=True))
    normswap.warmup(model, cut(images(7), [3, 4]))
    assert_keeps_all_of(model[1], model[0](images(7)))


def test_the_users_hooks_run() -> None:
    model, seen = net(), list[tuple[int, ...]]()
    model[1].register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    normswap.warmup(model, cut(images(6), [4, 2]))
    assert seen == [(4, 3, 3, 2), (2, 3, 3, 2)]


def test_a_hook_that_changes_the_norms_input_is_heeded() -> None:
    norm = nn.BatchNorm1d(2).double()
    norm.register_forward_pre_hook(lambda module, args: (args[0] * 10,))
    data = images(3)[:, :, 0, 0]
    normswap.warmup(norm, cut(data, [1, 2]))
    assert_keeps_all_of(norm, data * 10)


def test_a_norm_may_be_called_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x)

    model = ByKeyword()
    normswap.warmup(model, cut(images(6), [4, 2]))
    assert_keeps_all_of(model.norm, images(6))


def test_a_compiled_model_is_warmed_up_without_compiling() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    model = one_norm()
    normswap.warmup(torch.compile(model, backend=backend), [images(6)])
    assert_keeps_all_of(model[1], model[0](images(6)))
    assert not compiled
