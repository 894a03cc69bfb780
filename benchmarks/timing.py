"""How a call's time and memory are taken, on a CPU and on a CUDA device: calls in turn, medians, a cold cache, random data.

CUDA, every call: an event pair around one call behind a kernel that overwrites the L2 cache. That kernel keeps the device busy while the
host enqueues, so the pair holds the call and whatever gaps its own launches leave. Calls under 100 us, or ones that the host cannot enqueue
in time, are also captured into one graph of many calls, each on its own copy of the inputs, behind one flush: cold, and without gaps.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Call = Callable[[], Any]
SECONDS = 4.0  # on one call in one mode, beyond which it is timed less often than was asked (but three times)
SHORT = 1e-3  # seconds: shorter calls on a CPU are timed several in a row
MANY = 20  # calls in a graph
ROOM = 8 << 30  # bytes: a form that needs more on a CPU is not worth the minutes that its pages take


class Times(NamedTuple):
    """Percentiles of one call in ms; `cpu` is processor time in ms (CPU), `host` the microseconds to enqueue it (CUDA)."""

    p20: float
    p50: float
    p80: float
    samples: int
    cpu: float | None = None
    host: float | None = None


def times(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, Times]:
    """Time of each call, taken in turn so that drift hits all alike. Calls are made once before they are timed."""
    return _cuda_times(calls, repeats) if device.type == "cuda" else _cpu_times(calls, repeats)


def rounds(seconds: float, repeats: int) -> int:
    """How often a call that takes so long is timed."""
    return max(min(repeats, int(SECONDS / max(seconds, 1e-9))), min(repeats, 3))


def seconds(call: Call) -> float:
    """Of one call, the device's work included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the CUDA device where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- CPU ---------------------------------------------------------------------------------------------------------------------------------


def _cpu_times(calls: Mapping[str, Call], repeats: int) -> dict[str, Times]:
    first = {name: seconds(call) for name, call in calls.items()}
    inner = {name: math.ceil(SHORT / max(first[name], SHORT / 1000)) for name in calls}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn < rounds(first[name], repeats):
                found[name].append(_cpu_sample(call, inner[name]))
    return {name: _summary([wall for wall, _ in pairs], cpu=float(np.median([cpu for _, cpu in pairs]))) for name, pairs in found.items()}


def _cpu_sample(call: Call, inner: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(inner):
        call()
    return 1e3 * (time.perf_counter() - wall) / inner, 1e3 * (time.process_time() - cpu) / inner


def _summary(samples: Sequence[float], **more: float) -> Times:
    low, middle, high = np.percentile(samples, [20, 50, 80])
    return Times(float(low), float(middle), float(high), len(samples), **more)


# ---- CUDA --------------------------------------------------------------------------------------------------------------------------------


def _cuda_times(calls: Mapping[str, Call], repeats: int) -> dict[str, Times]:
    flush = flusher()
    number = {name: rounds(seconds(call), repeats) for name, call in calls.items()}
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn < number[name]:
                flush()
                pairs[name].append(_events(call))
    torch.cuda.synchronize()
    found = {name: [start.elapsed_time(end) for start, end in events] for name, events in pairs.items()}
    return {name: _summary(found[name], host=_host(call, number[name])) for name, call in calls.items()}


def _events(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    return start, end


def _host(call: Call, repeats: int) -> float:
    """Median microseconds until the call returns, begun on an idle device: what enqueueing costs."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return float(np.median(found))


def flusher() -> Call:
    """A call that leaves nothing of earlier calls in the L2 cache: it overwrites four times its size."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size or 64 << 20
    return torch.empty(4 * size, dtype=torch.int8, device="cuda").zero_


def captured(builds: Sequence[Callable[[], Call]]) -> Call:
    """The replay of one CUDA graph of calls. Each is built on the graph's stream: a backward pass runs on that of its forward pass."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = [build() for build in builds]
        for _ in range(3):  # whatever is compiled or allocated at a first call
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]  # all kept: were an output's memory reused, the next call would write to a warm cache

    def replay(held: Any = (calls, results)) -> None:
        graph.replay()

    return replay


def device_ms(builds: Sequence[Callable[[], Call]], repeats: int) -> float:
    """Median time of one call, with no gap between its launches: a graph of all the builds behind one flush, by their number."""
    replay, flush = captured(builds), flusher()
    replay()
    pairs = []
    for _ in range(repeats):
        flush()
        pairs.append(_events(replay))
    torch.cuda.synchronize()
    return float(np.median([start.elapsed_time(end) for start, end in pairs])) / len(builds)


# ---- memory and bandwidth ----------------------------------------------------------------------------------------------------------------


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most that one call holds at a time beyond what was there before: outputs, what is saved, and temporaries.

    CUDA: the caching allocator's own peak. CPU: the largest running sum of the allocations and frees that PyTorch's profiler reports for
    every tensor storage, inside operators too and to the byte; what a maths library allocates for itself is not in it.
    """
    if device.type == "cuda":
        return _cuda_peak(call)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines about itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        held = call()
    del held
    results = profile.profiler.kineto_results if profile.profiler else None
    events = [event for event in results.events() if event.name() == "[memory]"] if results else []
    steps = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore[attr-defined]  # not in its stub
    return int(max(np.cumsum([0, *steps])))


def _cuda_peak(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = call()
    torch.cuda.synchronize()
    del held
    return torch.cuda.max_memory_allocated() - before


def fail_before_the_kernel_kills() -> None:
    """On Linux, let allocations fail as errors beyond 8 GiB, or what is free: that costs one provider its row and not the run."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    free = 1024 * _kilobytes("/proc/meminfo", "MemAvailable:")
    held = 1024 * _kilobytes("/proc/self/status", "VmData:")
    resource.setrlimit(resource.RLIMIT_DATA, (held + min(ROOM, int(0.9 * free)), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _kilobytes(path: str, name: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of one large copy on this device, bytes read plus bytes written: the ceiling that streaming calls are held against."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source).fill_(1.0)  # its pages exist before the clock runs
    found = times({"copy": lambda: target.copy_(source)}, device, 15)["copy"]
    return 2 * size / 1e6 / found.p50
