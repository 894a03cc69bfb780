"""Whether a recipe heeds its keywords: what it reads of its groups (`Model`) while it builds, and whether it trains as it is told.

A run is what its run.json says only if it does. Whether a plain keyword is read nobody can see; of a group's settings a watched copy can.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from meme_dist.data.index import Manifest
from meme_dist.objectives.base import Objective
from meme_dist.recipes.base import Recipe
from meme_dist.train.training import Training

WHOLE = "__dict__"  # read by what takes all settings at once


class Unheeded(ValueError):
    """A recipe was asked for what it never reads."""


class Watched(NamedTuple):
    """A group that a recipe was given, the copy that it got in its place, and the names that were read from that."""

    given: Any
    stand_in: Any
    read: set[str]


class Watching(NamedTuple):
    """A recipe, what it returned when it was called with watched groups, and these by the names of their keywords."""

    function: Callable[..., Recipe]
    made: Recipe
    groups: Mapping[str, Watched]

    def build(self, manifest: Manifest, tell: Callable[[str], object] | None = None) -> tuple[Objective, set[str]]:
        """The objective, and the settings that nothing read until it was built; one that keeps a group may read all of it later.

        Raises Unheeded where such a setting is not the recipe's own. `Model.build` knows which ones an objective has no use for: of these
        `tell` is told in a line.
        """
        objective = self.made.build(manifest)
        kept = [value for module in objective.modules() for value in vars(module).values()]
        unread: dict[str, set[str]] = {}
        for name, (given, stand_in, read) in self.groups.items():
            whole = WHOLE in read or any(value is stand_in for value in kept)
            unread[name] = set() if whole else {entry.name for entry in dataclasses.fields(given)} - read
            object.__setattr__(stand_in, "__class__", type(given))  # from here on an object like any other
        idle = " ".join(filter(None, [self._idle(group, names) for group, names in unread.items()]))
        if idle and tell is not None:
            tell(f"{type(objective).__name__} has no use for {idle} here, and trains the same without")
        return objective, set().union(*unread.values())

    def _idle(self, group: str, unread: set[str]) -> str:
        """What was asked for among these settings of a group, as flags. Raises Unheeded where the recipe itself should have read it."""
        given, _, read = self.groups[group]
        own = inspect.signature(self.function).parameters[group].default
        values = {name: getattr(given, name) for name in sorted(unread)}
        asked = " ".join(_flag(name, value) for name, value in values.items() if value != getattr(own, name, None))
        if asked and "build" not in read:
            raise Unheeded(
                f"recipe {self.function.__name__!r} was asked for {asked}, and reads no such setting while it builds: it would "
                f"change nothing. Leave it out, or read it in the recipe ({group}.build, of a Model, heeds all that its objective has)"
            )
        return asked


def watch(recipe: Callable[..., Recipe], keywords: Mapping[str, Any]) -> Watching:
    """Call the recipe with these keywords, its groups watched. Raises Unheeded where it trains otherwise than its `training` says."""
    given = {name: parameter.default for name, parameter in inspect.signature(recipe).parameters.items()} | dict(keywords)
    groups = {name: _watched(value) for name, value in given.items() if _is_group(value) and not isinstance(value, Training)}
    made = recipe(**{**keywords, **{name: watched.stand_in for name, watched in groups.items()}})
    for asked in (value for value in given.values() if isinstance(value, Training)):
        wanted, got = dataclasses.asdict(asked), dataclasses.asdict(made.training)
        if differ := [f"{name} {got.get(name)!r} in place of {value!r}" for name, value in wanted.items() if value != got.get(name)]:
            raise Unheeded(
                f"recipe {recipe.__name__!r} trains with {', '.join(differ)}; pass its `training` on as it is: Recipe(build, training, ...)"
            )
    return Watching(recipe, made, groups)


def held(recipe: Callable[..., Recipe], tell: Callable[[str], object] | None = None) -> Callable[..., Recipe]:
    """The same recipe, held to its keywords: it raises Unheeded where it, or its `build`, passes over what it was asked for.

    Of what its objective has no use for, its `build` tells `tell`.
    """

    @functools.wraps(recipe)
    def checked(**keywords: Any) -> Recipe:
        watching = watch(recipe, keywords)
        return dataclasses.replace(watching.made, build=lambda manifest: watching.build(manifest, tell)[0])

    return checked


def _flag(name: str, value: Any) -> str:
    word = name.replace("_", "-")
    return {True: f"--{word}", False: f"--no-{word}"}[value] if isinstance(value, bool) else f"--{word} {value}"


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _watched(group: Any) -> Watched:
    kind, stand_in, read = type(group), copy.copy(group), set[str]()

    def noted(self: Any, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    object.__setattr__(stand_in, "__class__", type(kind.__name__, (kind,), {"__slots__": (), "__getattribute__": noted}))
    return Watched(group, stand_in, read)
