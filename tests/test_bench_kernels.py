"""bench/kernels.py and its cases: only what is right is timed, and losses are shown like wins."""

import functools
import json
import math
import sys

import bench_package  # noqa: F401
import pytest
import torch

import minift.kernels.cross_entropy
from bench import cases, kernels, operations, optimizers
from bench.ceilings import Ceilings
from bench.kernels import Verdict, check, rows_of, summarise, table, worst_error
from bench.measure import Run, Timing
from bench.operations import BF16, FP32, Absent, Case, Inputs, forward
from minift.kernels.cross_entropy import cross_entropy_ref

CPU = torch.device("cpu")
QUICK = cases.quick_cases(CPU)
H200 = Ceilings(4.3e12, 790e12, 4.8e12, 989e12)


def case_of(op: str, kind: str, shape: str = "") -> Case:
    return next(c for c in QUICK if c.op == op and c.kind == kind and shape in c.shape)


@pytest.mark.parametrize("case", QUICK, ids=lambda c: f"{c.op} {c.kind} {c.shape}")
def test_every_contender_is_right_or_says_why_it_is_absent(case):
    """The small shapes of all operations, and ours among them as soon as it is there."""
    case.ways.pop("torch.compile", None)
    for name, verdict in check(case, case.inputs()).items():
        assert verdict.status in ("right", "absent"), (name, verdict)
        assert verdict.status == "right" or verdict.reason
        assert name not in ("definition", "torch", "torch fused") or verdict.status == "right"


def altered(case: Case, way, name="ours") -> Verdict:
    """What becomes of a contender that computes so."""
    changed = Case(**{**vars(case), "ways": {"definition": case.ways["definition"], name: way}})
    return check(changed, changed.inputs())[name]


def scaled(way, factor):
    """A contender whose results are wrong by a factor."""

    def wrong(inputs):
        run = way(inputs)
        return Run(lambda: tuple(y * factor for y in run.call()))

    return wrong


@pytest.mark.parametrize("factor", [1.05, 0.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("op", "kind"),
    [("cross_entropy", "forward"), ("cross_entropy", "backward"), ("adamw", "step"),
     ("cross_entropy", "forward+gradient"), ("attention", "backward"), ("add_norm", "forward"),
     ("bias_gelu", "backward"), ("embed", "backward"),
     ("linear_cross_entropy", "forward+gradient")],
)  # fmt: skip
def test_a_wrong_contender_is_found(op, kind, factor):
    case = case_of(op, kind)
    verdict = altered(case, scaled(case.ways["definition"], factor))
    assert verdict.status == "wrong"
    assert "of what is allowed" in verdict.reason
    assert verdict.error is None or verdict.error > 1


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("mistake", ["no clipping", "one step of two", "another's gradient"])
def test_a_wrong_optimizer_is_found(dtype, mistake, monkeypatch):
    """Also in bf16, where a small step would not show."""
    case = optimizers.adamw("a tiny BERT", dtype, CPU)
    right = optimizers.by_torch(fused=True)

    def wrong(inputs):
        if mistake == "another's gradient":
            inputs = Inputs(inputs.leaves, tuple(g.roll(1, 0) for g in inputs.upstream))
        run = right(inputs)
        return Run(functools.cache(run.call), run.reset) if mistake == "one step of two" else run

    assert altered(case, right).status == "right"
    if mistake == "no clipping":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: None)
    assert altered(case, wrong).status == "wrong"


def test_ids_of_embed_are_like_text():
    """Positions start again where a sequence does, with one word; types are mostly 0; all tables
    have their rows."""
    words, positions, types = ids = operations.ids_like_text(4096, (300, 64, 2))
    assert all(i.min() >= 0 and i.max() < n for i, n in zip(ids, (300, 64, 2), strict=True))
    starts = (positions == 0).nonzero()[:, 0]
    assert 4096 / 64 <= len(starts) <= 4096 / 4
    assert (words[starts] == 0).all()
    assert (words[starts[1:] - 1] == 1).all()
    assert (positions[1:] - positions[:-1]).clamp(0).max() == 1
    assert 0 < types.float().mean() < 0.25
    assert words.bincount()[2] > 5 * words.bincount()[30]


