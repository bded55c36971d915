"""A converted model takes the extra inputs of its norms, wherever and however it is called."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import InputError, UnsupportedModel
from tests.reference.threads import in_another_thread
from tests.swap.helpers import CHANNELS, filled, numbers

DOMAINS = 3


class Net(nn.Module):
    """Two blocks with a norm each; the second may be checkpointed, in either of torch's ways."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.block1 = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS))
        self.block2 = nn.Sequential(
            nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.Tanh()
        )
        self.head = nn.Linear(CHANNELS, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.run(self.block1, x)
        return self.run(self.block2, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.reentrant)


def made(*, reentrant: bool | None = None, **options: Any) -> Any:
    """A net by domain, whose domains all differ."""
    net = filled(normswap.convert(filled(Net(reentrant)), to="dsbn", num_domains=DOMAINS))
    for name, parameter in net.named_parameters():
        if name.endswith("_delta"):
            parameter.data.copy_(numbers(*parameter.shape, seed=len(name)))
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(numbers(*buffer.shape, seed=len(name)))
    return net


def images(seed: int = 0, batch: int = 6) -> Tensor:
    return numbers(batch, 3, 8, 7, seed=seed)


IDS = torch.tensor([0, 1, 2, 0, 1, 2])


def alone(net: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """In eval mode, each sample by itself."""
    rows = [net(x[n : n + 1], domain=int(ids[n])) for n in range(len(x))]
    return torch.cat(rows)


def gradients(net: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    net.zero_grad()
    loss(net).backward()
    return [p.grad.clone() for p in net.parameters()]


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# -- what it says ---------------------------------------------------------------------------------


def test_a_model_says_what_it_takes() -> None:
    (domain,) = normswap.inputs(made()).values()
    assert (domain.name, domain.shape, domain.dtype) == ("domain", ("N",), torch.long)
    assert (domain.default, domain.required) == (0, False)
    assert "from 0 to 2" in str(domain)
    assert normswap.inputs(Net()) == {}


def test_its_signature_says_so_too() -> None:
    signature = str(inspect.signature(made().forward))
    assert "domain=None" in signature
    assert "domain" not in str(inspect.signature(Net.forward))


def test_the_default_is_taken_where_nothing_is_given() -> None:
    net = made().eval()
    assert torch.equal(net(images()), net(images(), domain=0))
    assert not torch.equal(net(images()), net(images(), domain=1))


def test_each_sample_is_of_its_own_domain() -> None:
    net = made().eval()
    torch.testing.assert_close(net(images(), domain=IDS), alone(net, images(), IDS))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "from 0 to 2.*got 3"),
        (-1, "from 0 to 2.*got -1"),
        (torch.tensor([0, 1, 2, 0, 1, 3]), "from 0 to 2.*got 0 to 3"),
        (torch.zeros(5, dtype=torch.long), r"N is 6 here, and got int64 of shape \(5,\)"),
        (torch.zeros(6), "integers.*float32"),
        ("photo", "integers.*'photo'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_layer_ran(value: Any, words: str) -> None:
    net, ran = made(), []
    for module in net.modules():
        if module is not net:
            module.register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(InputError, match=f"domain= should be .*{words}"):
        net(images(), domain=value)
    assert not ran
    net(images(), domain=IDS)
    assert ran


def test_what_is_no_extra_input_is_the_forwards_own_business() -> None:
    with pytest.raises(TypeError, match="domian"):
        made()(images(), domian=IDS)


def test_a_norm_used_alone_takes_it_itself() -> None:
    norm = normswap.build("dsbn", CHANNELS)
    x = numbers(4, CHANNELS, 3, 3)
    assert norm(x, domain=torch.tensor([0, 1, 1, 0])).shape == x.shape
    with pytest.raises(InputError, match="domain= should be"):
        norm(x, domain=2)
    with pytest.raises(TypeError, match="no label="):
        norm(x, label=2)


# -- whatever the model ---------------------------------------------------------------------------


class OwnDomain(nn.Module):
    """A forward that has a parameter of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen: Any = None

    def forward(self, x: Tensor, domain: Any = None) -> Tensor:
        self.seen = domain
        return self.norm(x)


def test_a_forward_that_has_such_a_parameter_gets_it_too() -> None:
    net: Any = normswap.convert(OwnDomain(), to="dsbn")
    ids = torch.tensor([0, 1, 1, 0, 1, 0])
    named = net(images(), domain=ids)
    assert net.seen is ids
    net2: Any = normswap.convert(OwnDomain(), to="dsbn")
    assert torch.equal(named, net2(images(), ids))
    with pytest.raises(InputError, match="domain"):
        net(images(), torch.full((6,), 2))


class Untraceable(nn.Module):
    """Takes a list and a mapping, and branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, parts: list[Tensor], /, *rest: Tensor, **named: Any) -> dict[str, Any]:
        x = torch.stack(parts)
        for other in rest:
            x = x + other if bool(other.sum() > 0) else x - other
        return {"out": [self.norm(x)], "named": sorted(named)}


def test_any_forward_will_do() -> None:
    net: Any = normswap.convert(Untraceable(), to="dsbn")
    x, ids = images(), torch.tensor([0, 1, 1, 0, 1, 0])
    made = net(list(x), x, domain=ids, extra=3)
    assert made["named"] == ["extra"]
    norm = net.norm
    torch.testing.assert_close(made["out"][0], norm(x + x if x.sum() > 0 else x - x, domain=ids))
    with pytest.raises(InputError, match="N is 3 or 6"):
        net(list(x), domain=ids[:4])


def test_a_model_that_is_a_norm_takes_it() -> None:
    net = normswap.convert(nn.BatchNorm2d(3), to="dsbn")
    assert net(images(), domain=1).shape == images().shape


def test_functional_norms_and_modules_take_it_alike() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return nn.functional.group_norm(x, 3, self.weight)

    net = Both()
    before = type(net)
    normswap.convert(net, to={"kind:group_norm": "dsbn", "norm": "dsbn"}, example_inputs=images())
    assert len([m for m in net.modules() if type(m).__name__ == "DomainSpecificBatchNorm"]) == 2
    ids = torch.tensor([0, 1, 1, 0, 1, 0])
    assert not torch.equal(net(images(), domain=ids), net(images()))
    for copied in (copy.deepcopy(net), net):
        assert isinstance(copied, before)
        normswap.revert(copied)
        assert type(copied) is before


def test_a_forward_replaced_on_the_instance_is_refused_and_nothing_is_done() -> None:
    net: Any = Net()
    net.forward = net.forward
    with pytest.raises(UnsupportedModel, match="replaced on the instance"):
        normswap.convert(net, to="dsbn")
    assert type(net.block1[1]) is nn.BatchNorm2d


# -- staying what it is ---------------------------------------------------------------------------


def test_revert_gives_the_class_back() -> None:
    net: Any = filled(Net())
    before = net.eval()(images())
    normswap.convert(net, to="dsbn")
    assert isinstance(net, Net)
    assert type(net) is not Net
    normswap.revert(net)
    assert type(net) is Net
    assert not [name for name in vars(net) if "normswap" in name]
    assert torch.equal(net(images()), before)
    with pytest.raises(TypeError):
        net(images(), domain=0)


def test_other_norms_take_its_place() -> None:
    net: Any = normswap.convert(filled(Net()), to="dsbn")
    normswap.convert(net, to="split_bn")
    assert set(normswap.inputs(net)) == {"labelled"}
    net(images(), labelled=IDS > 0)
    normswap.convert(net, to="bn")
    assert type(net) is Net


def test_two_norms_bring_two_inputs() -> None:
    net: Any = normswap.convert(filled(Net()), to={"block1.*": "dsbn", "block2.*": "split_bn"})
    assert set(normswap.inputs(net)) == {"domain", "labelled"}
    net(images(), domain=1, labelled=IDS > 0)


def test_a_scoped_conversion_gives_it_back() -> None:
    net: Any = filled(Net())
    with normswap.converted(net, to="dsbn"):
        net(images(), domain=1)
    assert type(net) is Net


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save"])
def test_copies_take_it(copied: str) -> None:
    net = made().eval()
    if copied == "deepcopy":
        other = copy.deepcopy(net)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(net)
    assert torch.equal(other(images(), domain=IDS), net(images(), domain=IDS))
    normswap.revert(other)
    assert type(other) is Net
    assert type(net) is not Net


def test_a_graph_module_takes_it_and_its_copies() -> None:
    net: Any = fx.symbolic_trace(filled(Net()))
    normswap.convert(net, to="dsbn")
    for other in (net, copy.deepcopy(net)):
        assert other(images(), domain=1).shape == (6, 4)


def test_the_recipe_makes_another_model_take_it() -> None:
    net = made()
    other: Any = normswap.apply_recipe(Net(), normswap.recipe(net))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(images(), domain=IDS), net.eval()(images(), domain=IDS))


def test_the_graph_is_still_seen() -> None:
    found = normswap.find(made())
    assert not found.blind
    assert found[1].producer == "block2.1"


# -- wherever it is called ------------------------------------------------------------------------


def test_other_forwards_take_it() -> None:
    net = made().eval()
    features = net.forward_features(images(), domain=IDS)
    assert torch.equal(net.head(features.mean((2, 3))), net(images(), domain=IDS))


def test_a_feature_extractor_is_given_it() -> None:
    net = made().eval()
    graph = fx.symbolic_trace(net)
    with normswap.given(net, domain=IDS):
        assert torch.equal(graph(images()), net(images(), domain=IDS))
        part = net.block1(images())
    assert not torch.equal(part, net.block1(images()))
    with pytest.raises(InputError, match="label= is no extra input"):
        normswap.given(net, label=3).__enter__()


def test_a_model_inside_a_model_sees_what_the_outer_one_was_given() -> None:
    inner = made().eval()
    outer: Any = normswap.convert(
        nn.Sequential(nn.BatchNorm2d(3), inner), to="dsbn", where="0", num_domains=DOMAINS
    ).eval()
    x = outer[0](images(), domain=IDS)
    assert torch.equal(outer(images(), domain=IDS), inner(x, domain=IDS))


def test_a_nested_call_has_its_own_and_gives_it_back() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x, domain=1))

    net: Any = normswap.convert(filled(Nested()), to="dsbn").eval()
    for name, buffer in net.named_buffers():
        if name.endswith("other_running_mean"):
            buffer.add_(1)
    inside = net.inner(images(), domain=1)
    assert torch.equal(net(images(), domain=0), net.norm(inside, domain=0))


