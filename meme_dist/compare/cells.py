"""What a comparison consists of: models x settings x seeds of one recipe, and for each cell the flags that train it.

A plan is typed on the command line or in a file (TOML or JSON), and `plan.json` in the comparison's folder is such a file:

    recipe = "mnist_meterdigits"
    seeds = [0, 1, 2]
    split = "validation"                  # whose rows measure the models; by default test
    judge = "first"                       # own: each run by classifiers of its rows; first: all by the first run's; by default as it fits
    reference = "meme"                    # the model that others are tested against; by default the first
    [common]                              # keywords of the recipe for all cells; the rest has the recipe's defaults
    source = "downloads"
    [models.meme]                         # a name, and the keywords that make it
    [models."mmvae, Laplace"]
    objective = "mmvae"
    posterior = "laplace"
    [models."mmvae, product"]             # the same runs, asked what several modalities say by a product (meme_dist.pooled)
    objective = "mmvae"
    pool = "product"
    [vary]                                # every combination of these is a setting
    paired_fraction = [1.0, 0.5]
"""

import dataclasses
import functools
import inspect
import itertools
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from meme_dist.data.index import Manifest
from meme_dist.data.validation import VALIDATION
from meme_dist.flags import nearest, recipe_named
from meme_dist.pooled import Pool
from meme_dist.recipes import keywords as of_recipes
from meme_dist.recipes.base import Model
from meme_dist.recipes.keywords import unflatten
from meme_dist.recipes.named import recipe_of
from meme_dist.stored import on
from meme_dist.train.training import Training

FILE = "plan.json"
Judge = Literal["own", "first"]
JudgeAsked = Literal["auto", "own", "first"]
Kind = Literal["comparison", "ablation"]


class Cell(NamedTuple):
    """One entry of the tables: a model's name, the varied keywords, the seed; all keywords of its run, flat; its own name and its run's.

    With a `pool` it is another cell's run, asked in another way; what is measured then stands in a folder within the run's.
    """

    model: str
    setting: Mapping[str, Any]
    seed: int
    keywords: Mapping[str, Any]
    name: str
    run: str
    pool: str | None = None
    split: str = "test"

    @property
    def trained(self) -> Path:
        """Where its log and its costs are, from the folder of runs."""
        return Path(self.run) if self.pool is None else Path(self.run) / f"pooled-{self.pool}"

    @property
    def folder(self) -> Path:
        """Where its results are, from the folder of runs."""
        return self.trained if self.split == "test" else self.trained / on(self.split)


@dataclass(frozen=True)
class Plan:
    """A comparison. Values are JSON's, as in run.json. Raises ValueError, before anything runs, for cells that the recipe refuses."""

    recipe: str
    common: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    reference: str = ""
    judge: Judge = "own"
    kind: Kind = "comparison"
    split: str = "test"

    def __post_init__(self) -> None:
        if not self.models or not self.seeds:
            raise ValueError(f"a comparison needs models and seeds, got {len(self.models)} and {len(self.seeds)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different ones, got {' '.join(map(str, self.seeds))}; a run twice tells nothing new")
        if self.reference not in {"", *self.models}:
            raise ValueError(f"reference: expected one of the models {list(self.models)}, got {self.reference!r}")
        if lacking := sorted({"seed", "steps"} - {*_hints(recipe_of(self.recipe))}):
            raise ValueError(
                f"recipe {self.recipe!r}: runs are told their seed and their steps, and it has no keyword {' and no '.join(lacking)}; "
                "give it `training: Training = Training()`, and pass that on: Recipe(build, training, ...)"
            )
        if (seed := self.common.get("seed")) not in (None, defaults(self.recipe).get("seed")):
            each = " ".join(map(str, self.seeds))
            raise ValueError(f"seed {seed}: no run would have it, they have the seeds {each}; name all of them: --seeds, or seeds = [...]")
        for label, keywords in self.models.items():
            if twice := sorted(set(keywords) & {*self.vary, "seed"}) + sorted({"seed"} & set(self.vary)):
                raise ValueError(f"model {label!r}: {', '.join(twice)} is set by the model and varied too (seeds: --seeds); leave one out")
        cells = self.cells()
        if len({cell.name.lower() for cell in cells}) < len(cells):
            raise ValueError(f"two cells would share a folder: {_repeated([cell.name for cell in cells])}; give models other names")
        for cell in cells:
            _accepted(self.recipe, cell)

    @property
    def against(self) -> str:
        """The reference's name."""
        return self.reference or next(iter(self.models))

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the varied keywords, the first one varying slowest; one empty setting where nothing is varied."""
        return [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]

    def cells(self) -> list[Cell]:
        """Every run, setting by setting, seed by seed, so that a comparison that is stopped early has whole rows."""
        return [self._cell(m, setting, seed) for setting in self.settings() for seed in self.seeds for m in self.models]

    def _cell(self, model: str, setting: Mapping[str, Any], seed: int) -> Cell:
        own = self.models[model]
        keywords = {**self.common, **setting, **_trained(own), "seed": seed}
        name, run = (self._name(label, setting, seed) for label in (model, self._trained_as(model)))
        return Cell(model, setting, seed, keywords, name, run, own.get("pool"), self.split)

    def _name(self, model: str, setting: Mapping[str, Any], seed: int) -> str:
        return "-".join([slug(model), *(slug(said(setting, key)) for key in setting), f"seed{seed}"])

    def _trained_as(self, model: str) -> str:
        """The model whose runs this one's are: itself, but for a pool."""
        own = self.models[model]
        if "pool" not in own:
            return model
        trained = {**self.common, **_trained(own)}
        same = [label for label, other in self.models.items() if "pool" not in other and {**self.common, **other} == trained]
        if not same:
            raise ValueError(f"model {model!r}: a pool asks another model's runs again, and none has these settings without it; add it")
        return same[0]