def test_one_that_raises_and_one_that_is_absent_are_told_apart():
    def absent(inputs):
        raise Absent("not installed")

    def failed(inputs):
        raise RuntimeError("out of memory\nand more")

    case = case_of("bias_gelu", "forward")
    assert altered(case, absent) == Verdict("absent", "not installed")
    assert altered(case, failed) == Verdict("failed", "RuntimeError: out of memory")
    assert altered(case, forward(lambda x, b: x[:3])).status == "wrong"  # another shape


def test_a_case_whose_definition_fails_stops_no_other(monkeypatch):
    """Say for want of memory: then nobody can be judged."""
    case = case_of("bias_gelu", "forward")
    monkeypatch.setitem(case.ways, "definition", lambda inputs: 1 / 0)
    found = kernels.run_case(case, CPU, kernels.QUICK)
    assert found.keys() == case.ways.keys()
    for verdict, took in found.values():
        assert (verdict.status, took) == ("failed", None)
        assert verdict.reason == "definition: ZeroDivisionError: division by zero"
    rows = list(rows_of(case, found, H200, ""))
    assert summarise(rows)["failed"] == len(rows)


def test_allowed_is_twice_the_error_of_the_definition_and_one_ulp():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    same = (exact + torch.tensor([0.01, 0.0])).float()
    ulp = 4 * torch.finfo(FP32).eps
    off = torch.tensor([0.0, 0.02], dtype=torch.float64)
    assert worst_error([(exact + off)], [same], [exact]) == pytest.approx(1, abs=1e-4)
    assert worst_error([exact.float() + ulp], [exact.float()], [exact]) == pytest.approx(1)
    assert worst_error([exact.float() + ulp], [exact.float()], [exact], BF16) < 1e-4
    assert worst_error([exact * 0], [exact * 0], [exact * 0]) == 0.0


def test_a_peer_that_rounds_worse_is_timed_with_a_note():
    """A thousand times the allowed error; ours may have none of that."""
    assert kernels.judged("ours", 1.0).status == kernels.judged("torch", 9.0).status == "right"
    assert kernels.judged("ours", 1.01).status == kernels.judged("torch", 1001).status == "wrong"
    assert kernels.judged("torch", math.inf).status == "wrong"
    found = {"torch": (kernels.judged("torch", 9.0), timing(0.4))}
    assert "error 9.00 of what is allowed" in table(list(rows_of(CASE, found, H200, "")))


def in_place(logits, target, row_scale):
    """What a kernel that writes the gradient over the logits does."""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        loss = cross_entropy_ref(leaf, target)
        (row_scale * loss).sum().backward()
    logits.copy_(leaf.grad)
    return loss.detach()


def test_a_contender_that_writes_to_its_inputs_spoils_nobodys(monkeypatch):
    """Its copy is its own, and is put back before each run; rows stay apart as they were."""
    module = minift.kernels.cross_entropy
    monkeypatch.setattr(module, "cross_entropy_", in_place, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = next(c for c in operations.cross_entropy(9, 13, 16, CPU) if c.kind == "forward+gradient")
    inputs = case.inputs()
    before = inputs.copy()
    assert before.leaves[0].stride() == inputs.leaves[0].stride() == (16, 1)
    run = case.ways["ours"](inputs)
    first = [y.clone() for y in run.call()]
    run.reset()
    assert all(map(torch.equal, first, run.call()))
    assert torch.equal(inputs.leaves[0], before.leaves[0])
    assert altered(case, case.ways["ours"]).status == "right"


def test_a_kernel_that_is_not_there_yet_is_absent():
    with pytest.raises(Absent, match=r"minift\.kernels\.layout has no layout"):
        operations.kernel("layout")(torch.zeros(1))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("MiniLM", 22_713_986), ("GPT-2 124M", 124_439_808), ("BERT-large", 335_143_938)],
)
def test_shapes_are_those_of_the_models(model, parameters):
    """MiniLM: what its checkpoint has with a head for two labels."""
    assert sum(map(math.prod, optimizers.MODELS[model])) == parameters


