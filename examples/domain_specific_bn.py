"""One network for two domains: statistics of each, where BatchNorm would mix them.

The digits, and the same digits inverted and noisy, in mixed batches. `normswap.convert` to
``"dsbn"`` (Chang et al. 2019, arXiv 1906.03950) gives every norm statistics and an affine for each
domain, and the model's call the keyword ``domain=``. Everything else of the network is shared.

Who says what a domain is? Anything may: here it is also the cluster of an image's features, its
mean and its deviation, found without looking at domains or labels.

Run it with ``python examples/domain_specific_bn.py``; ``--quick`` takes one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from digits_net import begin, small_net, spread
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import normswap
from normswap.demo.digits import Digits, load_digits
from normswap.table import render

NOISE = 0.6
EPOCHS = 2
BATCH = 64
DOMAINS = ("digits", "inverted and noisy")

#: Which domain each image is of, given the images and where they are from.
Grouping = Callable[[Tensor, Tensor], Tensor]


def both(data: TensorDataset, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of both domains, their labels, and which domain each is of."""
    images, labels = data.tensors
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    inverted = 1 - images + NOISE * noise
    domains = torch.arange(2).repeat_interleave(len(images))
    return torch.cat([images, inverted]), labels.repeat(2), domains


def features(images: Tensor) -> Tensor:
    """Mean and deviation of each image."""
    flat = images.flatten(1)
    return torch.stack([flat.mean(1), flat.std(1)], 1)


def clusters(images: Tensor, *, seed: int, steps: int = 10) -> Grouping:
    """Two clusters of features, by k-means, as a grouping of any images."""
    found = features(images)
    centre, scale = found.mean(0), found.std(0)
    found = (found - centre) / scale
    order = torch.Generator().manual_seed(seed)
    centres = found[torch.randperm(len(found), generator=order)[:2]]
    for _ in range(steps):
        nearest = torch.cdist(found, centres).argmin(1)
        centres = torch.stack([found[nearest == k].mean(0) for k in range(2)])
    return lambda images, _: torch.cdist((features(images) - centre) / scale, centres).argmin(1)


def inputs(grouping: Grouping | None, images: Tensor, domains: Tensor) -> dict[str, Any]:
    """The keywords that a model is called with."""
    return {} if grouping is None else {"domain": grouping(images, domains)}


def trained(data: tuple[Tensor, Tensor, Tensor], grouping: Grouping | None, *, seed: int) -> Any:
    """A net that was trained on batches that mix what is in the data."""
    torch.manual_seed(seed)
    model: nn.Module = small_net(10)
    if grouping is not None:
        model = normswap.convert(model, to="dsbn", num_domains=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    images, labels, domains = data
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            given = inputs(grouping, images[chosen], domains[chosen])
            cross_entropy(model(images[chosen], **given), labels[chosen]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracies(
    model: nn.Module, data: tuple[Tensor, Tensor, Tensor], grouping: Grouping | None
) -> list[float]:
    """The share of right answers in each domain."""
    images, labels, domains = data
    right = model.eval()(images, **inputs(grouping, images, domains)).argmax(1) == labels
    return [float(right[domains == domain].double().mean()) for domain in range(2)]


def compared(digits: Digits, *, seed: int) -> dict[str, list[float]]:
    """Accuracies in both domains, by what was done."""
    train, test = both(digits.train, seed=seed), both(digits.test, seed=seed + 1000)
    told: Grouping = lambda images, domains: domains  # noqa: E731
    found = clusters(train[0], seed=seed)
    nets = {"BatchNorm": None, "dsbn, by domain": told, "dsbn, by cluster": found}
    return {
        what: accuracies(trained(train, grouping, seed=seed), test, grouping)
        for what, grouping in nets.items()
    }


def main() -> None:
    seeds = range(1 if begin(__doc__) else 5)
    digits = load_digits()
    results = [compared(digits, seed=seed) for seed in seeds]
    rows = [
        (what, *(spread([result[what][domain] for result in results]) for domain in range(2)))
        for what in results[0]
    ]
    print(render(f"Accuracy, {len(results)} seeds", ("net", *DOMAINS), rows))


if __name__ == "__main__":
    main()
