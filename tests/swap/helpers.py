"""Small models with every kind of norm, and exact comparison of a model with what it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import normswap
from tests.extra import REQUIRING

CHANNELS = 8

#: Every norm of the registry that takes BatchNorms by default, whatever stands around them.
TARGETS = [
    entry.name
    for entry in normswap.list_norms()
    if "batch_norm" in entry.sources and entry.needs <= {"dim"} and entry.name not in REQUIRING
]


# -- models -----------------------------------------------------------------------------------


class MapNet(nn.Module):
    """Two convolutions, each with a norm on its channels-first map."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm1 = make()
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm2 = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))

    @staticmethod
    def example(seed: int = 0) -> Tensor:
        return numbers(4, 3, 6, 5, seed=seed)


class TokenNet(nn.Module):
    """Two linears, each with a norm on tokens whose channels come last."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, CHANNELS)
        self.norm1 = make()
        self.act = nn.GELU()
        self.linear2 = nn.Linear(CHANNELS, CHANNELS)
        self.norm2 = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.linear2(self.act(self.norm1(self.linear1(x)))))

    @staticmethod
    def example(seed: int = 0) -> Tensor:
        return numbers(4, 7, 3, seed=seed)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class NormReLU(nn.BatchNorm2d):
    """A subclass whose forward does more than its base's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@dataclass(frozen=True)
class Source:
    """A kind of norm that a model may have.

    ``norm`` is its registry name, ``tensors`` are the names of what it keeps.
    """

    norm: str
    make: Callable[[], nn.Module]
    net: type[MapNet] | type[TokenNet] = MapNet
    tensors: tuple[str, ...] = ()

    @property
    def tracks(self) -> bool:
        """Whether it keeps running statistics."""
        return any(name.startswith(("running_mean", "running_square")) for name in self.tensors)

    def model(self, seed: int = 0) -> Any:
        """A net with this norm, in training mode, with parameters and statistics all different."""
        return filled(self.net(self.make), seed)


#: Norms that keep running statistics, and evaluate with them.
TRACKING = (
    *("bn", "sync_bn", "frozen_bn", "ghost_bn", "ebn", "bin", "adaptive_bn", "iebn", "an"),
    *("dsbn", "split_bn"),
)

#: Norms that keep running statistics, and evaluate with these and with those of the sample.
MIXTURES = ("sn", "ssn")

#: Norms that evaluate some channels with running statistics, and the others with the sample's.
HALVES = ("ibn",)

#: Norms that evaluate with running statistics, and then with the sample's; as sources they are
#: rewritten to what they are expected to make of the first.
TWICE = ("bcn",)

#: All that keep running statistics by themselves.
KEEPING = (*TRACKING, *MIXTURES, *HALVES, *TWICE)

#: Norms that measure channels alone, if at all, so that a match changes nothing.
SINGLE = ("in", "cn", "rn_l", "adain", *HALVES)

#: Norms that evaluate as running statistics did, and keep none.
FORGETTING = ("an_wang",)

#: Norms that evaluate as running statistics did only with another weight and bias, as they remove
#: no mean.
UNCENTRED = ("mabn",)

#: Norms that start or end as another only with another weight.
RESCALED = ("ebn", "iebn", "an_wang", "transnorm")

#: Norms that evaluate with running statistics and keep them in terms of their own: what they keep.
RETOLD = {
    "mabn": (
        *("num_batches_tracked", "running_square"),
        *("recent_squares", "recent_products", "steps"),
    ),
    "l1_bn": ("num_batches_tracked", "running_mean", "running_scale"),
    "iter_norm": ("num_batches_tracked", "running_mean", "running_wm"),
    "batch_renorm": ("running_mean", "num_batches_tracked", "running_std"),
    "transnorm": (
        "num_batches_tracked",
        *("running_mean_source", "running_var_source"),
        *("running_mean_target", "running_var_target"),
    ),
}

#: Norms that count their steps from zero, whatever the source has seen.
STARTING_OVER = ("batch_renorm",)

#: Parameters that a norm has beside weight and bias, and that no other norm takes over.
OWN = {
    "sn": ("mean_weight", "var_weight"),
    "ssn": ("mean_weight", "var_weight"),
    "an": ("weight_delta", "bias_delta", "attention_weight", "attention_bias", "attention_gain"),
    "bin": ("gate",),
    "bcn": ("group_weight", "group_bias"),
    "adaptive_bn": ("input_weight", "norm_weight"),
    "iebn": ("gate_weight", "gate_bias"),
    "dsbn": ("domain_weight_delta", "domain_bias_delta"),
    "an_wang": (
        *("key_weight", "key_bias", "query_weight", "query_bias", "value_weight", "value_bias"),
        *("share_weight", "share_scale", "residual"),
    ),
    "rn_l": ("region_weight", "gain_weight", "gain_bias", "offset_weight", "offset_bias"),
}