def test_bytes_of_the_floor():
    """The logits in bf16 once for a loss, twice for a gradient; 30 bytes a parameter."""
    found = {c.kind: c.bytes for c in operations.cross_entropy(8192, 30522, 30528, CPU)}
    logits = 2 * 8192 * 30522
    assert found == {"forward": logits, "backward": 2 * logits, "forward+gradient": 2 * logits}
    assert H200.floor_ms(2 * logits, 0, nominal=True) == pytest.approx(0.2083, abs=1e-4)
    step = optimizers.adamw("GPT-2 124M", BF16, CPU)
    assert step.bytes == 30 * 124_439_808
    assert optimizers.adamw("GPT-2 124M", FP32, CPU).bytes == 32 * 124_439_808


def test_flops_and_bytes_of_a_projection():
    """Three products; x, dx, W and dW once. The targets are those of an H200."""
    found = cases.projection_cases(CPU)
    assert [c.flops for c in found] == [6 * 512 * 768 * 50257, 6 * 2048 * 384 * 8192]
    assert found[0].bytes == 4 * 768 * (512 + 50257)


def test_targets_are_of_a_pass():
    found = operations.bias_gelu(4, 8, CPU, {"backward": {"H200": 0.5}})
    assert [(c.kind, c.target_ms) for c in found] == [("forward", {}), ("backward", {"H200": 0.5})]


@pytest.mark.parametrize("extra", [None, 466.4])
def test_memory_is_noted_where_it_was_measured(extra):
    found = {"ours": (Verdict("right", error=0.5, extra_mib=extra), timing(0.2))}
    rows = list(rows_of(CASE, found, H200, ""))
    assert rows[0]["extra_mib"] == extra
    assert ("466 MiB" in table(rows)) == (extra is not None)


def test_floor_is_the_slower_of_bytes_and_flops():
    assert H200.floor_ms(43 * 10**9, 0) == pytest.approx(10)
    assert H200.floor_ms(43 * 10**9, 79 * 10**11) == pytest.approx(10)
    assert H200.floor_ms(43 * 10**9, 79 * 10**12) == pytest.approx(100)
    assert Ceilings(1e9).floor_ms(10**9, 0, nominal=True) is None
    assert Ceilings(1e9).floor_ms(10**9, 10**15) == pytest.approx(1000)  # no rate of flops known


def timing(ms, **facts):
    return Timing(ms, ms, ms, 10, 5, **{"thrown_away": 0, "trusted": True, "graph": True} | facts)


RIGHT = Verdict("right", error=0.5)
CASE = Case("cross_entropy", "8 x 8", "forward+gradient", None, {}, 860_000_000,
            target_ms={"H200": 0.245})  # fmt: skip


def test_a_loss_is_shown_like_a_win():
    """Ours over the fastest peer, the definition among them; the target met or missed."""
    for mine, ratio, met in ((0.2, 0.5, True), (0.5, 1.25, False)):
        found = {"definition": (RIGHT, timing(0.4)), "torch": (RIGHT, timing(0.8)),
                 "ours": (RIGHT, timing(mine))}  # fmt: skip
        rows = list(rows_of(CASE, found, H200, "NVIDIA H200"))
        assert [row["ratio_to_best_peer"] for row in rows] == pytest.approx([1, 2, ratio])
        assert [row["target_met"] for row in rows] == [None, None, met]
        assert rows[2]["of_copy"] == pytest.approx(0.2 / mine)
        assert rows[2]["of_nominal"] == pytest.approx(0.2 / mine * 4.3 / 4.8)
        last = table(rows).split("\n")[-1]
        assert f"{ratio:.2f}" in last
        assert f"target 0.245 ms {'met' if met else 'MISSED'}" in last
        summary = summarise(rows)
        assert summary["ours_worst_ratio"] == pytest.approx(ratio)
        assert (summary["targets_met"], summary["targets_missed"]) == (int(met), int(not met))


def test_a_target_is_one_of_its_gpu():
    rows = list(rows_of(CASE, {"ours": (RIGHT, timing(0.2))}, H200, "NVIDIA A100"))
    assert rows[0]["target_met"] is None
    assert rows[0]["ratio_to_best_peer"] is None  # alone


