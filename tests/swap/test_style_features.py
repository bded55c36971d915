"""A style goes through the network once, and its statistics are taken wherever a norm takes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import InputError
from tests.reference.conditioned import by_style_features
from tests.reference.data import close, values

CHANNELS = 5


class Net(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.conv1, self.norm1 = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.norm2 = nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm1(self.conv1(x)).relu())

    def last(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(lambda x: self.norm2(self.conv2(x)), x, use_reentrant=False)
        return self.norm2(self.conv2(x))


def made(**settings: Any) -> Any:
    torch.default_generator.manual_seed(0)
    net: Any = Net(**settings).double()
    for norm in (net.norm1, net.norm2):
        norm.weight.data.copy_(values(CHANNELS, seed=1))
        norm.bias.data.copy_(values(CHANNELS, seed=2))
    return net


CONTENT, STYLE = values(2, 3, 9, 8), values(2, 3, 7, 11, seed=1)


@pytest.mark.parametrize("unbiased", [False, True])
def test_each_norm_takes_what_the_style_has_there(unbiased: bool) -> None:
    net = normswap.convert(made(), to="adain", unbiased=unbiased)
    features = normswap.style_features(net, STYLE)
    assert set(features) == {"norm1", "norm2"}
    style1 = net.conv1(STYLE)
    expected1 = by_style_features(net.conv1(CONTENT), style1, unbiased=unbiased)
    plain = normswap.build("in", CHANNELS).double()
    plain.load_state_dict({"weight": net.norm1.weight, "bias": net.norm1.bias})
    if unbiased:  # the style's own way is by unbiased variances as well
        var = style1.var((2, 3), keepdim=True, correction=1) + 1e-5
        z = (style1 - style1.mean((2, 3), keepdim=True)) / var**0.5
        inner = z * plain.weight.view(-1, 1, 1) + plain.bias.view(-1, 1, 1)
    else:
        inner = plain(style1)
    style2 = net.conv2(inner.relu())
    expected2 = by_style_features(net.conv2(expected1.relu()), style2, unbiased=unbiased)
    close(net(CONTENT, style=features), expected2)


def test_the_gradient_reaches_the_style() -> None:
    net = normswap.convert(made(), to="adain")
    style = STYLE.clone().requires_grad_()

    def run(style: Tensor) -> Tensor:
        return net(CONTENT, style=normswap.style_features(net, style))

    assert torch.autograd.gradcheck(run, style, fast_mode=True)


def test_without_a_style_it_is_instance_normalization() -> None:
    net, other = (normswap.convert(made(), to=to) for to in ("adain", "in"))
    close(net(CONTENT), other(CONTENT))


def test_one_style_serves_all_samples() -> None:
    net = normswap.convert(made(), to="adain")
    features = normswap.style_features(net, STYLE[:1])
    one = net(CONTENT, style=features)
    close(one, torch.cat([net(CONTENT[n : n + 1], style=features) for n in range(2)]))


def test_checkpointed_gradients_are_equal_to_the_bit() -> None:
    found = []
    for checkpointed in (False, True):
        net = normswap.convert(made(checkpointed=checkpointed), to="adain")
        with torch.no_grad():
            features = normswap.style_features(net, STYLE)
        net(CONTENT, style=features).square().sum().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))


def test_a_copy_takes_the_features_of_the_model() -> None:
    net = normswap.convert(made(), to="adain")
    features = normswap.style_features(net, STYLE)
    close(copy.deepcopy(net)(CONTENT, style=features), net(CONTENT, style=features))


def test_what_does_not_fit_is_refused() -> None:
    net = normswap.convert(made(), to="adain")
    features = normswap.style_features(net, STYLE)
    with pytest.raises(InputError, match="of 1 or 3 samples here, and got 2"):
        net(values(3, 3, 9, 8), style=features)
    with pytest.raises(InputError, match=r"normswap.style_features.*got a Tensor"):
        net(CONTENT, style=STYLE)
    with pytest.raises(InputError, match="no features for norm2"):
        net(CONTENT, style={"norm1": features["norm1"]})
    with pytest.raises(InputError, match="no norm of the model takes features"):
        normswap.style_features(made(), STYLE)
    with pytest.raises(InputError, match="no norm of the model takes features"):
        normswap.style_features(normswap.convert(made(), to="adain", style_dim=3), STYLE)


def test_a_norm_that_is_called_twice_is_refused() -> None:
    net = normswap.convert(made(), to="adain")
    net.norm2 = net.norm1
    with pytest.raises(InputError, match="norm1 is called several times"):
        normswap.style_features(net, STYLE)
