"""A recipe by its name: one of the table's, or a function of a file of one's own, `FILE.py:FUNCTION`.

Such a file is a script like any other: its code runs, with its folder on the path of imports, whenever a run of it is begun, continued or
measured, and the run keeps the file's whole path and what its content was (`fingerprint`).
"""

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from meme_dist.recipes import RECIPES
from meme_dist.recipes.base import Recipe
from meme_dist.recipes.heeded import held

SUFFIX = ".py"


class Loaded(NamedTuple):
    """A file of recipes, as this process read it."""

    module: ModuleType
    sha256: str


def is_own(name: str) -> bool:
    """Is it the name of a function in a file?"""
    return name.rpartition(":")[0].endswith(SUFFIX)


def whole(name: str) -> str:
    """The name that holds in any folder: with the file's whole path."""
    return f"{_file(name)}:{name.rpartition(':')[2]}" if is_own(name) else name


def short(name: str) -> str:
    """The name as a part of a file's name: own-mine for folder/own.py:mine."""
    return Path(name).name.replace(f"{SUFFIX}:", "-").replace(":", "-")


def fingerprint(name: str) -> str:
    """The sha256 of the file of a recipe of one's own, as this process read it and without what it imports; empty for the table's."""
    return _loaded(_file(name)).sha256 if is_own(name) else ""


def recipe_of(name: str) -> Callable[..., Recipe]:
    """The recipe of that name; one of one's own is held to what it is asked (`heeded.held`). Raises ValueError as `function_of`."""
    return held(function_of(name)) if is_own(name) else function_of(name)


def function_of(name: str) -> Callable[..., Recipe]:
    """The function of that name. Raises ValueError where there is none: not in the table, no such file, or no such function in it."""
    if name in RECIPES:
        return RECIPES[name]
    if not is_own(name):
        raise ValueError(f"recipe {name!r} is not known here; there are {', '.join(RECIPES)}, and FILE.py:FUNCTION for one of your own")
    path, _, function = name.rpartition(":")
    recipe = getattr(_loaded(_file(name)).module, function, None)
    if not callable(recipe):
        raise ValueError(
            f"{path}: expected a function {function!r} that returns a Recipe, got {'none' if recipe is None else repr(recipe)}"
        )
    return _made(recipe, name)


def _file(name: str) -> Path:
    return Path(name.rpartition(":")[0]).resolve()


def _made(function: Callable[..., Any], name: str) -> Callable[..., Recipe]:
    """The same function, whose result is looked at."""

    @functools.wraps(function)
    def made(**keywords: Any) -> Recipe:
        recipe = function(**keywords)
        if not isinstance(recipe, Recipe):
            raise ValueError(f"{name}: expected the function to return a Recipe (meme_dist.recipes.base), got {recipe!r}")
        return recipe

    return made


@functools.cache
def _loaded(path: Path) -> Loaded:
    if not path.is_file():
        raise ValueError(f"{path}: expected a Python file with a recipe, found none")
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations look their module up
    sys.path.append(str(path.parent))
    source = path.read_bytes()
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))  # the very bytes of the hash, and no cached ones
    return Loaded(module, hashlib.sha256(source).hexdigest())
