"""The command line: `meme-dist train`, `evaluate`, `generate` and the other commands that HELP lists.

A recipe's keywords are its flags. Everything heavy is imported by the command that needs it, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from meme_dist import __version__
from meme_dist.data_commands import doctor, recipes, shards
from meme_dist.flags import PROGRAM, chosen, recipe_flags, recipe_named, value_of
from meme_dist.leave import status_of
from meme_dist.run_commands import evaluate, export, generate, impute

TRACEBACK = "MEME_DIST_TRACEBACK"  # set it to see where an error came from
HELP = f"""usage: {PROGRAM} COMMAND ...

Multimodal VAEs by mutual supervision: train on rows with missing modalities, generate any modality from any others.

  train RECIPE          train a recipe, then evaluate it          {PROGRAM} train digits --missing 0.3
  evaluate RUN          measure a run again                       {PROGRAM} evaluate runs/NAME
  generate RUN          draw new rows                             {PROGRAM} generate runs/NAME --num 64
  edit RUN              set attributes of rows, keep the rest     {PROGRAM} edit runs/NAME --set thick=1
  impute RUN            fill in what is missing                   {PROGRAM} impute runs/NAME --shards FOLDER --out FOLDER
  refine RUN            codes nearer to the exact posterior       {PROGRAM} refine runs/NAME --budget 200
  reweight RUN          fit its prior to its posteriors           {PROGRAM} reweight runs/NAME
  export RUN            its weights as one safetensors file       {PROGRAM} export runs/NAME --out FILE
  compare RECIPE        models x settings x seeds, one report     {PROGRAM} compare digits --models meme mmvae --out FOLDER
  ablate RECIPE         a model, one part changed at a time       {PROGRAM} ablate digits --out FOLDER
  shards write RECIPE   write a data set as tar shards            {PROGRAM} shards write digits --out FOLDER
  shards convert FILE   the same from .h5mu or .h5ad files        {PROGRAM} shards convert cells.h5mu --out FOLDER
  shards check FOLDER   read every byte of a folder of shards     {PROGRAM} shards check FOLDER
  recipes               what there is to train
  doctor                is this machine fit to train?

`{PROGRAM} COMMAND --help` explains a command, `{PROGRAM} train RECIPE --help` lists every setting of a recipe.
Your own data: write shards (README), then {PROGRAM} train auto --shards FOLDER. Your own networks: FILE.py:FUNCTION is a recipe too.
Several processes: accelerate launch ... -m meme_dist train RECIPE ... (launch/README.md)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (found or met something wrong) or 2 (cannot do what was asked)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, highlight=False)
    try:
        return _command(words)
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        errors.print(f"error: {error}", markup=False, soft_wrap=True)
        return status_of(error)
    except KeyboardInterrupt:
        errors.print("interrupted; what was saved stays, and `--resume RUN` goes on from there", markup=False)
        return 130


def _command(words: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "evaluate": evaluate,
        "generate": generate,
        "edit": edit,
        "impute": impute,
        "refine": refine,
        "reweight": reweight,
        "export": export,
        "compare": compare,
        "ablate": ablate,
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


# ---- train ------------------------------------------------------------------------------------------------------------------------


def train(words: list[str]) -> int:
    """`train RECIPE ...`, `train --resume RUN`, `train --like RUN ...`; status 75 where it was told to stop, and saved."""
    if not words or words[0] in ("-h", "--help"):
        return _train_help()
    from meme_dist import run
    from meme_dist.train.signals import SAVED

    name, known = _recipe_and_defaults(words)
    rest = words if words[0].startswith("-") else words[1:]
    where, arguments = recipe_flags(name, known, rest, run.Where, f"{PROGRAM} train {name}")
    console = Console(highlight=False)
    if where.dry_run is not None:
        from meme_dist.rehearsal import rehearse

        rehearse(name, arguments, where, where.dry_run, console=console)
        return 0
    return 0 if run.train(name, arguments, where, console=console) else SAVED


def compare(words: list[str]) -> int:
    """`compare RECIPE ...`, `compare PLAN ...`, `compare --report-only FOLDER`; 1 where runs failed, 75 where it was told to stop."""
    from meme_dist.compare.command import main

    return main("compare", words)


def ablate(words: list[str]) -> int:
    """`ablate RECIPE ...`; statuses as of `compare`."""
    from meme_dist.compare.command import main

    return main("ablate", words)


def refine(words: list[str]) -> int:
    """`refine RUN ...`."""
    from meme_dist.refine_command import main

    return main(words)


def reweight(words: list[str]) -> int:
    """`reweight RUN ...`."""
    from meme_dist.reweight_command import main

    return main(words)


def edit(words: list[str]) -> int:
    """`edit RUN --set ATTRIBUTE=VALUE`."""
    from meme_dist.edit_command import main

    return main(words)


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

    given = None if words[0].startswith("-") else recipe_named(words[0])
    earlier = value_of("--resume", words) or value_of("--like", words)
    if earlier is None:
        if given is None:
            raise ValueError(f"train: which recipe? {PROGRAM} train RECIPE ..., with one of {', '.join(RECIPES)}")
        return given, {}
    name, arguments = arguments_of(run_folder(earlier))
    if given not in (None, name):
        raise ValueError(f"{earlier}: is a run of recipe {name!r}, not of {given!r}; leave the recipe out, or start a new run: --run NAME")
    return name, arguments