def _trained(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name != "pool"}


def slug(text: str) -> str:
    """As a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.+_=]+", "-", text).strip("-") or "-"


def said(keywords: Mapping[str, Any], *names: str) -> str:
    """`paired_fraction=0.5, always=mnist`."""
    return ", ".join(f"{name}={shown(keywords[name])}" for name in names or keywords)


def _repeated(names: Sequence[str]) -> str:
    lower = [name.lower() for name in names]
    return ", ".join(sorted({name for name in names if lower.count(name.lower()) > 1})[:4])


def _accepted(recipe: str, cell: Cell) -> None:
    try:
        arguments = unflatten(recipe_of(recipe), cell.keywords)
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from error
    if missing := [name for name, value in arguments.items() if value is inspect.Parameter.empty]:
        raise ValueError(f"{cell.name}: recipe {recipe!r} needs {', '.join(missing)}; give it to all cells or to the model")


def check_split(plan: Plan) -> None:
    """Raise ValueError for a split that not every cell's rows have: evaluation would only find out after all the trainings."""
    of_shards = functools.cache(lambda shards: list(Manifest.load(shards).splits))
    for cell in plan.cells() if plan.split != "test" else ():
        held_out = cell.keywords.get(VALIDATION)
        known = of_shards(cell.keywords["shards"]) if "shards" in cell.keywords else ["test", *([VALIDATION] if held_out else [])]
        if plan.split not in known:
            advice = "hold rows out with --validation .1" if held_out is not None else f"recipe {plan.recipe!r} holds no rows out"
            raise ValueError(f"{cell.name}: split: expected {' or '.join(known)}, got {plan.split!r}; {advice}")


def of_data(recipe: str) -> set[str]:
    """The keywords that may change the rows: all but the model's and the training's."""
    others = {entry.name for group in (Model, Training) for entry in dataclasses.fields(group)}
    return set(_hints(recipe_of(recipe))) - others


# ---- files ------------------------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Plan:
    """A plan from a TOML or JSON file. Raises ValueError, naming it, for unknown entries, keywords and values."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: expected a plan in TOML or JSON, got {error.strerror}") from error
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a plan in {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from error
    known = {entry.name for entry in dataclasses.fields(Plan)}
    if not isinstance(data, dict) or set(data) - known or not isinstance(data.get("recipe"), str):
        raise ValueError(f"{path}: expected a recipe and some of {', '.join(sorted(known))}, got {_keys(data)}")
    if wrong := [
        f"{name}: expected {what}, got {data[name]!r}" for name, (what, fits) in ENTRIES.items() if name in data and not fits(data[name])
    ]:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    try:
        recipe = recipe_named(data["recipe"])
        models = {label: _checked(recipe, keywords, f"[models.{label}]") for label, keywords in data.get("models", {}).items()}
        vary = {
            name: [_checked(recipe, {name: value}, "[vary]")[name] for value in values] for name, values in data.get("vary", {}).items()
        }
        common = {**defaults(recipe), **_checked(recipe, data.get("common", {}), "[common]")}
        read = {"recipe": recipe, "common": common, "models": models, "vary": vary, "seeds": tuple(data.get("seeds", (0, 1, 2)))}
        return Plan(**{**data, **read, "judge": resolved(recipe, data.get("judge", "auto"), models, vary)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def resolved(recipe: str, judge: JudgeAsked, models: Mapping[str, Mapping[str, Any]], vary: Mapping[str, Sequence[Any]]) -> Judge:
    """Whose classifiers judge; by default the first run's, alike for all, where something varies or a model has other rows."""
    if judge != "auto":
        return judge
    return "first" if vary or set().union(*models.values()) & of_data(recipe) else "own"


WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "none", Path: "a path"}


def _table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


ENTRIES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "common": ("a table of keywords", lambda value: isinstance(value, dict)),
    "models": ("a table of keywords for each name", _table_of(lambda keywords: isinstance(keywords, dict))),
    "vary": ("a list of values for each keyword", _table_of(lambda values: isinstance(values, list) and len(values) > 0)),
    "seeds": ("a list of whole numbers", lambda value: isinstance(value, list) and all(type(seed) is int for seed in value)),
    "reference": ("the name of a model", lambda value: isinstance(value, str)),
    "split": ("the name of a split", lambda value: isinstance(value, str)),
    "judge": (" or ".join(typing.get_args(JudgeAsked)), lambda value: value in list(typing.get_args(JudgeAsked))),
    "kind": (" or ".join(typing.get_args(Kind)), lambda value: value in list(typing.get_args(Kind))),
}


