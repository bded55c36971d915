"""Modules made of source, each with norms written out in its forward or with none."""

from __future__ import annotations

import linecache
import random
import sys
import types
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Channels, and a shape that broadcasts against the input.
SIZE = 12


@dataclass(frozen=True)
class Written:
    """A module with one norm written out.

    Args:
        source: of its class.
        norm: which norm it is.
        channel_dim: where its channels are.
    """

    source: str
    norm: str
    channel_dim: int

    def make(self) -> Any:
        """A module of the class, which can be imported."""
        return made(self.source)


def made(source: str) -> Any:
    """A module of the class ``Module`` of a source, as if that were a file."""
    name = f"written_out_{abs(hash(source))}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__file__ = f"<{name}>"
        linecache.cache[module.__file__] = (len(source), None, source.splitlines(True), name)
        exec(compile(source, module.__file__, "exec"), vars(module))
        sys.modules[name] = module
    cls: type[nn.Module] = sys.modules[name].Module  # type: ignore[attr-defined]
    return cls()


HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn


"""


def _mean(x: str, dims: str, draw: random.Random) -> str:
    return draw.choice(
        [
            f"{x}.mean({dims}, keepdim=True)",
            f"{x}.mean(dim={dims}, keepdim=True)",
            f"torch.mean({x}, dim={dims}, keepdim=True)",
            f"torch.mean({x}, {dims}, True)",
        ]
    )


def _square(x: str, draw: random.Random) -> str:
    return draw.choice(
        [f"{x}.pow(2)", f"{x} ** 2", f"{x} * {x}", f"{x}.square()", f"torch.square({x})",
         f"torch.pow({x}, 2)"]
    )  # fmt: skip


def _quotient(x: str, var: str, eps: str, draw: random.Random) -> str:
    return draw.choice(
        [
            f"{x} * torch.rsqrt({var} + {eps})",
            f"{x} * ({var} + {eps}).rsqrt()",
            f"{x} / torch.sqrt({var} + {eps})",
            f"{x} / ({var} + {eps}).sqrt()",
            f"{x} / ({var} + {eps}) ** 0.5",
            f"torch.div({x}, torch.sqrt({var} + {eps}))",
            f"{x} * ({var} + {eps}).pow(-0.5)",
        ]
    )


def written(seed: int) -> Written:
    """A module with a norm in a form, names and surroundings that the seed draws."""
    draw = random.Random(seed)
    first = draw.random() < 0.4
    centred = draw.random() < 0.6
    grouped = first and centred and draw.random() < 0.3
    dims = "(2, 3, 4)" if grouped else "1" if first else "-1"
    unbiased = centred and not grouped and draw.random() < 0.2
    upcast = draw.random() < 0.3
    one_plus = draw.random() < 0.2
    offset = draw.random() < (0.7 if centred else 0.2)
    gain_name = draw.choice(["weight", "gamma", "g", "scale", "alpha", "a_2"])
    bias_name = draw.choice(["bias", "beta", "b", "shift", "b_2"])
    x = draw.choice(["x", "h", "hidden", "hidden_states", "inp"])
    flat = not first and draw.random() < 0.6
    inline = first and not flat and draw.random() < 0.5
    shape = "SIZE" if flat or inline else "1, SIZE, 1, 1" if first else "1, 1, SIZE"
    eps = draw.choice(["1e-5", "1e-6", "self.eps", "self.variance_epsilon", "EPS"])
    view = draw.choice(["[:, None, None]", ".view(1, -1, 1, 1)", ".reshape(-1, 1, 1)"])
    gain = f"self.{gain_name}" + (view if inline else "")
    gain = f"(1 + {gain})" if one_plus else gain
    bias = f"self.{bias_name}" + (view if inline else "")
    lines: list[str] = []
    name, kept = x, x
    if upcast:
        lines.append("dtype = " + f"{x}.dtype")
        name = draw.choice([x, "y"])
        lines.append(f"{name} = {x}{draw.choice(['.float()', '.to(torch.float32)'])}")
    if grouped:
        lines.append(f"parts = {name}.reshape({name}.shape[0], 3, {SIZE // 3}, *{name}.shape[2:])")
        kept, name = name, "parts"
    form = draw.randrange(4) if centred else draw.randrange(2)
    if not centred:
        square = _mean(f"({_square(name, draw)})", dims, draw)
        if form:
            lines.append(f"ms = {square}")
            square = "ms"
        value = _quotient(name, square, eps, draw)
    elif form == 0 or unbiased:
        words = [f"correction={int(unbiased)}", f"unbiased={unbiased}"]
        correction = draw.choice(words)
        lines.append(f"mu = {_mean(name, dims, draw)}")
        lines.append(f"var = {name}.var({dims}, {correction}, keepdim=True)")
        value = _quotient(f"({name} - mu)", "var", eps, draw)
    elif form == 1:
        lines.append(f"var, mu = torch.var_mean({name}, {dims}, correction=0, keepdim=True)")
        value = _quotient(f"({name} - mu)", "var", eps, draw)
    elif form == 2:
        lines.append(f"c = {name} - {_mean(name, dims, draw)}")
        lines.append(f"var = {_mean('(' + _square('c', draw) + ')', dims, draw)}")
        value = _quotient("c", "var", eps, draw)
    else:
        lines.append(f"mu = {_mean(name, dims, draw)}")
        square = "(" + _square(f"({name} - mu)", draw) + ")"
        lines.append(f"var = {_mean(square, dims, draw)}")
        value = _quotient(f"({name} - mu)", "var", eps, draw)
    if grouped:
        lines.append(f"normed = ({value}).reshape({kept}.shape)")
        value = "normed"
    scaled = draw.choice(
        [f"{gain} * ({value})", f"({value}) * {gain}", f"torch.mul({value}, {gain})"]
    )
    if upcast and draw.random() < 0.5:
        lines.append(f"normed = ({value}).to(dtype)")
        scaled = f"{gain} * normed"
    elif upcast:
        scaled = f"({scaled}).{draw.choice(['to(dtype)', 'type(dtype)'])}"
    result = f"{scaled} + {bias}" if offset else scaled
    if draw.random() < 0.3:
        lines.append(f"{x} = {result}")
        result = x
    around = draw.randrange(6)
    body = ["kept = " + x] if around == 1 else []
    layer = "nn.Conv2d(SIZE, SIZE, 1)" if first else "nn.Linear(SIZE, SIZE)"
    if around in (0, 2, 3, 4):
        body.append(f"{x} = self.layer({x})")
    if around == 4:
        body += ["if flag:", f"    {x} = {x} + 1"]
    body += lines
    body.append(
        {
            0: f"return {result}",
            1: f"return kept + ({result})",
            2: f"return F.relu({result})",
            3: f"return self.layer({result})",
            4: f"return {result}",
            5: f"return torch.tanh(self.layer({result}))",
        }[around]
    )
    source = HEAD + "SIZE = 12\nEPS = 1e-4\n\n\n"
    source += "class Module(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    source += f"        self.layer = {layer}\n"
    source += f"        self.{gain_name} = nn.Parameter(torch.rand({shape}) + 0.5)\n"
    if offset:
        source += f"        self.{bias_name} = nn.Parameter(torch.rand({shape}))\n"
    source += "        self.eps = 1e-5\n        self.variance_epsilon = 1e-6\n\n"
    source += f"    def forward(self, {x}, flag=True):\n"
    source += "".join(f"        {line}\n" for line in body)
    kind = "gn" if grouped else ("ln" if centred else "rms") + ("2d" if first else "")
    return Written(source, kind, 1 if first else -1)


#: Bodies of forwards, with a parameter ``weight`` (12,) and a layer, that have no norm in them.
NEAR_MISSES: list[str] = [
    "return x * self.weight",
    "return self.weight * x / (1 + x.abs())",
    "return self.weight * F.normalize(x, dim=-1)",
    "return self.weight * x.softmax(-1)",
    "return self.weight * (x - x.mean(-1, keepdim=True))",
    "return self.weight * x / x.norm(dim=-1, keepdim=True)",
    "return self.weight * x / x.abs().mean(-1, keepdim=True)",
    "return self.weight * x / (x.var(-1, keepdim=True) + 1e-5)",
    "return self.weight * x / (x.std(-1, keepdim=True) + 1e-2)",
    "return self.weight * (x - x.amin(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)",
    "return self.weight * x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)",
    "return self.weight * x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5)",
    "return self.weight * x.relu() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)",
    "return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5).clamp(max=1.0)",
    "return self.weight * x * torch.rsqrt(x.pow(2).mean() + 1e-5)",
    "return self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5)",
    "return self.weight * x * torch.rsqrt(self.weight.pow(2).mean() + 1e-5)",
    "w = self.layer.weight\nw = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)\n"
    "return F.linear(x, w) * self.weight",
    "w = self.layer.weight * torch.rsqrt(self.layer.weight.pow(2).mean(1, True) + 1e-5)\n"
    "return F.linear(x, w * self.weight)",
    "m = x.mean(-1, keepdim=True)\nv = (x - m).pow(2).mean(-1, True)\nreturn self.weight * v",
    "m = x.mean(-1, keepdim=True)\nreturn self.weight * m.expand_as(x)",
    "q = x / x.norm(dim=-1, keepdim=True)\nreturn (q @ q.mT) @ (x * self.weight)",
    "s = x.mean(1, keepdim=True)\nreturn x * torch.sigmoid(self.layer(s)) * self.weight",
    "s = x.pow(2).mean(1, True).sqrt()\nreturn x * self.weight * s / s.mean(-1, keepdim=True)",
    "return ((x - self.weight) ** 2).mean(-1, keepdim=True).sqrt() * x",
    "loss = (x - x.mean()).pow(2).mean()\nreturn x * self.weight + loss",
    "return self.weight * torch.tanh(x / x.std())",
    "return self.weight * x.cumsum(-1) / x.pow(2).mean(-1, keepdim=True).sqrt()",
    "a, b = x.chunk(2, -1)\na = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-5)\n"
    "return torch.cat([a, b], -1) * self.weight",
    "y = self.layer(x)\nreturn self.weight * y * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5)",
    "y = x.roll(1, -1)\nreturn self.weight * y * torch.rsqrt(y.pow(4).mean(-1, True) + 1e-5)",
    "return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2)",
    "return x + self.weight * x.var(-1, keepdim=True).sqrt()",
    "return x.logsumexp(-1, keepdim=True) * self.weight + x.mean()",
]


def near_miss(body: str) -> str:
    """The source of a module that has a forward of these lines."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return (
        f"{HEAD}class Module(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = nn.Linear(12, 12)\n"
        "        self.weight = nn.Parameter(torch.rand(12) + 0.5)\n\n"
        f"    def forward(self, x):\n{lines}"
    )
