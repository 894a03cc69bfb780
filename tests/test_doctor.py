"""What keeps several processes from training together is found, named and comes with what to do about it."""

import os
import resource
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

from meme_dist import doctor
from meme_dist.doctor import Finding, examine


def found(what: str) -> list[Finding]:
    return [finding for finding in examine(Path("runs")) if finding.what == what]


def test_everything_wrong_or_noted_comes_with_advice() -> None:
    assert [finding for finding in examine(Path("runs")) if finding.status != "ok" and not finding.advice] == []


def test_looking_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))

    def state() -> list[tuple[str, int, int]]:
        return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*"))

    before = state()
    examine(tmp_path / "runs")
    assert state() == before


@pytest.mark.parametrize(("minutes", "status"), [(1, []), (30, ["wrong"])])
def test_a_stale_lock_of_a_build_is_named_with_the_command_that_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, status: list[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, time.time() - 60 * minutes))
    findings = found("lock of a build")
    assert [finding.status for finding in findings] == status
    assert all(f"rm '{lock}'" in finding.advice and "30 minutes" in finding.found for finding in findings)


def test_without_a_folder_for_extensions_there_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert found("lock of a build") == []
    (tmp_path / "torch_extensions" / "op").mkdir(parents=True)
    lock = tmp_path / "torch_extensions" / "op" / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    assert len(found("lock of a build")) == 1


def test_a_port_that_is_taken_and_one_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        (taken,) = found("port")
        assert taken.status == "note" and str(port) in taken.found and "--main_process_port 0" in taken.advice
    (free,) = found("port")
    assert free == Finding("ok", "port", f"{port} is free")
    for asked in ("99999", "http"):
        monkeypatch.setenv("MASTER_PORT", asked)
        assert found("port")[0].status == "wrong" and asked in found("port")[0].found


def test_little_shared_memory_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor, "SHARED", tmp_path)
    monkeypatch.setattr(doctor, "ENOUGH_SHARED", usage.free / 2**30 / 2)
    assert found("shared memory")[0].status == "ok"
    monkeypatch.setattr(doctor, "ENOUGH_SHARED", usage.free / 2**30 * 2)
    assert found("shared memory")[0].status == "note" and "--shm-size" in found("shared memory")[0].advice
    monkeypatch.setattr(doctor, "SHARED", tmp_path / "none")
    assert found("shared memory")[0].status == "note" and "--workers 0" in found("shared memory")[0].advice


@pytest.mark.parametrize(("limit", "status"), [(1024, "note"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_a_low_limit_of_open_files_is_noted(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit) if what == resource.RLIMIT_NOFILE else (0, 0))
    (finding,) = found("open files")
    assert finding.status == status and ("ulimit -n" in finding.advice) == (status == "note")


def test_an_interface_that_is_not_there_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    (finding,) = found("network interface")
    assert finding.status == "wrong" and finding.found.endswith("no ib7") and "lo" in finding.advice
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert found("network interface")[0].status == "ok"


def test_a_machine_whose_name_has_no_address_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere.invalid")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: (_ for _ in ()).throw(socket.gaierror(-2, "unknown")))
    (finding,) = found("network interface")
    assert finding.status == "note" and "nowhere.invalid" in finding.found and "GLOO_SOCKET_IFNAME=lo" in finding.advice


@pytest.mark.parametrize(
    ("asked", "there", "seen", "status", "part"),
    [
        (None, 0, 0, [], ""),
        (None, 4, 4, ["ok"], "4 of 4"),
        ("0,1", 4, 2, ["ok"], "2 of 4"),
        (None, 4, 0, ["wrong"], "the driver lists 4, torch sees 0"),
        ("0,9", 4, 1, ["wrong"], "CUDA_VISIBLE_DEVICES=0,9, torch sees 1"),
        ("", 4, 0, [], ""),  # none is asked for
        ("-1", 4, 0, [], ""),  # nor here
        ("0,-1,1", 4, 1, ["ok"], "1 of 4"),  # CUDA reads no further than the first -1
    ],
)
def test_gpus_that_torch_does_not_see_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, there: int, seen: int, status: list[str], part: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if asked is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    for number in range(there):
        (tmp_path / f"0000:{number:02d}:00.0").mkdir()
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setattr(doctor, "_count_devices", lambda: seen)
    findings = list(doctor._visible())
    assert [finding.status for finding in findings] == status
    assert all(part in finding.found for finding in findings)


def test_what_offloading_cannot_compile_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    monkeypatch.setattr(doctor, "_count_devices", lambda: 2)
    (finding,) = doctor._offload()
    assert finding.status == "note" and finding.found == "lacks ninja, nvcc" and "CUDA_HOME" in finding.advice
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert [finding.status for finding in doctor._offload()] == ["ok"]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert list(doctor._offload()) == []  # DeepSpeed itself is missing: that is said elsewhere


def test_collectives_are_those_of_this_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {finding.what: finding for finding in doctor._collectives()}
    assert kinds["collectives between CPUs"].status == "ok"
    assert ("collectives between GPUs" in kinds) == torch.distributed.is_nccl_available()
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, status in ((1, "note"), (2, "wrong")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert next(doctor._collectives()).status == status
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert [finding.status for finding in doctor._collectives()] == ["wrong"]