def _keys(data: Any) -> str:
    return ", ".join(map(str, data)) if isinstance(data, dict) else repr(data)


def _checked(recipe: str, keywords: Mapping[str, Any], place: str) -> dict[str, Any]:
    try:
        return {name: typed(recipe, name, _words(value)) for name, value in keywords.items()}
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _words(value: Any) -> str | list[str]:
    return list(map(str, value)) if isinstance(value, list) else str(value)


def shown(value: Any) -> str:
    """A keyword's value as words say it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ---- words ------------------------------------------------------------------------------------------------------------------------------


def model_of(recipe: str, text: str) -> tuple[str, dict[str, Any]]:
    """`mmvae`, `mmvae:posterior=laplace,scales=softmax` or `NAME=mmvae:posterior=laplace`: the name (else the text) and the keywords."""
    head = text.partition("=")[0]
    label, rest = (head, text.partition("=")[2]) if "=" in text and ":" not in head else (text, text)
    objective, _, settings = rest.partition(":")
    return label, ({"objective": typed(recipe, "objective", objective)} if objective else {}) | _settings(recipe, settings)


def part_of(recipe: str, text: str, base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A part of an ablation: `samples=1,5,30`, one model a value (the base's own is left out), or `NAME:stop_gradient=false,samples=5`."""
    if ":" in text.partition("=")[0]:
        label, _, settings = text.partition(":")
        return {label: _settings(recipe, settings)}
    name, found = varied_of(recipe, text)
    return {f"{name}={shown(value)}": {name: value} for value in found if value != base.get(name)}


def varied_of(recipe: str, text: str) -> tuple[str, list[Any]]:
    """`paired_fraction=1,.5`: a keyword, or its flag's spelling paired-fraction, and its values."""
    flag, _, values = text.partition("=")
    name = _keyword(flag)
    return name, [typed(recipe, name, value) for value in values.split(",")]


def _settings(recipe: str, text: str) -> dict[str, Any]:
    pairs = [pair.partition("=")[::2] for pair in text.split(",") if pair]
    return {_keyword(flag): typed(recipe, _keyword(flag), value) for flag, value in pairs}


def _keyword(flag: str) -> str:
    return flag.strip().replace("-", "_")


def typed(recipe: str, name: str, text: str | list[str]) -> Any:
    """The keyword's value as JSON has it. Raises ValueError for a keyword that the recipe has not, and for a value of another type."""
    hints = {**_hints(recipe_of(recipe)), "pool": Pool}
    if name not in hints:
        raise ValueError(f"recipe {recipe!r} has no keyword {name!r}{nearest(name, list(hints))}; it has {', '.join(hints)}")
    try:
        return _parsed(hints[name], text)
    except ValueError:
        expected = _expected(hints[name])
        raise ValueError(f"{name}: expected {expected}, got {text!r}{nearest(str(text), expected.split(', '))}") from None


def _expected(hint: Any) -> str:
    """A type in words."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return ", ".join(map(str, inner))
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_expected, inner))
    if isinstance(kind, type) and issubclass(kind, Sequence):
        return f"several of: {_expected(inner[0])}"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def flags(keywords: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The command line's words for the keywords that differ from `known`, the defaults of the command they are given to."""
    words: list[str] = []
    for name, value in keywords.items():
        flag = f"--{name.replace('_', '-')}"
        if name in known and known[name] == value:
            continue
        if isinstance(value, bool) and isinstance(known.get(name), bool):
            words.append(flag if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words


def defaults(recipe: str) -> dict[str, Any]:
    """The recipe's own keywords, flat; those that have to be given are not among them."""
    return of_recipes.defaults(recipe_of(recipe))


def _hints(recipe: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(recipe).items():
        found |= typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) and name != "return" else {name: hint}
    return {name: hint for name, hint in found.items() if name != "return"}


def _parsed(hint: Any, text: str | list[str]) -> Any:
    """A text, or a list of texts for a keyword with several values (whose text is split at blanks)."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return None if type(None) in inner and str(text).strip().lower() == "none" else _first(inner, text)
    if isinstance(kind, type) and issubclass(kind, Sequence):
        return [_parsed(inner[0], word) for word in (text.split() if isinstance(text, str) else text)]
    if isinstance(text, list):
        return _refuse()
    text = text.strip()
    if kind is Literal:
        return {str(choice): choice for choice in inner}[text] if text in map(str, inner) else _refuse()
    if hint is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _refuse()
    return str(Path(text).resolve()) if hint is Path else hint(text)


def _first(hints: Sequence[Any], text: str | list[str]) -> Any:
    for hint in (hint for hint in hints if hint is not type(None)):
        try:
            return _parsed(hint, text)
        except ValueError:
            continue
    return _refuse()


def _refuse() -> Any:
    raise ValueError
