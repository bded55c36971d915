"""What was done to a model, as plain data, and doing it again to another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.errors import OptionError, RecipeError, UnknownNorm
from normswap.graph.modules import find, read_site
from normswap.norms.registry import lookup
from normswap.norms.spec import NormSpec, spec
from normswap.norms.start import Carry
from normswap.swap.journal import records
from normswap.swap.plan import Plan
from normswap.swap.planning import plan

__all__ = ["apply_recipe", "recipe", "recipe_plan"]

VERSION = 1


def recipe(model: nn.Module) -> dict[str, Any]:
    """Write down what conversions made of a model, as data that JSON can hold.

    Args:
        model: a converted model.

    Returns:
        ``{"normswap": 1, "norms": {path: {"norm": name, "options": {...}}}}``, with each norm's
        options as they came out, so that a rule's choice is kept whatever the rule becomes.

    Raises:
        RecipeError: a norm that is not registered, or an option that is no plain value.
    """
    norms = {}
    for path, (module, record) in records(model).items():
        if not isinstance(record.spec, NormSpec):
            raise RecipeError(
                f"{path} ({type(module).__name__}): its class is not registered, so a recipe "
                "cannot name it; register it by normswap.register"
            )
        norms[path] = {"norm": record.spec.name, "options": _options(path, module, record.spec)}
    return {"normswap": VERSION, "norms": norms}


def _options(path: str, module: nn.Module, made: NormSpec) -> dict[str, Any]:
    """The options by which a fresh model's norm becomes as this one is."""
    settings = {**read_site(module, path).state.settings, **made.options}
    options = {
        option.name: settings[option.name]
        for option in made.entry.options
        if settings.get(option.name) is not None
    }
    if "num_groups" in options:
        options.pop("channels_per_group", None)
    for name, value in options.items():
        if not isinstance(value, (bool, int, float, str)):
            raise RecipeError(
                f"{path} ({type(module).__name__}): {name} is a {type(value).__name__}, which a "
                f"recipe cannot hold; convert without {name}= before writing one"
            )
    return options


def apply_recipe(
    model: nn.Module,
    recipe: Mapping[str, Any],
    *,
    carry: Carry = "auto",
    example_inputs: Any = None,
) -> nn.Module:
    """Convert a model as a recipe says; nothing in it is ever imported or evaluated.

    Args:
        model: a model with norms at the recipe's paths.
        recipe: what `normswap.recipe` wrote.
        carry: as for `normswap.plan`.
        example_inputs: likewise, where the conversion needed some.

    Returns:
        The converted model, as `normswap.convert` does.

    Raises:
        RecipeError: it is no recipe, names an unknown norm, or is of another model; the model is
            as it was.
    """
    planned = recipe_plan(model, recipe, carry=carry, example_inputs=example_inputs)
    return model if planned is None else planned.apply()


def recipe_plan(
    model: nn.Module,
    recipe: Mapping[str, Any],
    *,
    carry: Carry = "auto",
    example_inputs: Any = None,
) -> Plan | None:
    """The plan of what a recipe says; ``None`` for a recipe in which nothing is converted."""
    norms = _checked(recipe)
    if not norms:
        return None
    here = {name for site in find(model) for name in site.names}
    missing = [path for path in norms if path not in here]
    if missing:
        raise RecipeError(
            f"the recipe is of another model: this one has no norm at {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            + "; make the model as it was made when the recipe was written"
        )
    return plan(
        model,
        lambda site: next((norms[name] for name in site.names if name in norms), None),
        where=lambda site: any(name in norms for name in site.names),
        carry=carry,
        example_inputs=example_inputs,
        strict=True,
    )


def _checked(recipe: Mapping[str, Any]) -> dict[str, NormSpec]:
    """The recipe's norms by path, if that is what it holds."""
    version = recipe.get("normswap") if isinstance(recipe, Mapping) else None
    if version != VERSION:
        raise RecipeError(
            f"no recipe of version {VERSION}: normswap={version!r}; write one by normswap.recipe"
        )
    norms = {}
    for path, one in recipe.get("norms", {}).items():
        try:
            name, options = one["norm"], dict(one["options"])
            lookup(name)
            norms[path] = spec(name, **options)
        except UnknownNorm as error:
            raise RecipeError(f"{path}: {error} Register it before applying the recipe") from None
        except (KeyError, TypeError, ValueError, OptionError) as error:
            raise RecipeError(f"{path}: {one!r} says no norm with its options: {error}") from None
    return norms
