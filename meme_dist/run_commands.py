"""`meme-dist evaluate | generate | impute | export`: what is done with a trained run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from meme_dist.flags import parsed

Prior = Literal["own", "reweighted", "reweighted_langevin"]


def evaluate(words: list[str]) -> int:
    """`evaluate RUN`."""

    def command(
        run: tyro.conf.Positional[str],
        checkpoint: Literal["last", "best"] = "last",
        shards: str | None = None,
        data: Path = Path("data"),
        seed: int | None = None,
        judge: str | None = None,
        pool: Literal["own", "mixture", "product", "product_with_standard", "holder"] = "own",
        prior: Prior = "own",
        split: str = "test",
        correlation: int | None = None,
        information: int | None = None,
    ) -> int:
        """Measure a trained run again: writes results.json, figures and report.md into its folder, and prints the table.

        Args:
            run: Name of the run, or the path of its folder.
            checkpoint: The last weights, or those with the lowest held-out loss.
            shards: Where the run's shards are now, if they have moved; noted in the run, so that later commands find them.
            data: Folder in which trained classifiers are kept.
            seed: Seed of the draws; by default the run's.
            judge: Another run whose data trains the classifiers: the same judges for runs on different shares of the rows.
            pool: How several inputs combine: as the model was made to, or another way (docs/objectives.md), measured into RUN/pooled-POOL.
            prior: The model's, or the one that `reweight` fitted, by resampling (measured into RUN/reweighted) or Langevin chains.
            split: Whose rows: test, or another one (validation, where rows were held out for it), measured into RUN/on-SPLIT.
            correlation: Components of the canonical correlations between modalities, 40 in the papers; by default the recipe's, 0 for none.
            information: Rows of the mutual-information scores, 2000 say; by default the recipe's, 0 for none.
        """
        from meme_dist.assess import assess_stored
        from meme_dist.report import USUAL
        from meme_dist.reweighted import Reweighted
        from meme_dist.stored import on_split, pooled

        def work(processes: Any) -> None:
            stored = find(run, checkpoint, processes, shards=shards)
            judges = None if judge is None else find(judge, checkpoint, processes).manifest
            console = Console(highlight=False)
            if pool != "own" and prior != "own":
                raise ValueError("a ratio is fitted to the model's own posteriors: give --pool or --prior, not both")
            if pool != "own":
                stored = pooled(stored, pool, processes)
            stored = _with_prior(stored, prior, checkpoint, processes)
            stored = on_split(stored, split, processes)
            caution = stored.objective.caution if isinstance(stored.objective, Reweighted) else None
            how = {"checkpoint": checkpoint, "pool": pool, "prior": prior, "judge": judge, "likelihoods": caution}
            assess_stored(
                stored,
                data / "classifiers",
                seed=seed,
                judges=judges,
                how={name: value for name, value in how.items() if value is not None and value != USUAL[name]},
                processes=processes,
                console=console,
                split=split,
                correlation=correlation,
                information=information,
            )

        return together(work)

    return parsed(command, words, "evaluate")


def generate(words: list[str]) -> int:
    """`generate RUN`."""

    def command(
        run: tyro.conf.Positional[str],
        num: int = 64,
        out: Path | None = None,
        seed: int = 0,
        checkpoint: Literal["last", "best"] = "last",
        prior: Prior = "own",
        set: tuple[str, ...] = (),
    ) -> int:
        """Draw new rows, every modality of each, from the generative prior: a picture and a safetensors file.

        Args:
            run: Name of the run, or the path of its folder.
            num: How many rows.
            out: New folder for them; by default generated-SEED in the run's folder.
            seed: Seed of the draws.
            checkpoint: The last weights, or those with the lowest held-out loss.
            prior: The model's, or the one that `reweight` fitted, by resampling or by Langevin chains.
            set: Attributes that all rows are to have, for example thick=1 leaning=0 (csvae).
        """
        from meme_dist.draws import save_draws

        def work(processes: Any) -> None:
            if set and prior != "own":
                raise ValueError("attributes are set in the model's own prior: give --set or --prior, not both")
            stored = _with_prior(find(run, checkpoint, processes, rows=False), prior, checkpoint, processes)
            folder = out or stored.folder / "-".join(["generated", *set, str(seed)])
            if set:
                from meme_dist.edit import given, wanted

                with processes.agreed():
                    stored = given(stored, wanted(stored, set))
            for path in save_draws(stored, folder, num=num, seed=seed, processes=processes):
                if processes.is_main:
                    print(path)

        return together(work)

    return parsed(command, words, "generate")


def impute(words: list[str]) -> int:
    """`impute RUN --shards FOLDER --out FOLDER --h5mu FILE`."""

    def command(
        run: tyro.conf.Positional[str],
        shards: str,
        out: Path | None = None,
        h5mu: Path | None = None,
        draws: int = 1,
        interval: float | None = None,
        seed: int = 0,
        checkpoint: Literal["last", "best"] = "last",
    ) -> int:
        """Fill in the missing modalities of every row: new shards with the same rows, in the same order, complete; a .h5mu file; or both.

        Args:
            run: Name of the run, or the path of its folder.
            shards: Folder, or address, of shards with the modalities that the run was trained on.
            out: New folder for the completed shards. Counts are whole numbers there, rounded at random so that their mean is kept.
            h5mu: New MuData file, for vectors and counts: expected values under the names of cells and features, and who was measured.
            draws: Codes of each row that what is filled in is the mean of.
            interval: Level of a central interval of each number, .95 say, in the layers lower and upper of the file; 39 or 199 draws.
            seed: Seed of the draws; another one gives other plausible completions.
            checkpoint: The last weights, or those with the lowest held-out loss.
        """
        if out is None and h5mu is None:
            raise ValueError("impute: expected --out FOLDER for shards, --h5mu FILE for a MuData file, or both; got neither")
        if interval is not None and h5mu is None:
            raise ValueError("impute: shards have one value for each entry; give --interval with --h5mu FILE")
        from meme_dist.data.index import Manifest
        from meme_dist.impute import check_features, impute, impute_h5mu

        def work(processes: Any) -> None:
            stored = find(run, checkpoint, processes, rows=False)
            with processes.agreed():
                check_features(Manifest.load(shards), stored.manifest)
            what = (stored.objective, stored.manifest.fields, shards)
            how = {"draws": draws, "seed": seed, "processes": processes}
            told = {}
            if h5mu is not None:
                told[h5mu] = impute_h5mu(*what, h5mu, interval=interval, **how)
            if out is not None:
                told[out] = impute(*what, out, **how)
            for place, splits in told.items() if processes.is_main else ():
                for split, filled in splits.items():
                    print(f"{place}: {split}, {filled.rows:,} rows: {filled.there:,} entries copied, {filled.filled:,} filled in")

        return together(work)

    return parsed(command, words, "impute")


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
        from meme_dist.data.source import check_local
        from meme_dist.run import run_folder
        from meme_dist.train.checkpoint import export as write

        check_local(out)
        step = write(run_folder(run) / "checkpoints" / checkpoint, out, averaged=averaged)
        print(f"{out}: the weights of step {step}")
        return 0

    return parsed(command, words, "export")


def together(work: Callable[[Any], None]) -> int:
    """Do one thing on every process that a launcher started; 2 where another one failed, which says why."""
    from meme_dist.ranks import Elsewhere, joined
    from meme_dist.run import ranks

    try:
        with joined(*ranks()) as processes:
            work(processes)
    except Elsewhere:
        return 2
    return 0


def find(run: str, checkpoint: str, processes: Any, *, rows: bool = True, shards: str | None = None):
    """A trained run, by its name or folder, on every process; where one cannot load it all of them stop.

    `rows` and `shards` as for `stored.load`; where the shards are now is noted in the run.
    """
    from meme_dist import record, stored
    from meme_dist.run import run_folder

    folder = run_folder(run)
    with processes.agreed():
        found = stored.load(folder, checkpoint=checkpoint, device=processes.device, rows=rows, shards=shards)
    with processes.agreed():
        if shards is not None and processes.is_main:
            record.move(folder, found.manifest)
    return found


def _with_prior(stored: Any, prior: Prior, checkpoint: str, processes: Any):
    from meme_dist.stored_ratio import reweighted

    return stored if prior == "own" else reweighted(stored, checkpoint, langevin=prior == "reweighted_langevin", processes=processes)
