"""The command line: `meme-dist train | evaluate | generate | impute | export | shards | recipes | doctor`.

A recipe's keywords are its flags. Everything heavy is imported by the command that needs it, so that `--help` answers at once.
"""

import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from meme_dist import __version__

PROGRAM = "meme-dist"
TRACEBACK = "MEME_DIST_TRACEBACK"  # set it to see where an error came from
STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
HELP = f"""usage: {PROGRAM} COMMAND ...

Multimodal VAEs by mutual supervision: train on rows with missing modalities, generate any modality from any others.

  train RECIPE          train a recipe, then evaluate it          {PROGRAM} train digits --missing 0.3
  evaluate RUN          measure a run again                       {PROGRAM} evaluate runs/NAME
  generate RUN          draw new rows                             {PROGRAM} generate runs/NAME --num 64
  impute RUN            fill in what is missing                   {PROGRAM} impute runs/NAME --shards FOLDER --out FOLDER
  export RUN            its weights as one safetensors file       {PROGRAM} export runs/NAME --out FILE
  shards write RECIPE   write a data set as tar shards            {PROGRAM} shards write digits --out FOLDER
  shards check FOLDER   read every byte of a folder of shards     {PROGRAM} shards check FOLDER
  recipes               what there is to train
  doctor                is this machine fit to train?

`{PROGRAM} COMMAND --help` explains a command, `{PROGRAM} train RECIPE --help` lists every setting of a recipe.
Your own data: write shards (README), then {PROGRAM} train auto --shards FOLDER.
Several processes: accelerate launch ... -m meme_dist train RECIPE ... (launch/README.md)."""

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (found something wrong) or 2 (cannot do what was asked)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, highlight=False)
    try:
        return _command(words)
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        errors.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted; what was saved stays, and `--resume RUN` goes on from there", markup=False)
        return 130


