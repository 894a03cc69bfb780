"""`meme-dist edit`: rows of a run's data with their attributes set to what one wants."""

from pathlib import Path
from typing import Literal

import tyro

from meme_dist.flags import parsed


def main(words: list[str]) -> int:
    """`edit RUN --set ATTRIBUTE=VALUE ...`."""

    def command(
        run: tyro.conf.Positional[str],
        set: tuple[str, ...],
        rows: int = 12,
        draw: bool = False,
        out: Path | None = None,
        seed: int = 0,
        checkpoint: Literal["last", "best"] = "last",
    ) -> int:
        """Set attributes of the first test rows and leave all else as it is: a picture and a safetensors file.

        Args:
            run: Name of the run, or the path of its folder.
            set: What to set, for example thick=1 leaning=0.
            rows: How many rows.
            draw: Draw the attribute's latents instead of taking their mean: another variant of it in every row.
            out: New folder for them; by default edited-ATTRIBUTE=VALUE-SEED in the run's folder, with -drawn for draws.
            seed: Seed of the draws.
            checkpoint: The last weights, or those with the lowest held-out loss.
        """
        from meme_dist import edit, stored
        from meme_dist.run import run_folder

        found = stored.load(run_folder(run), checkpoint=checkpoint)
        values = edit.wanted(found, set)
        folder = out or found.folder / "-".join(["edited", *set, *(["drawn"] if draw else []), str(seed)])
        for path in edit.save_edits(found, edit.first_rows(found, rows, seed=seed), values, folder, draw=draw):
            print(path)
        return 0

    return parsed(command, words, "edit")
