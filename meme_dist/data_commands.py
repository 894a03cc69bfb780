"""`meme-dist shards | recipes | doctor`: what is there to train on, what to train, and whether this machine can."""

import inspect
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from meme_dist.flags import PROGRAM, STYLE, chosen, parsed, recipe_flags, recipe_named


def shards(words: list[str]) -> int:
    """`shards write RECIPE --out FOLDER`, `shards convert FILE ... --out FOLDER`, `shards check FOLDER`."""
    forms = ("write RECIPE --out FOLDER [settings]", "convert FILE ... --out FOLDER [settings]", "check FOLDER")
    usage = "usage: " + "\n       ".join(f"{PROGRAM} shards {form}" for form in forms)
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        return 0
    match chosen(words[0], ["write", "convert", "check"], "action", f"{PROGRAM} shards --help"):
        case "write":
            return _write_shards(words[1:], usage)
        case "convert":
            return _convert_shards(words[1:])
        case _:
            return _check_shards(words[1:])


def _convert_shards(words: list[str]) -> int:
    from meme_dist.convert import Convert, convert
    from meme_dist.data.source import check_local
    from meme_dist.run import described

    options = tyro.cli(Convert, args=list(words), prog=f"{PROGRAM} shards convert", config=STYLE)
    check_local(options.out)  # before large files are read
    print(f"{options.out}: {described(convert(options))}")
    return 0


def _write_shards(words: list[str], usage: str) -> int:
    if not words or words[0].startswith("-"):
        print(usage)
        return 0 if words and words[0] in ("-h", "--help") else 2
    from meme_dist.data.shards import write_shards
    from meme_dist.recipes.named import recipe_of
    from meme_dist.run import WriteTo, described

    name = recipe_named(words[0])
    to, arguments = recipe_flags(name, {}, words[1:], WriteTo, f"{PROGRAM} shards write {name}")
    recipe = recipe_of(name)(**arguments)
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

    return parsed(command, words, "shards check")


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

    return parsed(command, words, "recipes")


def doctor(words: list[str]) -> int:
    """`doctor`."""

    def command(run: Path = Path("runs")) -> int:
        """Say whether this machine can train, and how to mend what it lacks; status 1 if something stops it.

        Args:
            run: Folder in which runs shall be written.
        """
        from meme_dist.data.source import check_local
        from meme_dist.doctor import examine

        check_local(run)
        findings = examine(run)
        table = Table(box=None, show_header=False, pad_edge=False)
        for finding in findings:
            table.add_row(*map(escape, (finding.status, finding.what, finding.found, finding.advice)))
        Console(highlight=False).print(table)
        return 1 if any(finding.status == "wrong" for finding in findings) else 0

    return parsed(command, words, "doctor")
