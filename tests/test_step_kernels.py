"""bench/step_kernels.py: on a CPU, operator by operator; each takes its own time, and all of it."""

import json
import sys

import bench_package  # noqa: F401
import pytest
import torch

from bench import step_kernels
from bench.step_kernels import STEPS, WARM_UP, files_of_kernels, profile_steps

CPU = torch.device("cpu")


def test_each_operator_is_counted_by_the_step():
    """Three products of a step, and none of those before; the second operator calls others, whose
    time is not in its own."""
    x = torch.ones(300, 300)

    def steps():
        for i in range(WARM_UP + STEPS):
            if i < WARM_UP:
                torch.exp(x)
            with torch.profiler.record_function("Optimizer.step#AdamW.step"):
                yield [x @ x for _ in range(3)]

    rows = {row["kernel"]: row for row in profile_steps(steps(), CPU)}
    assert rows["aten::mm"]["launches"] == 3
    assert "aten::exp" not in rows
    assert not any("#" in name for name in rows)
    assert rows["aten::matmul"]["ms"] < rows["aten::mm"]["ms"]
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    times = [row["ms"] for row in rows.values()]
    assert times == sorted(times, reverse=True)


def test_kernels_of_one_name_are_named_after_all_their_files():
    files = files_of_kernels()
    assert files["_forward_kernel"] == ["attention", "embed"]
    assert files["_dq_kernel"] == ["attention_backward"]


def test_a_workload_is_trained_and_written_down(monkeypatch, tmp_path, capsys):
    """A line for each operator, with what the machine is; the last line printed is JSON."""
    out = tmp_path / "rows.jsonl"
    flags = ["--workload", "tiny short", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["step_kernels", *flags])
    step_kernels.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    total = json.loads(capsys.readouterr().out.splitlines()[-1])["tiny short"]
    assert sum(row["ms"] for row in rows) == pytest.approx(total)
    assert {"aten::mm", "aten::_fused_adamw_"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert (row["bench"], row["workload"]) == ("step_kernels", "tiny short")
        assert {"utc", "commit", "cpu", "torch"} <= row.keys()


@pytest.mark.parametrize("workload", ["tiny", "huge short", "tiny novel"])
def test_an_unknown_workload_is_refused(workload):
    with pytest.raises(SystemExit, match=f"expected --workload of .*{workload!r}"):
        step_kernels.steps_of(workload, CPU)