def test_two_threads_do_not_see_each_others() -> None:
    net = made().eval()
    meet, seen = threading.Barrier(2), {}
    net.block1[0].register_forward_pre_hook(lambda *args: (meet.wait(timeout=30), None)[1])

    def run(domain: int) -> None:
        with torch.no_grad():
            seen[domain] = net(images(), domain=domain)

    threads = [threading.Thread(target=run, args=(domain,)) for domain in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    net.block1[0]._forward_pre_hooks.clear()
    for domain in (1, 2):
        assert torch.equal(seen[domain], net(images(), domain=domain))


def test_replicas_in_threads_take_their_share() -> None:
    net, shares = made().eval(), (slice(4), slice(4, 6))
    replicas = [net._replicate_for_data_parallel() for _ in shares]
    for replica in replicas:
        replica._modules.update(net._modules)
    outputs: dict[int, Tensor] = {}

    def run(index: int) -> None:
        share = shares[index]
        outputs[index] = replicas[index](images()[share], domain=IDS[share])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([outputs[0], outputs[1]]), net(images(), domain=IDS))


def test_an_error_inside_leaves_nothing_behind() -> None:
    net = made().eval()
    handle = net.block2.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(images(), domain=2)
    handle.remove()
    assert torch.equal(net.block1(images()), net.block1[1](net.block1[0](images()), domain=0))


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_to_one_graph(training: bool) -> None:
    net = made().train(training)
    expected = copy.deepcopy(net)(images(), domain=IDS)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images(), domain=IDS), expected)


