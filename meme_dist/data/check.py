"""`meme-dist shards check`: read every byte of a folder of shards again and say all that is wrong with it."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from webdataset.tariterators import tar_file_iterator

from meme_dist.data.fields import Field, member_name
from meme_dist.data.files import Shard, file_sha256
from meme_dist.data.index import MANIFEST, TAR_BLOCK, Index, Manifest, padded
from meme_dist.data.names import FEATURES, feature_names, row_names

MOST_PROBLEMS = 20  # of one shard; a cut tar would list every row after the cut
ROWS_AT_ONCE = 64  # members decoded together


class Problem(NamedTuple):
    """One thing that is not as the index says, and where."""

    shard: str
    row: str | None
    modality: str | None
    message: str

    def __str__(self) -> str:
        places = [self.shard, self.row and f"row {self.row}", self.modality and f"modality {self.modality}"]
        return f"{', '.join(place for place in places if place)}: {self.message}"


class Report(NamedTuple):
    """What `check_shards` read, and every problem that it found."""

    rows: int
    shards: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "no problem" if self.ok else f"{len(self.problems)} problems"
        return "\n".join([f"{self.rows} rows in {self.shards} shards: {verdict}", *map(str, self.problems)])


def check_shards(folder: Path | str) -> Report:
    """Compare all shards of a folder with its manifest and index: members, sizes, checksums, and that every datum decodes.

    Nothing is raised for damage: a manifest or an index that cannot be trusted is a problem of its own.
    """
    try:
        manifest = Manifest.load(folder)
    except ValueError as error:
        return Report(0, 0, (Problem(MANIFEST, None, None, str(error)),))
    reports = [_check(part, f"{part.folder}/" if manifest.parts else "") for part in manifest.parts or (manifest,)]
    return Report(
        sum(report.rows for report in reports),
        sum(report.shards for report in reports),
        tuple(problem for report in reports for problem in report.problems),
    )


def _check(manifest: Manifest, prefix: str) -> Report:
    """The report of one folder, which `prefix` names where there are several."""
    rows, shards, problems = 0, 0, []
    for split, entry in manifest.splits.items():
        try:
            index = manifest.index(split)
        except ValueError as error:
            problems.append(Problem(entry.index_file, None, None, str(error)))
            continue
        problems += _unreadable(entry.names_file, lambda split=split: row_names(manifest, split))
        rows, shards = rows + entry.rows, shards + len(entry.shards)
        for shard, start in zip(entry.shards, shard_starts(manifest, split)[:-1], strict=True):
            problems += scan_shard(manifest, index, shard, int(start))
    problems += _unreadable(FEATURES, lambda: feature_names(manifest))
    return Report(rows, shards, tuple(problem._replace(shard=prefix + problem.shard) for problem in problems))


def _unreadable(file: str, read: Callable[[], Any]) -> list[Problem]:
    """What is wrong with a file that is read whole."""
    try:
        read()
    except ValueError as error:
        return [Problem(file, None, None, str(error))]
    return []


def scan_shard(manifest: Manifest, index: Index, shard: Shard, start: int) -> list[Problem]:
    """The problems of one shard, the most telling first: webdataset reads the tar, the index says what it had to find.

    `start` is its first row, which the caller knows: found here, a folder would cost the square of its shards. Checksums and contents are
    looked at as far as members stand in their places; behind that, each would only repeat that it does not.
    """
    with manifest.copy(shard) as path:
        if path is None:
            return [Problem(shard.file, None, None, f"expected a file of {shard.bytes} bytes, found none")]
        return _scan(manifest, index, shard, start, path)


def _scan(manifest: Manifest, index: Index, shard: Shard, start: int, path: Path) -> list[Problem]:
    expected = sorted(_expected(manifest, index, range(start, start + shard.rows)), key=lambda member: member.offset)
    problems, in_place = _compare_members(shard, expected, path)
    problems += _compare_bytes(manifest, shard, expected[:in_place], path)
    if len(problems) > MOST_PROBLEMS:
        more = Problem(shard.file, None, None, f"and {len(problems) - MOST_PROBLEMS} more members that are not as the index says")
        problems = [*problems[:MOST_PROBLEMS], more]
    if (size := path.stat().st_size) != shard.bytes:
        problems.append(Problem(shard.file, None, None, f"expected a file of {shard.bytes} bytes, got {size}"))
    elif not problems and (found := file_sha256(path)) != shard.sha256:
        problems.append(Problem(shard.file, None, None, f"expected sha256 {shard.sha256}, got {found}: bytes between members were changed"))
    return problems


class _Member(NamedTuple):
    row: str
    modality: str
    name: str
    offset: int
    size: int
    crc: int


def _expected(manifest: Manifest, index: Index, rows: range) -> Iterator[_Member]:
    for row in rows:
        record, key = index.span(row, row + 1)[0], index.key(row)
        for column, (modality, field) in enumerate(manifest.fields.items()):
            if (size := int(record["size"][column])) >= 0:
                name = member_name(key, modality, field)
                yield _Member(key, modality, name, int(record["offset"][column]), size, int(record["crc"][column]))


def _compare_members(shard: Shard, expected: list[_Member], path: Path) -> tuple[list[Problem], int]:
    """Names and sizes, and how many members stand in their places. Contents are not interpreted here, whatever a name promises."""
    found: dict[str, int] = {}
    problems, in_place, failure = [], 0, "none"
    wanted = {member.name: member for member in expected}
    try:
        with path.open("rb") as file:
            for item in tar_file_iterator(cast(Any, file), skip_meta=None):  # its annotation is wrong: it opens the tar itself
                name, size = item["fname"], len(item["data"])
                if name in found or name not in wanted:
                    again = " a second time" if name in found else ""
                    row, _, modality = name.partition(".")
                    message = f"expected no member {name!r}{again}, got {size} bytes"
                    problems.append(Problem(shard.file, row, modality.split(".")[0] or None, message))
                elif in_place == len(found) and (expected[in_place].name, expected[in_place].size) == (name, size):
                    in_place += 1
                found[name] = size
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        failure = f"a tar that ends or breaks here ({error})"
    for member in expected:
        if (size := found.get(member.name)) != member.size:
            got = failure if size is None else f"{size} bytes"
            problems.append(Problem(shard.file, member.row, member.modality, f"expected {member.name!r} of {member.size} bytes, got {got}"))
    return problems, in_place


def _compare_bytes(manifest: Manifest, shard: Shard, expected: list[_Member], path: Path) -> Iterator[Problem]:
    """Checksums, and that each datum decodes to what its field promises."""
    with path.open("rb") as file:
        for start in range(0, len(expected), ROWS_AT_ONCE):
            intact: dict[str, list[tuple[_Member, bytes]]] = {name: [] for name in manifest.fields}
            for member in expected[start : start + ROWS_AT_ONCE]:
                file.seek(member.offset - TAR_BLOCK)
                data = file.read(TAR_BLOCK + padded(member.size))
                if (crc := zlib.crc32(data)) == member.crc:
                    intact[member.modality].append((member, data[TAR_BLOCK : TAR_BLOCK + member.size]))
                else:
                    message = f"expected {member.name!r} of {member.size} bytes with checksum {member.crc:08x}, got checksum {crc:08x}"
                    yield Problem(shard.file, member.row, member.modality, message)
            for name, members in intact.items():
                yield from _undecodable(manifest.fields[name], shard, members)


def _undecodable(field: Field, shard: Shard, members: list[tuple[_Member, bytes]]) -> Iterator[Problem]:
    try:
        field.decode_rows([data for _, data in members])
        return
    except ValueError:
        pass  # now one by one, to say which
    for member, data in members:
        try:
            field.decode(data)
        except ValueError as error:
            yield Problem(shard.file, member.row, member.modality, str(error))


def first_problem(manifest: Manifest, split: str, index: Index, number: int) -> str:
    """The most telling problem of a shard, in words: for the error of whoever stumbled over it."""
    shard = manifest.shards(split)[number]
    problems = scan_shard(manifest, index, shard, int(shard_starts(manifest, split)[number]))
    return str(problems[0]) if problems else f"{shard.file}: it changed while it was read"


def shard_starts(manifest: Manifest, split: str) -> np.ndarray:
    """First row of each shard, and at the end the number of rows."""
    return np.cumsum([0, *(shard.rows for shard in manifest.shards(split))])
