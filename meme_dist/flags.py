"""Words of a command line: a recipe's keywords as flags beside a command's own options, and words that are nearly right."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

PROGRAM = "meme-dist"
STYLE = (tyro.conf.OmitArgPrefixes,)

T = TypeVar("T")


def chosen(word: str, known: Sequence[str], what: str, where: str) -> str:
    """The word, if it is known. Raises ValueError with the nearest known one where it is not."""
    if word in known:
        return word
    raise ValueError(f"unknown {what} {word!r}{nearest(word, known)} (there are {', '.join(known)}; see {where})")


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'steps'?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def recipe_named(word: str) -> str:
    """The recipe that a word names: one of the table, or FILE.py:FUNCTION, with the file's whole path. Raises ValueError as `chosen`."""
    from meme_dist.recipes import RECIPES
    from meme_dist.recipes.named import SUFFIX, is_own, whole

    if word.endswith(SUFFIX):
        raise ValueError(f"{word}: expected a file and a function in it that returns a Recipe, {word}:FUNCTION")
    return whole(word) if is_own(word) else chosen(word, list(RECIPES), "recipe", f"{PROGRAM} recipes")


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """What a flag is given among the words, `--flag VALUE` or `--flag=VALUE`."""
    for place, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and place + 1 < len(words):
            return words[place + 1]
    return None


def recipe_flags(name: str, known: Mapping[str, Any], words: Sequence[str], options: type[T], program: str) -> tuple[T, dict[str, Any]]:
    """Parse a command's own options and a recipe's keywords from one flat list of flags; `known` replaces the recipe's defaults."""
    from meme_dist.recipes.keywords import with_defaults
    from meme_dist.recipes.named import recipe_of

    recipe = with_defaults(recipe_of(name), **known)

    @functools.wraps(recipe)
    def keywords(**given: Any) -> dict[str, Any]:
        return given

    signature = inspect.signature(recipe)
    about, _, explained = (inspect.getdoc(recipe) or "").partition("Args:")
    keywords.__signature__ = signature.replace(return_annotation=dict)  # type: ignore[attr-defined]
    keywords.__doc__ = f"The data and the networks.\n\nArgs:{explained}"

    def command(
        where: options,  # type: ignore[valid-type]
        recipe: Annotated[dict, tyro.conf.arg(constructor=keywords)],
    ) -> tuple[Any, dict]:
        return where, recipe

    where, arguments = tyro.cli(command, args=list(words), prog=program, description=about.strip(), config=STYLE)
    defaults = {key: parameter.default for key, parameter in signature.parameters.items()}
    return where, {**defaults, **arguments}


def parsed(command: Callable[..., int], words: Sequence[str], name: str) -> int:
    """Run a command whose parameters are its flags, with these words; its exit status."""
    return tyro.cli(command, args=list(words), prog=f"{PROGRAM} {name}", config=STYLE)