def test_a_compiled_model_sees_what_each_call_is_given() -> None:
    net = made().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS.flip(0)):
        torch.testing.assert_close(compiled(images(), domain=ids), net(images(), domain=ids))


# -- what is computed once more in backward -------------------------------------------------------


def once(net: nn.Module) -> Tensor:
    return net(images(), domain=IDS).square().sum()


def twice(net: nn.Module) -> Tensor:
    other = net(images(3), domain=2).square().sum()
    return once(net) + 3 * other


def by_default(net: nn.Module) -> Tensor:
    return net(images()).square().sum()


def leaking(net: nn.Module) -> Tensor:
    loss = once(net)
    net(images(4), domain=1)  # nothing of the last call may stay for the backward
    return loss


@pytest.mark.parametrize("loss", [once, twice, by_default, leaking])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_equal_to_the_bit(
    loss: Callable[[nn.Module], Tensor], reentrant: bool
) -> None:
    plain, checkpointed = made(), made(reentrant=reentrant)
    x = images().requires_grad_()  # torch's reentrant way asks for one
    plain.register_forward_pre_hook(lambda net, args: (args[0] + x * 0,))
    checkpointed.register_forward_pre_hook(lambda net, args: (args[0] + x * 0,))
    assert all_equal(gradients(plain, loss), gradients(checkpointed, loss))


def test_a_checkpoint_in_a_checkpoint_sees_it() -> None:
    plain, nested = made(), made(reentrant=True)
    features = nested.forward_features
    vars(nested)["forward_features"] = lambda x: checkpoint(features, x, use_reentrant=True)
    x = images().requires_grad_()

    def loss(net: nn.Module) -> Tensor:
        return net(x, domain=IDS).square().sum()

    assert all_equal(gradients(plain, loss), gradients(nested, loss))


def test_backward_in_another_thread_sees_it() -> None:
    plain, checkpointed = made(), made(reentrant=False)
    expected = gradients(plain, once)
    in_another_thread(once(checkpointed).backward)
    assert all_equal(expected, [p.grad for p in checkpointed.parameters()])


def test_a_backward_around_the_models_output_is_refused() -> None:
    net, kept = made(reentrant=False), []
    net.block2.register_forward_hook(lambda module, args, output: kept.append(output) and None)
    net(images(), domain=IDS)
    with pytest.raises(InputError, match="run again in a backward"):
        kept[0].sum().backward()


def test_nothing_is_kept_of_a_backward_that_is_over() -> None:
    from normswap.norms.inputs import backward

    gradients(made(reentrant=False), twice)
    assert not backward._UNDER_WAY


def test_a_whole_model_may_be_checkpointed() -> None:
    plain, net = made(), made()

    def whole(net: nn.Module) -> Tensor:
        return checkpoint(net, images(), domain=IDS, use_reentrant=False).square().sum()

    assert all_equal(gradients(plain, once), gradients(net, whole))