#: What norms of several domains keep of all but the first.
_OTHERS = ("other_running_mean", "other_running_var", "other_num_batches_tracked")

#: What a norm keeps beside running statistics, and that no other norm takes over.
OWN_BUFFERS = {
    "ssn": ("radius", "mean_fixed", "var_fixed"),
    "an": ("attention_mean", "attention_var"),
    "dsbn": _OTHERS,
    "split_bn": _OTHERS,
}

#: Norms that, once trained, are like no other norm.
UNIQUE = ("adaptive_bn", "iebn", "an", "dsbn")

#: Of these, those that are batch normalization as long as nothing is learned.
NEUTRAL = {name for norm in ("bin", "adaptive_bn", "iebn", "an", "dsbn") for name in OWN[norm]}

_TORCH = {
    "BatchNorm2d": Source("bn", lambda: nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.2)),
    "BatchNorm2d-plain": Source("bn", lambda: nn.BatchNorm2d(CHANNELS, affine=False)),
    "SyncBatchNorm": Source("sync_bn", lambda: nn.SyncBatchNorm(CHANNELS, eps=1e-3, momentum=0.2)),
    "GroupNorm": Source("gn", lambda: nn.GroupNorm(2, CHANNELS, eps=1e-3)),
    "InstanceNorm2d": Source(
        "in", lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True)
    ),
    "LayerNorm": Source("ln", lambda: nn.LayerNorm(CHANNELS, eps=1e-3), TokenNet),
    "LayerNorm-plain": Source(
        "ln", lambda: nn.LayerNorm(CHANNELS, elementwise_affine=False), TokenNet
    ),
    "RMSNorm": Source("rms", lambda: nn.RMSNorm(CHANNELS, eps=1e-3), TokenNet),
}


def _built(name: str) -> Source:
    return Source(name, lambda: normswap.build(name, CHANNELS))


def _complete(source: Source) -> Source:
    """Fill in what tensors the norm has."""
    return replace(source, tensors=tuple(source.make().state_dict()))


#: torch's norms, and every norm of the registry as `normswap.build` makes it; a built BatchNorm
#: is torch's.
SOURCES = {
    name: _complete(source)
    for name, source in (_TORCH | {name: _built(name) for name in TARGETS if name != "bn"}).items()
}


def convertible(source: Source, target: str) -> bool:
    """Whether the swap can be made: only what has no statistics cannot be frozen at them."""
    return target != "frozen_bn" or source.tracks


#: Of each kind of norm one. There are no pairs in the code but a reader and a starter for each
#: norm: so every norm meets these, as a source and as a target, and only `test_fidelity` asks of
#: every pair what it promises.
KINDS = ("bn", "frozen_bn", "gn", "ln", "rms", "sn", "l1_bn", "dsbn")


def meeting(source: str, target: str) -> bool:
    """Whether a norm meets one of each kind, or itself."""
    return source in KINDS or target in KINDS or source == target


def pairs(
    keep: Callable[[Source, str], bool] = convertible,
    sources: Iterable[str] = SOURCES,
    *,
    every: bool = False,
) -> list[Any]:
    """The pairs (source, target) that ``keep`` accepts, for ``pytest.mark.parametrize``.

    With ``every`` all pairs there are, else those of one of `KINDS`.
    """
    return [
        pytest.param(SOURCES[name], target, id=f"{name}-to-{target}")
        for name in sources
        for target in TARGETS
        if convertible(SOURCES[name], target) and keep(SOURCES[name], target)
        if every or meeting(SOURCES[name].norm, target)
    ]


#: Sources that differ most: for what depends on the source but little, or takes long.
FEW = ("BatchNorm2d", "frozen_bn", "LayerNorm")


def matched(source: Source, target: str) -> bool:
    """Whether a match rewrites weight and bias: statistics pooled otherwise than by channel.

    A mixture starts nearly as a norm that evaluates with running statistics, and a trained one is
    like no other norm.
    """
    if target == "identity" or not source.tracks:
        return False
    if source.norm != target and {source.norm, target} & {*RESCALED}:
        return True
    if source.norm in TWICE and source.norm != target:
        return True
    if source.norm in HALVES and target in MIXTURES:
        return True
    if target in UNCENTRED:
        return source.norm != target
    return source.norm in MIXTURES or target not in (*KEEPING, *RETOLD, *SINGLE)


def changing(source: Source, target: str) -> bool:
    """Whether the swap does anything: a norm is not swapped for itself."""
    return source.norm != target