def test_what_was_not_timed_is_counted_with_its_reason():
    found = {
        "definition": (RIGHT, timing(0.4, trusted=False, thrown_away=4)),
        "torch": (Verdict("wrong", "error 7.00 of what is allowed", 7.0), None),
        "liger": (Verdict("absent", "not installed"), None),
        "ours": (Verdict("failed", "OutOfMemoryError: 3 GB"), timing(math.nan)),
    }
    found["ours"] = (found["ours"][0], Timing(*[math.nan] * 3, 0, 0, 0, False, False, error="x"))
    rows = list(rows_of(CASE, found, H200, ""))
    text = table(rows)
    for words in ("wrong error 7.00", "absent not installed", "failed OutOfMemoryError: 3 GB",
                  "4 of 5 blocks thrown away", "DOUBTFUL"):  # fmt: skip
        assert words in text
    summary = summarise(rows)
    assert [summary[s] for s in ("timed", "wrong", "absent", "failed")] == [1, 1, 1, 1]
    assert summary["doubtful"] == 1
    assert summary["ours_failures"] == 1
    assert len(summary["failures"]) == 2
    json.dumps(rows, allow_nan=False)  # can be written down


def run_main(monkeypatch, capsys, *flags):
    """Exit status and stdout of the command."""
    monkeypatch.setattr(sys, "argv", ["kernels", *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(kernels, "measure_ceilings", lambda *args, **kwargs: Ceilings(1e9))
    with pytest.raises(SystemExit) as caught:
        kernels.main()
    return caught.value.code, capsys.readouterr().out.strip().split("\n")


def test_the_command_prints_a_table_and_one_json_line(monkeypatch, capsys, tmp_path):
    """And appends a line for each contender, with the machine's fingerprint."""
    out = tmp_path / "kernels.jsonl"
    flags = ["--quick", "--op", "bias_gelu", "--device", "cpu", "--out", str(out)]
    code, lines = run_main(monkeypatch, capsys, *flags)
    assert code == 0
    summary = json.loads(lines[-1])
    assert summary["timed"] == 4
    assert any(line.startswith("bias_gelu, backward: 50 x 96 bf16") for line in lines)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == sum(summary[s] for s in ("timed", "right", "wrong", "absent", "failed"))
    assert {row["contender"] for row in rows} == {"definition", "torch", "ours"}
    assert all(row["quick"] and row["commit"] and row["torch"] for row in rows)


def test_a_wrong_kernel_of_ours_is_exit_status_1(monkeypatch, capsys, tmp_path):
    case = case_of("bias_gelu", "forward")
    ways = {"definition": case.ways["definition"],
            "ours": scaled(case.ways["definition"], 2.0)}  # fmt: skip
    changed = Case(**{**vars(case), "ways": ways})
    monkeypatch.setattr(kernels, "all_cases", lambda device, quick: [changed])
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path / "x.jsonl")]
    code, lines = run_main(monkeypatch, capsys, *flags)
    assert code == 1
    assert json.loads(lines[-1])["ours_failures"] == 1


def test_no_case_is_begun_when_time_is_up(monkeypatch, capsys, tmp_path):
    flags = ["--quick", "--op", "embed", "--device", "cpu", "--minutes", "0"]
    _, lines = run_main(monkeypatch, capsys, *flags, "--out", str(tmp_path / "x.jsonl"))
    summary = json.loads(lines[-1])
    assert summary["timed"] == 0
    assert [case.split(":")[0] for case in summary["left_out"]] == [
        *("embed, forward", "embed, backward"),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--op", "softmax"], "expected --op of cross_entropy, adamw, .* got softmax"),
     (["--shape", "9999"], "expected --shape in one of the shapes, got '9999'")],
)  # fmt: skip
def test_what_is_not_there_cannot_be_chosen(flags, message):
    args = kernels.make_parser().parse_args(["--quick", *flags])
    with pytest.raises(SystemExit, match=message):
        kernels.chosen(args, CPU)


def test_torch_compile_is_a_contender_of_every_operation():
    compiling = {c.op for c in cases.quick_cases(CPU) if "torch.compile" in c.ways}
    assert compiling == {c.op for c in QUICK}
