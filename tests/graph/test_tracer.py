"""Adaptive tracing: what cannot be traced costs only itself."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.graph import tracer
from tests.graph.models import CHANNELS, Branching, Masked, block


class AsksForNumbers(nn.Module):
    """Turns its data into a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) * float(x.mean())


class Raising(nn.Module):
    """Raises an error of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = block()

    def forward(self, x: Tensor) -> Tensor:
        raise LookupError("not today")


UNTRACEABLE = [Branching, AsksForNumbers, Raising]


def facts(model: nn.Module) -> dict[str, tuple[str | None, str | None]]:
    return {site.path: (site.producer, site.activation) for site in normswap.find(model)}


@pytest.mark.parametrize("part", UNTRACEABLE)
def test_the_rest_is_still_seen(part: type[nn.Module]) -> None:
    found = facts(nn.Sequential(block(), part(), block()))
    assert found["0.1"] == ("0.0", "0.2")
    assert found["2.1"] == ("2.0", "2.2")


@pytest.mark.parametrize("part", UNTRACEABLE)
def test_its_inside_is_seen_on_its_own(part: type[nn.Module]) -> None:
    found = facts(nn.Sequential(block(), part()))
    assert found["1.inside.1"] == ("1.inside.0", "1.inside.2")


@pytest.mark.parametrize("part", UNTRACEABLE)
def test_only_it_is_blind(part: type[nn.Module]) -> None:
    assert list(normswap.find(nn.Sequential(block(), part(), block())).blind) == ["1"]


def test_blindness_comes_with_its_reason() -> None:
    blind = normswap.find(nn.Sequential(Branching(), Raising())).blind
    assert "control flow" in blind["0"]
    assert blind["1"] == "LookupError: not today"


def test_a_model_that_traces_is_nowhere_blind() -> None:
    assert normswap.find(nn.Sequential(block(), block())).blind == {}


def test_what_runs_before_the_failure_in_a_part_is_not_seen_twice() -> None:
    (site,) = normswap.find(nn.Sequential(Branching()))
    assert site.calls == 1


def test_a_model_that_does_not_trace_is_seen_by_its_parts() -> None:
    sites = normswap.find(Branching(nn.Sequential(block(), block())))
    assert list(sites.blind) == [""]
    assert [(site.producer, site.activation) for site in sites] == [
        ("inside.0.0", "inside.0.2"),
        ("inside.1.0", "inside.1.2"),
    ]


def test_a_norm_that_only_an_untraceable_forward_calls_has_no_facts() -> None:
    (site,) = normswap.find(Branching(nn.BatchNorm2d(CHANNELS)))
    assert (site.producer, site.activation, site.calls, site.order) == (None, None, None, None)


def test_parts_in_a_list_are_seen() -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([block(), block()])

        def forward(self, x: Tensor) -> Tensor:
            while x.sum() > 0:
                for part in self.parts:
                    x = part(x)
            return x

    assert facts(Looping()) == {
        "parts.0.1": ("parts.0.0", "parts.0.2"),
        "parts.1.1": ("parts.1.0", "parts.1.2"),
    }


def test_an_argument_left_at_its_default_takes_the_default_branch() -> None:
    plain, masked = normswap.find(Masked())
    assert plain.order == 0
    assert masked.order is None


def test_an_argument_left_at_its_default_does_so_in_a_part_too() -> None:
    sites = normswap.find(nn.Sequential(Masked()))
    assert sites.blind == {}
    assert sites[0].activation == "0.plain.2"


def test_a_flag_left_at_its_default_is_no_obstacle() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = block()

        def forward(self, x: Tensor, *, double: bool = False, scale: float = 1.0) -> Tensor:
            y = self.inside(x)
            return y * 2 if double else y * scale

    sites = normswap.find(Flagged())
    assert sites.blind == {}
    assert sites[0].producer == "inside.0"


def test_a_model_that_cannot_be_copied_still_has_its_sites() -> None:
    model = block()
    model.lock = threading.Lock()  # type: ignore[assignment]
    sites = normswap.find(model)
    assert [site.path for site in sites] == ["1"]
    assert "cannot be copied" in sites.blind[""]


def test_activations_kept_from_an_earlier_forward_are_no_obstacle() -> None:
    model = block()
    model.kept = [model[0](torch.ones(1, CHANNELS, 2, 2))]  # type: ignore[assignment]
    sites = normswap.find(model)
    assert sites.blind == {}
    assert sites[0].producer == "0"


def test_modules_that_a_library_wants_whole_are_not_entered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracer, "_WHOLE_MODULES", set())
    tracer.leave_whole(modules=[Raising])
    assert normswap.find(nn.Sequential(Raising())).blind == {}


def test_of_norms_inside_such_modules_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer, "_WHOLE_MODULES", set())
    tracer.leave_whole(modules=[Raising])
    (site,) = normswap.find(nn.Sequential(Raising()))
    assert (site.calls, site.order) == (None, None)


def doubled_if_positive(x: Tensor) -> Tensor:
    return 2 * x if x.sum() > 0 else x


class CallsAFunction(nn.Module):
    """Leaves its decision to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = block()

    def forward(self, x: Tensor) -> Tensor:
        return doubled_if_positive(self.inside(x))


def test_functions_that_a_library_wants_whole_are_not_entered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracer, "_WHOLE_FUNCTIONS", set())
    assert "" in normswap.find(CallsAFunction()).blind
    tracer.leave_whole(functions=[doubled_if_positive])
    assert normswap.find(CallsAFunction()).blind == {}


def test_an_interrupt_is_not_taken_for_a_failure() -> None:
    class Interrupting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = block()

        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _ = normswap.find(nn.Sequential(Interrupting())).blind
