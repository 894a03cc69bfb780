"""Rows that cannot be read, within a budget: each is named, and another row of the split stands in its place.

Which one is a pure function of (seed, row): the place in the stream is taken, nothing behind it shifts, and every number of ranks and
workers reads the same rows. Nothing of a damaged row is used, so none can pass for a row with a missing modality.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from meme_dist.data.check import Problem
from meme_dist.data.collate import Part, decode
from meme_dist.data.reader import Raw, Reader

TRIES = 64  # rows that are tried in the place of one


def decode_intact(
    reader: Reader, rows: Sequence[int], found: Sequence[Raw | Problem], seed: int, out: Mapping[str, Tensor] | None = None
) -> Part:
    """`decode` with substitutes in the places of damaged rows; `Part.damaged` names these, in row order.

    Raises ValueError where no intact row is found for a damaged one.
    """
    problems = {place: members for place, members in enumerate(found) if isinstance(members, Problem)}
    try:
        part = decode(reader, *_replaced(reader, rows, found, problems, seed), out)
    except ValueError:  # a datum that its field refuses, or no substitute: then the second time says so
        problems |= {place: problem for place, row in enumerate(rows) if (problem := _refused(reader, row, found[place]))}
        part = decode(reader, *_replaced(reader, rows, found, problems, seed), out)
    return part._replace(damaged=tuple(problems[place] for place in sorted(problems)))


def _replaced(
    reader: Reader, rows: Sequence[int], found: Sequence[Raw | Problem], problems: Mapping[int, Problem], seed: int
) -> tuple[list[int], list[Raw]]:
    pairs = []
    for place, (row, members) in enumerate(zip(rows, found, strict=True)):
        pairs.append(_substitute(reader, row, seed) if place in problems or isinstance(members, Problem) else (row, members))
    return [row for row, _ in pairs], [members for _, members in pairs]


def _substitute(reader: Reader, row: int, seed: int) -> tuple[int, Raw]:
    for attempt in range(TRIES):
        key = repr((seed, "substitute", row, attempt))
        other = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") % reader.rows
        members = reader.attempt(np.array([other]))[0]
        if other != row and not isinstance(members, Problem) and _refused(reader, other, members) is None:
            return other, members
    raise ValueError(f"{reader.place(row)}: it is damaged, and so are {TRIES} rows that were tried in its place; write the shards again")


def _refused(reader: Reader, row: int, members: Raw | Problem) -> Problem | None:
    """What is wrong with a datum of a row whose bytes are as they were written."""
    if isinstance(members, Problem):
        return members
    for (name, field), member in zip(reader.manifest.fields.items(), members, strict=True):
        try:
            if member is not None:
                field.decode(member)
        except ValueError as error:
            return reader.problem(row, name, str(error))
    return None
