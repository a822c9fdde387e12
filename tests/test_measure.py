"""bench/measure.py: who is timed when, and what counts, by a clock that we set."""

import json
import math
from contextlib import nullcontext

import bench_package  # noqa: F401
import pytest
import torch

from bench.measure import (
    Block,
    CpuTimer,
    CudaTimer,
    Prepared,
    Run,
    append,
    commit,
    fingerprint,
    measure,
    percentile,
    summarise,
)

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class FakeTimer:
    """Every run takes what it returns; canaries take what the list says, 1 ms after its end."""

    def __init__(self, canaries=()):
        self.canaries, self.log = list(canaries), []

    def session(self):
        return nullcontext()

    def prepare(self, make, copies):
        return Prepared([make(i) for i in range(copies)], graph=True)

    def block(self, runs):
        times = [run.call() for run in runs]
        self.log.append(times)
        return times

    def canary(self):
        self.log.append("canary")
        return self.canaries.pop(0) if self.canaries else 1.0


def contender(ms, names, name):
    """Its run on copy i takes ms + i / 10, and is written down as the name and the copy."""

    def make(i):
        def call():
            names.append(f"{name}{i}")
            return ms + i / 10

        return Run(call)

    return make


def test_contenders_take_turns_with_a_canary_between_blocks():
    """Two pilot runs each on copy 0; then A B A B, rotating over the copies from block to block."""
    names = []
    timer = FakeTimer()
    contenders = {name: contender(1.0, names, name) for name in "ab"}
    measure(contenders, CPU, copies=2, blocks=2, runs=3, timer=timer)
    assert names[:4] == ["a0", "a0", "b0", "b0"]
    assert names[4:] == "a0 a1 a0 b0 b1 b0 a1 a0 a1 b1 b0 b1".split()
    kinds = ["canary" if entry == "canary" else "block" for entry in timer.log[2:]]
    assert kinds == ["canary"] + ["block", "canary"] * 4


def test_a_block_beside_a_slow_canary_is_thrown_away_and_counted():
    """The third canary stands after b's first block and before a's second: both go."""
    contenders = {name: contender(1.0, [], name) for name in "ab"}
    timer = FakeTimer([1.0, 1.0, 1.5, 1.0, 1.0, 1.0, 1.4])
    timings = measure(contenders, CPU, copies=1, blocks=3, runs=3, timer=timer)
    for timing in timings.values():
        assert (timing.blocks, timing.thrown_away, timing.runs) == (3, 1, 6)
        assert timing.trusted


def test_times_of_thrown_blocks_do_not_count():
    blocks = [Block([9.0, 9.0], 2.0), Block([1.0, 2.0], 1.0), Block([3.0], 1.0)]
    timing = summarise(blocks, 1.5, Prepared([]))
    assert (timing.p50, timing.runs, timing.thrown_away) == (2.0, 3, 1)


@pytest.mark.parametrize(("good", "trusted"), [(0, False), (1, False), (2, True), (4, True)])
def test_a_result_says_when_most_blocks_were_thrown_away(good, trusted):
    """Without a single good one, all are counted, and the result is not trusted."""
    blocks = [Block([float(i)], 1.0 if i < good else 9.0) for i in range(4)]
    timing = summarise(blocks, 1.5, Prepared([]))
    assert timing.trusted == trusted
    assert timing.thrown_away == 4 - good
    assert timing.runs == (good or 4)


def test_percentiles_lie_between_the_nearest_values():
    assert [percentile([4.0, 1.0, 2.0, 3.0, 5.0], share) for share in (0, 0.2, 0.5, 1)] == [
        *(1.0, 1.8, 3.0, 5.0),
    ]
    assert percentile([7.0], 0.8) == 7.0


def test_slow_runs_make_short_blocks():
    """As many as fit the time of a block, three at least."""
    contenders = {str(ms): contender(ms, [], "") for ms in (1.0, 10.0, 100.0)}
    timings = measure(contenders, CPU, copies=1, blocks=1, runs=20, block_ms=50, timer=FakeTimer())
    assert [timing.runs for timing in timings.values()] == [20, 5, 3]


def test_one_that_raises_is_reported_and_the_others_are_timed():
    def broken(i):
        raise ValueError("no kernel\nfor this")

    timings = measure({"a": broken, "b": contender(1.0, [], "b")}, CPU, timer=FakeTimer())
    assert timings["a"].error == "ValueError: no kernel"
    assert math.isnan(timings["a"].p50)
    assert not timings["a"].trusted
    assert not timings["b"].error
    assert list(timings) == ["a", "b"]


def test_the_cpu_timer_times_the_call_alone():
    """The clock stands still in reset and flush; a reset comes before every call."""
    now, log = [0.0], []

    def call():
        log.append("call")
        now[0] += 0.002

    timer = CpuTimer(clock=lambda: now[0], flush_bytes=16)
    timer.buffer.zero_()
    times = timer.block([Run(call, reset=lambda: log.append("reset"))] * 2)
    assert times == pytest.approx([2.0, 2.0])
    assert log == ["reset", "call"] * 2
    assert timer.buffer.all()  # written through


def test_on_a_cpu_real_work_is_timed():
    """Eight times the work takes longer, and a run is not a graph."""
    matrices = torch.randn(2, 64, 64), torch.randn(2, 512, 512)
    contenders = {str(m.shape[-1]): lambda i, m=m: Run(lambda: m[i] @ m[i]) for m in matrices}
    timer = CpuTimer(flush_bytes=2**20)
    timings = measure(contenders, CPU, copies=2, blocks=2, runs=5, timer=timer)
    assert 0 < timings["64"].p20 <= timings["64"].p50 <= timings["64"].p80
    assert timings["64"].p50 < timings["512"].p50
    assert (timings["64"].graph, timings["64"].reason) == (False, "on a CPU")


@gpu
def test_on_a_gpu_a_run_is_a_graph_unless_it_waits_for_the_device():
    device = torch.device("cuda")
    x = torch.randn(2, 2**20, device=device)
    contenders = {
        "graph": lambda i: Run(lambda: x[i].softmax(0)),
        "waits": lambda i: Run(lambda: x[i].sum().item()),
        "after": lambda i: Run(lambda: x[i].softmax(0)),
    }
    timings = measure(contenders, device, copies=2, timer=CudaTimer(device))
    assert [t.graph for t in timings.values()] == [True, False, True]
    assert timings["waits"].reason
    assert all(t.p50 > 0 for t in timings.values())


@gpu
def test_on_a_gpu_backward_alone_is_a_graph():
    """Its forward ran before the capture, on the same stream."""

    def make(i):
        x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
        y = x.softmax(-1)
        return Run(lambda: torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True))

    assert measure({"backward": make}, torch.device("cuda"))["backward"].graph


def test_results_are_whole_lines(tmp_path):
    """In a folder that need not exist; what is no number is refused before a byte is written."""
    path = tmp_path / "results" / "x.jsonl"
    append(path, {"a": 1})
    append(path, {"b": "line\nend"})
    with pytest.raises(ValueError, match="JSON"):
        append(path, {"c": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"a": 1}, {"b": "line\nend"}),
    ]


def test_a_fingerprint_names_machine_versions_and_commit(monkeypatch):
    facts = fingerprint(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["utc"].endswith("Z")
    assert {"commit", "cpu", "cores", "triton", "python"} <= set(facts)
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert commit() == "abc1234"
