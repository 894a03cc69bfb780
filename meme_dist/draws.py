"""New rows from the prior, made by any number of processes: one safetensors file with all of them, and a picture of the first."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from meme_dist import figures
from meme_dist.data.source import check_local
from meme_dist.metrics.generation import CHUNK, joint_generations
from meme_dist.ranks import ALONE, Processes, hidden
from meme_dist.stored import Stored

SHOWN = 12  # draws in the picture


def save_draws(stored: Stored, folder: Path, *, num: int, seed: int, processes: Processes = ALONE) -> list[Path]:
    """Write `num` rows into a new folder, every modality of each; returns the files. Collective.

    Each process makes a contiguous share of the rows, and `draws.safetensors` is the same, byte by byte, for any number of them. No
    process holds more than CHUNK rows; while rank 0 puts the shares together one modality of one share is on the disk twice.
    Raises ValueError for an address and for a folder that exists.
    """
    with processes.agreed():
        check_local(folder)
        if num < 1:
            raise ValueError(f"num: expected at least 1, got {num}")
        if processes.is_main and folder.exists():
            raise ValueError(f"{folder}: exists already, and nothing is overwritten; choose another folder (--out) or seed (--seed)")
    with hidden(folder, processes) as temporary:
        _write_shares(stored, temporary, num, seed, processes)
        with processes.agreed():
            if processes.is_main:
                first = joint_generations(stored.objective, min(num, SHOWN), seed=seed)
                _put_together(temporary, first, num, processes.world)
                figures.joint_grid(temporary / "draws.png", stored.manifest.fields, first)
                temporary.rename(folder)
    return [folder / "draws.png", folder / "draws.safetensors"]


def _write_shares(stored: Stored, folder: Path, num: int, seed: int, processes: Processes) -> None:
    """The bytes of this rank's rows, a file for each modality."""
    shares = processes.shares(-(-num // CHUNK))
    for turn in range(len(shares[0])):
        with processes.agreed():
            for number in shares[processes.rank][turn : turn + 1]:
                first = number * CHUNK
                draws = joint_generations(stored.objective, min(CHUNK, num - first), seed=seed, first=first)
                for name, x in draws.items():
                    with _share(folder, name, processes.rank).open("ab") as file:
                        file.write(x.contiguous().numpy().tobytes())


def _put_together(folder: Path, like: dict[str, Tensor], num: int, world: int) -> None:
    """All shares as one file of the kind that `safetensors` writes: eight bytes that tell the header's size, header, tensors."""
    empty = save({name: x[:0].contiguous() for name, x in like.items()})  # its header has names, types and shapes in the library's order
    header, end = json.loads(empty[8:]), 0
    for name, entry in header.items():
        begin, end = end, end + num * like[name][0].numel() * like[name].element_size()
        entry |= {"shape": [num, *entry["shape"][1:]], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "draws.safetensors").open("wb") as whole:
        whole.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for share in (_share(folder, name, rank) for rank in range(world)):
                if share.is_file():
                    with share.open("rb") as file:
                        shutil.copyfileobj(file, whole, 2**20)
                    share.unlink()
        assert whole.tell() == 8 + len(text) + end, "a share of the draws is missing"


def _share(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank:05d}.raw"
