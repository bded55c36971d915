"""A norm of your own becomes a target and a source, in a dozen lines.

Mean-only BatchNorm (Salimans and Kingma 2016, arXiv 1602.07868, section 4) subtracts the batch's
mean and divides by nothing: y = weight · (x - mean) + bias. normswap does not have it. Here it is
read (`read`) and started (`start`), and then `convert`, `revert`, `plan` and the rest know it.

Run it with ``python examples/your_own_norm.py``: a small net with BatchNorm learns scikit-learn's
digits, becomes a net with mean-only BatchNorm that evaluates the same, and goes back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import normswap
from normswap import Fidelity, NormState, Rule, Start
from normswap.norms.pool import BATCH, RUNNING


class MeanOnlyBatchNorm(normswap.Norm):
    """y = weight · (x - mean) + bias, with the batch's mean in training, a running one in eval."""

    def __init__(self, num_features: int, momentum: float | None) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum or 0.1

    def normalize(self, x: Tensor) -> Tensor:
        mean = self.running_mean
        if self.training:
            mean = x.mean([0, *range(2, x.ndim)])
            self.running_mean.lerp_(mean.detach(), self.momentum)
        shape = [1, -1] + [1] * (x.ndim - 2)
        return (x - mean.view(shape)) * self.weight.view(shape) + self.bias.view(shape)


def read(module: nn.Module) -> NormState:
    """As a BatchNorm it has unit variance, so that its gain is the slope."""
    mean = module.running_mean
    return NormState(
        norm="mean_only_bn",
        kind="mean_only_bn",
        num_features=module.num_features,
        rule=Rule(BATCH, RUNNING),
        eps=0.0,
        momentum=module.momentum,
        weight=module.weight,
        bias=module.bias,
        running_mean=mean,
        running_var=torch.ones_like(mean),
        channel_dim=module.channel_dim,
        tail=module.tail,
    )


@normswap.register("mean_only_bn", reads={MeanOnlyBatchNorm: read}, paper="arXiv 1602.07868")
def start(state: NormState, *, carry: str = "auto", momentum: float | None = None) -> Start:
    """Exact in eval: the gain becomes the slope that BatchNorm has there."""
    exact = carry == "auto" and state.tracks

    def slope() -> dict[str, Tensor]:
        if not exact:
            return {}
        gain = torch.ones_like(state.running_var) if state.weight is None else state.weight
        return {"weight": (gain * (state.running_var + state.eps).rsqrt()).detach()}

    def shell() -> nn.Module:
        return MeanOnlyBatchNorm(state.num_features, momentum or state.momentum)

    return Start(
        fidelity=Fidelity.EVAL if exact else Fidelity.AFFINE,
        shell=shell,
        affine=("weight", "bias"),
        running=("running_mean",),
        values=slope,
    )


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def trained_net(x: Tensor, y: Tensor, *, steps: int = 150) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    return net.eval()


def main() -> None:
    x, y = digits()
    net = trained_net(x, y)

    def accuracy() -> float:
        with torch.no_grad():
            return float((net(x).argmax(1) == y).float().mean())

    print(f"BatchNorm:           {accuracy():.1%}")
    print(normswap.plan(net, to="mean_only_bn"))
    normswap.convert(net, to="mean_only_bn")
    print(f"mean-only BatchNorm: {accuracy():.1%}")
    normswap.convert(net, to="frozen_bn", where="kind:mean_only_bn")
    print(f"frozen BatchNorm:    {accuracy():.1%}")
    normswap.revert(net)
    print(f"reverted:            {accuracy():.1%}")


if __name__ == "__main__":
    main()