def _command(words: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "evaluate": evaluate,
        "generate": generate,
        "impute": impute,
        "export": export,
        "shards": shards,
        "recipes": recipes,
        "doctor": doctor,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    return commands[chosen(words[0], list(commands), "command", f"{PROGRAM} --help")](words[1:])


def chosen(word: str, known: Sequence[str], what: str, where: str) -> str:
    """The word, if it is known. Raises ValueError with the nearest known one where it is not."""
    if word in known:
        return word
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {what} {word!r}{hint} (there are {', '.join(known)}; see {where})")


# ---- train ------------------------------------------------------------------------------------------------------------------------


def train(words: list[str]) -> int:
    """`train RECIPE ...`, `train --resume RUN`, `train --like RUN ...`; status 75 where it was told to stop, and saved."""
    if not words or words[0] in ("-h", "--help"):
        return _train_help()
    from meme_dist import run
    from meme_dist.train.signals import SAVED

    name, known = _recipe_and_defaults(words)
    rest = words if words[0].startswith("-") else words[1:]
    where, arguments = _recipe_flags(name, known, rest, run.Where, f"{PROGRAM} train {name}")
    console = Console(highlight=False)
    if where.dry_run is not None:
        from meme_dist.rehearsal import rehearse

        rehearse(name, arguments, where, where.dry_run, console=console)
        return 0
    return 0 if run.train(name, arguments, where, console=console) else SAVED


def _train_help() -> int:
    print(f"usage: {PROGRAM} train RECIPE [settings]      {PROGRAM} train RECIPE --help lists them\n")
    print(f"       {PROGRAM} train --resume RUN            go on where it was interrupted, exactly\n")
    print(f"       {PROGRAM} train --like RUN [settings]   a new run with the settings of an old one\n")
    return recipes([])


def _recipe_and_defaults(words: list[str]) -> tuple[str, Mapping[str, Any]]:
    """The recipe, and the keywords that stand for those not given: the recipe's own, or those of the run to continue or to follow."""
    from meme_dist.recipes import RECIPES
    from meme_dist.run import run_folder
    from meme_dist.stored import arguments_of

    given = None if words[0].startswith("-") else chosen(words[0], list(RECIPES), "recipe", f"{PROGRAM} recipes")
    earlier = _value_of("--resume", words) or _value_of("--like", words)
    if earlier is None:
        if given is None:
            raise ValueError(f"train: which recipe? {PROGRAM} train RECIPE ..., with one of {', '.join(RECIPES)}")
        return given, {}
    name, arguments = arguments_of(run_folder(earlier))
    if given not in (None, name):
        raise ValueError(f"{earlier}: is a run of recipe {name!r}, not of {given!r}; leave the recipe out, or start a new run: --run NAME")
    return name, arguments


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    for place, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and place + 1 < len(words):
            return words[place + 1]
    return None


def _recipe_flags(name: str, known: Mapping[str, Any], words: Sequence[str], options: type[T], program: str) -> tuple[T, dict[str, Any]]:
    """Parse a command's own options and a recipe's keywords from one flat list of flags; `known` replaces the recipe's defaults."""
    from meme_dist.recipes import RECIPES
    from meme_dist.recipes.keywords import with_defaults

    recipe = with_defaults(RECIPES[name], **known)

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


# ---- a trained run ----------------------------------------------------------------------------------------------------------------


def evaluate(words: list[str]) -> int:
    """`evaluate RUN`."""

    def command(
        run: tyro.conf.Positional[str],
        checkpoint: Literal["last", "best"] = "last",
        data: Path = Path("data"),
        seed: int | None = None,
        judge: str | None = None,
    ) -> int:
        """Measure a trained run again: writes results.json, figures and report.md into its folder, and prints the table.

        Args:
            run: Name of the run, or the path of its folder.
            checkpoint: The last weights, or those with the lowest held-out loss.
            data: Folder in which trained classifiers are kept.
            seed: Seed of the draws; by default the run's.
            judge: Another run whose data trains the classifiers: the same judges for runs on different shares of the rows.
        """
        from meme_dist.assess import assess_stored

        def work(processes: Any) -> None:
            stored = _stored(run, checkpoint, processes)
            judges = None if judge is None else _stored(judge, checkpoint, processes).manifest
            console = Console(highlight=False)
            assess_stored(stored, data / "classifiers", seed=seed, judges=judges, processes=processes, console=console)

        return _together(work)

    return _parsed(command, words, "evaluate")


def generate(words: list[str]) -> int:
    """`generate RUN`."""

    def command(
        run: tyro.conf.Positional[str], num: int = 64, out: Path | None = None, seed: int = 0, checkpoint: Literal["last", "best"] = "last"
    ) -> int:
        """Draw new rows, every modality of each, from the generative prior: a picture and a safetensors file.

        Args:
            run: Name of the run, or the path of its folder.
            num: How many rows.
            out: New folder for them; by default generated-SEED in the run's folder.
            seed: Seed of the draws.
            checkpoint: The last weights, or those with the lowest held-out loss.
        """
        from meme_dist.draws import save_draws

        def work(processes: Any) -> None:
            stored = _stored(run, checkpoint, processes)
            folder = out or stored.folder / f"generated-{seed}"
            for path in save_draws(stored, folder, num=num, seed=seed, processes=processes):
                if processes.is_main:
                    print(path)

        return _together(work)

    return _parsed(command, words, "generate")


def impute(words: list[str]) -> int:
    """`impute RUN --shards FOLDER --out FOLDER`."""

    def command(run: tyro.conf.Positional[str], shards: str, out: Path, seed: int = 0, checkpoint: Literal["last", "best"] = "last") -> int:
        """Fill in the missing modalities of every row: new shards with the same rows, in the same order, complete.

        Args:
            run: Name of the run, or the path of its folder.
            shards: Folder, or address, of shards with the modalities that the run was trained on.
            out: New folder for the completed shards.
            seed: Seed of the draws; another one gives other plausible completions.
            checkpoint: The last weights, or those with the lowest held-out loss.
        """
        from meme_dist.impute import impute

        def work(processes: Any) -> None:
            stored = _stored(run, checkpoint, processes)
            for split, filled in impute(stored.objective, stored.manifest.fields, shards, out, seed=seed, processes=processes).items():
                if processes.is_main:
                    print(f"{out}: {split}, {filled.rows:,} rows: {filled.there:,} entries copied, {filled.filled:,} filled in")

        return _together(work)

    return _parsed(command, words, "impute")


def export(words: list[str]) -> int:
    """`export RUN --out FILE`."""

    def command(run: tyro.conf.Positional[str], out: Path, checkpoint: Literal["last", "best"] = "last", averaged: bool = True) -> int:
        """Write a trained run's weights as one safetensors file, whichever engine and however many processes trained it.

        Args:
            run: Name of the run, or the path of its folder.
            out: New file.
            checkpoint: The last weights, or those with the lowest held-out loss.
            averaged: The moving average of the weights, where the run has one.
        """
        from meme_dist.run import run_folder
        from meme_dist.train.checkpoint import export as write

        step = write(run_folder(run) / "checkpoints" / checkpoint, out, averaged=averaged)
        print(f"{out}: the weights of step {step}")
        return 0

    return _parsed(command, words, "export")


def _together(work: Callable[[Any], None]) -> int:
    """Do one thing on every process that a launcher started; 2 where another one failed, which says why."""
    from meme_dist.ranks import Elsewhere, joined
    from meme_dist.run import ranks

    try:
        with joined(*ranks()) as processes:
            work(processes)
    except Elsewhere:
        return 2
    return 0


def _stored(run: str, checkpoint: str, processes: Any):
    from meme_dist import stored
    from meme_dist.run import run_folder

    with processes.agreed():
        found = stored.load(run_folder(run), checkpoint=checkpoint, device=processes.device)
    return found


def _parsed(command: Callable[..., int], words: Sequence[str], name: str) -> int:
    return tyro.cli(command, args=list(words), prog=f"{PROGRAM} {name}", config=STYLE)


# ---- shards, recipes, doctor ------------------------------------------------------------------------------------------------------


def shards(words: list[str]) -> int:
    """`shards write RECIPE --out FOLDER`, `shards check FOLDER`."""
    usage = f"usage: {PROGRAM} shards write RECIPE --out FOLDER [settings]\n       {PROGRAM} shards check FOLDER"
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        return 0
    action = chosen(words[0], ["write", "check"], "action", f"{PROGRAM} shards --help")
    return _write_shards(words[1:], usage) if action == "write" else _check_shards(words[1:])


def _write_shards(words: list[str], usage: str) -> int:
    if not words or words[0].startswith("-"):
        print(usage)
        return 0 if words and words[0] in ("-h", "--help") else 2
    from meme_dist.data.shards import write_shards
    from meme_dist.recipes import RECIPES
    from meme_dist.run import WriteTo, described

    name = chosen(words[0], list(RECIPES), "recipe", f"{PROGRAM} recipes")
    to, arguments = _recipe_flags(name, {}, words[1:], WriteTo, f"{PROGRAM} shards write {name}")
    recipe = RECIPES[name](**arguments)
    if recipe.dataset is None:
        raise ValueError(f"recipe {name!r} reads shards that exist; there is nothing to write")
    manifest = write_shards(recipe.dataset, to.out, rows_per_shard=to.rows_per_shard)
    print(f"{to.out}: {described(manifest)}")
    return 0


def _check_shards(words: list[str]) -> int:
    def command(folder: tyro.conf.Positional[Path]) -> int:
        """Read every byte of a folder of shards and compare it with manifest and index; status 1 if anything is wrong.

        Args:
            folder: Folder with manifest.json, index and tar files.
        """
        from meme_dist.data.shards import check_shards

        report = check_shards(folder)
        print(report)
        return 0 if report.ok else 1

    return _parsed(command, words, "shards check")


def recipes(words: list[str]) -> int:
    """`recipes`."""

    def command() -> int:
        """List the recipes, each with a line about it."""
        from meme_dist.recipes import RECIPES

        table = Table(box=None, show_header=False, pad_edge=False)
        for name, recipe in RECIPES.items():
            table.add_row(name, (inspect.getdoc(recipe) or "").splitlines()[0])
        Console(highlight=False).print("Recipes:", table, sep="\n")
        return 0

    return _parsed(command, words, "recipes")


def doctor(words: list[str]) -> int:
    """`doctor`."""

    def command(run: Path = Path("runs")) -> int:
        """Say whether this machine can train, and how to mend what it lacks; status 1 if something stops it.

        Args:
            run: Folder in which runs shall be written.
        """
        from meme_dist.doctor import examine

        findings = examine(run)
        table = Table(box=None, show_header=False, pad_edge=False)
        for finding in findings:
            table.add_row(*map(escape, (finding.status, finding.what, finding.found, finding.advice)))
        Console(highlight=False).print(table)
        return 1 if any(finding.status == "wrong" for finding in findings) else 0

    return _parsed(command, words, "doctor")