def batch_net(*tail: nn.Module, dim: int = 2, **settings: Any) -> nn.Sequential:
    """A convolution and its BatchNorm, filled, and whatever is to follow."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1]
    return filled(nn.Sequential(conv(3, CHANNELS, 1), norm(CHANNELS, **settings), *tail))


def image(*, batch: int = 4, size: int = 6, seed: int = 0) -> Tensor:
    """An input for `batch_net`."""
    return numbers(batch, 3, size, size, seed=seed)


# -- numbers ----------------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same at every run, whatever the global generator has done."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def filled(model: nn.Module, seed: int = 0) -> Any:
    """Make all parameters and statistics different from each other and from their defaults.

    But for what makes a norm another function than any that it can be converted to.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in NEUTRAL:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 3 + 0.4)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    return model


def outputs(model: nn.Module, *inputs: Tensor, train: bool = False) -> Tensor:
    """What a copy of the model answers in a mode; the model stays as it is."""
    with torch.no_grad():
        return copy.deepcopy(model).train(train)(*inputs)


def train_step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of training, with a loss that pushes every parameter."""
    optimizer.zero_grad()
    y = model(x)
    (y * numbers(*y.shape, seed=99).to(y.dtype)).sum().backward()
    optimizer.step()


# -- copies -----------------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


#: Every way in which a whole model is copied.
COPIES = {"deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved}


# -- hooks ------------------------------------------------------------------------------------


def on_load(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Call a hook before a state dict is loaded; public in torch since 2.5."""
    if hasattr(module, "register_load_state_dict_pre_hook"):
        return module.register_load_state_dict_pre_hook(hook)
    return module._register_load_state_dict_pre_hook(hook, with_module=True)


def on_save(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Call a hook after a state dict is made; public in torch since 2.5."""
    if hasattr(module, "register_state_dict_post_hook"):
        return module.register_state_dict_post_hook(hook)
    return module._register_state_dict_hook(hook)


#: How a hook of each kind is registered with a module; the module is the hook's first argument.
HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward with keywords": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "forward always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "backward pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
    "backward": lambda m, hook: m.register_full_backward_hook(hook),
    "save pre": lambda m, hook: m.register_state_dict_pre_hook(hook),
    "save": on_save,
    "load pre": on_load,
    "load": lambda m, hook: m.register_load_state_dict_post_hook(hook),
}


# -- a model as it was ------------------------------------------------------------------------


class Snapshot:
    """A model at one moment: its modules, all that they hold, and all values, bit for bit."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = _paths(model)
        self.held = {path: _held(module) for path, module in self.modules.items()}
        self.values = {path: _values(module) for path, module in self.modules.items()}

    def assert_kept(self, model: nn.Module, *, untouched: bool = False) -> None:
        """Assert that the model is what it was: the same objects with the same values.

        With ``untouched``, that no tensor was so much as written to.
        """
        now = _paths(model)
        assert list(now) == list(self.modules)
        for path, module in now.items():
            assert module is self.modules[path], f"{path}: another module"
            held = _held(module)
            assert held.keys() == self.held[path].keys(), path
            for name, value in held.items():
                assert value == self.held[path][name], f"{path}: {name}"
            values = _values(module)
            assert values.keys() == self.values[path].keys(), path
            for name, (tensor, version) in values.items():
                before, version_before = self.values[path][name]
                assert same_bits(tensor, before), f"{path}.{name}: {tensor} was {before}"
                assert not untouched or version == version_before, f"{path}.{name} was written to"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and (a.is_meta or torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()))
    )


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state dict: keys in order, bit for bit."""
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(same_bits(one[key], other[key]) for key in one)


def _paths(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _held(module: nn.Module) -> dict[str, Any]:
    """All that lies on a module, by attribute, in a form that tells one object from another."""
    return {
        "class": type(module),
        **{
            name: list(map(_entry, value.items())) if isinstance(value, dict) else _token(value)
            for name, value in vars(module).items()
        },
    }


def _entry(item: tuple[Any, Any]) -> tuple[Any, Any]:
    key, value = item
    return key, _token(value)


class _Same:
    """Equal to the same object only; it keeps the object alive, so that no other takes its id."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.what is other.what

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self.what).__name__} at {id(self.what):#x}"


def _token(value: Any) -> Any:
    """What has to be the same object, or for plain values equal."""
    if isinstance(value, nn.Parameter):
        return _Same(value), value.requires_grad
    if is_lazy(value):
        return _Same(value)
    if isinstance(value, Tensor):  # a buffer may be another view of the same memory
        return value.data_ptr()
    if hasattr(value, "hook") and hasattr(value, "with_module"):  # torch's wrapped load hooks
        return _Same(value.hook), _Same(value.module() if value.with_module else None)
    plain = (bool, int, float, str, bytes, type(None), tuple, set, frozenset)
    return value if isinstance(value, plain) else _Same(value)


def _values(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    tensors = {**module._parameters, **module._buffers}
    return {
        name: (tensor.detach().clone(), tensor._version)
        for name, tensor in tensors.items()
        if tensor is not None and not is_lazy(tensor)
    }
