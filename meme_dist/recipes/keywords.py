"""A recipe's keywords as flat JSON values, and back: what `run.json` holds, and what the command line shows.

A recipe may group keywords in frozen dataclasses (`Model`, `Training`); on the command line and in `run.json` their fields stand beside
the recipe's own keywords, without a prefix.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """{"missing": .3, "training": Training(steps=5)} -> {"missing": .3, "steps": 5, ...}, as values that JSON holds."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat |= {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        else:
            flat[name] = _plain(value)
    return flat


def unflatten(recipe: Callable[..., Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten` for this recipe; keywords that are not named keep the recipe's default.

    Raises ValueError for keywords that the recipe does not have.
    """
    hints, arguments, left = typing.get_type_hints(recipe), {}, dict(flat)
    for name, parameter in inspect.signature(recipe).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            inner = typing.get_type_hints(hints[name])
            given = {key: _typed(inner[key], left.pop(key)) for key in list(left) if key in inner}
            arguments[name] = dataclasses.replace(parameter.default, **given)
        else:
            arguments[name] = _typed(hints[name], left.pop(name)) if name in left else parameter.default
    if left:
        raise ValueError(f"recipe {recipe.__name__!r} has no keywords {sorted(left)}; it has {sorted(names(recipe))}")
    return arguments


def with_defaults(recipe: Callable[..., R], about: str = "", /, **defaults: Any) -> Callable[..., R]:
    """The same recipe with other defaults: a named setting of it, which explicit keywords still override.

    `about` replaces the first line of its documentation.
    """

    @functools.wraps(recipe)
    def setting(**keywords: Any) -> R:
        return recipe(**{**defaults, **keywords})

    signature = inspect.signature(recipe)
    if unknown := set(defaults) - set(signature.parameters):
        raise ValueError(f"recipe {recipe.__name__!r} has no keywords {sorted(unknown)}; it has {list(signature.parameters)}")
    parameters = [p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()]
    setting.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    if about:
        setting.__doc__ = about + "\n\n" + (recipe.__doc__ or "").partition("\n\n")[2]
    return setting


def names(recipe: Callable[..., Any]) -> list[str]:
    """All keywords of a recipe, those of its groups included."""
    hints = typing.get_type_hints(recipe)
    found: list[str] = []
    for name in inspect.signature(recipe).parameters:
        group = hints[name]
        found += [entry.name for entry in dataclasses.fields(group)] if dataclasses.is_dataclass(group) else [name]
    return found


def defaults(recipe: Callable[..., Any]) -> dict[str, Any]:
    """The recipe's own values of its keywords, flat; those that have to be given are not among them."""
    parameters = inspect.signature(recipe).parameters.items()
    return flatten({name: parameter.default for name, parameter in parameters if parameter.default is not inspect.Parameter.empty})


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())  # a run must find its files from any folder
    return list(value) if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    kinds = {hint, *typing.get_args(hint)}
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    is_list = any(typing.get_origin(kind) is list for kind in kinds)
    return tuple(value) if isinstance(value, list) and not is_list else value
