"""Inputs of positions, in a whole model: resized once a size, and seen by every norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import InputError
from tests.swap.helpers import filled, numbers

LABELS = 3


class Net(nn.Module):
    """Maps of two sizes, with two norms on each."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for at, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.max_pool2d(x, 2) if at == 2 else x

            def block(x: Tensor, conv: Any = conv, norm: Any = norm) -> Tensor:
                return norm(conv(x)).tanh()

            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def made(to: str = "spade", *, checkpointed: bool = False, **options: Any) -> Any:
    options = {"num_labels": LABELS, "hidden_dim": 4} if to == "spade" else options
    torch.default_generator.manual_seed(0)
    return filled(normswap.convert(Net(checkpointed=checkpointed), to=to, **options))


IMAGES = numbers(2, 3, 8, 8)
SEGMAP = torch.randint(LABELS, (2, 16, 16), generator=torch.Generator().manual_seed(0))
SOFT = F.one_hot(SEGMAP, LABELS).movedim(-1, 1).float()


def test_a_map_is_resized_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, resize = [], F.interpolate

    def counted(value: Tensor, size: Any, **settings: Any) -> Tensor:
        sizes.append(tuple(size))
        return resize(value, size, **settings)

    monkeypatch.setattr("normswap.norms.inputs.maps.F.interpolate", counted)
    net = made()
    for _ in range(2):
        net(IMAGES, segmap=SEGMAP)
    assert sizes == [(8, 8), (4, 4)] * 2


def test_labels_and_their_maps_are_the_same() -> None:
    net = made().eval()
    assert torch.equal(net(IMAGES, segmap=SEGMAP), net(IMAGES, segmap=SOFT))


def test_a_map_that_takes_gradients_gets_them_through_checkpoints() -> None:
    found = []
    for checkpointed in (False, True):
        soft = SOFT.clone().requires_grad_()
        net = made(checkpointed=checkpointed)
        net(IMAGES, segmap=soft).square().sum().backward()
        found.append([soft.grad, *(p.grad for p in net.parameters())])
    assert found[0][0].any()
    assert all(map(torch.equal, *found))


def test_it_compiles_to_one_graph() -> None:
    net = made().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES, segmap=SEGMAP), net(IMAGES, segmap=SEGMAP))


@pytest.mark.parametrize(
    ("segmap", "words"),
    [
        (SEGMAP + 1, "got 1 to 3"),
        (SEGMAP[:1], r"N is 2 here.*\(1, 16, 16\)"),
        (SOFT[:, :2], r"numbers of shape \(N, 3, ...\).*\(2, 2, 16, 16\)"),
        (SEGMAP.float(), r"float32 of shape \(2, 16, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(segmap: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=f"segmap= should be .*{words}"):
        made()(IMAGES, segmap=segmap)


def test_a_missing_map_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"segmap= should be .* was not given"):
        made()(IMAGES)
    with pytest.raises(InputError, match=r"norms.0 is reached without segmap="):
        made().norms[0](IMAGES)


def test_a_mask_is_of_zeros_and_ones() -> None:
    net = made("rn_b")
    inside = (SEGMAP > 0)[:, None]
    assert torch.equal(net(IMAGES, mask=inside), net(IMAGES, mask=inside.float()))
    with pytest.raises(InputError, match=r"zeros and ones of shape \(N, 1, ...\)"):
        net(IMAGES, mask=inside * 0.5)


def test_samples_that_the_model_cuts_up_are_refused() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat(x.chunk(2, 2)))

    net = normswap.convert(Windows(), to="dsbn")
    with pytest.raises(InputError, match="norm is given 4 samples, and domain= is of 2"):
        net(IMAGES, domain=torch.tensor([0, 1]))
    assert net(IMAGES, domain=1).shape == (4, 3, 4, 8)


@pytest.mark.parametrize("method", ["pooled", "population", "average", "ema"])
def test_a_warmup_gives_each_batch_its_own(method: str) -> None:
    net = made()
    loader = [{"x": numbers(2, 3, 8, 8, seed=n), "segmap": SEGMAP.roll(n, 1)} for n in range(3)]
    report = normswap.warmup(net, loader, method=method, progress=False)
    assert report.passes == 1  # forwards that stop amid the call of another keep their own
    assert all(norm.num_batches_tracked > 0 for norm in net.norms)
    if method == "population":
        whole = {"x": torch.cat([b["x"] for b in loader])}
        whole["segmap"] = torch.cat([b["segmap"] for b in loader])
        other = made()
        for norm in other.norms:
            norm.momentum = 1.0
        other.train()(**whole)
        for one, two in zip(net.norms, other.norms, strict=True):
            torch.testing.assert_close(one.running_mean, two.running_mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.running_var, two.running_var, rtol=1e-4, atol=1e-5)
