"""bench/tune.py: a tile is ranked only when it was used and is right; a failure is a line."""

import json
import math
import sys

import bench_package  # noqa: F401
import pytest
import torch
from accuracy import DEVICE

import minift.kernels.attention as attention_file
import minift.kernels.attention_backward as backward_file
from bench import tune
from bench.attention_batches import TOKENS, Batch
from bench.kernels import worst_error
from bench.measure import Timing
from bench.tune import ROLES, Bench, Role, Tile, Trial, jobs, parse, patched, table
from minift.kernels.layout import SPAN

HERE = torch.device(DEVICE)
LONG = Batch("66", (66,), 1, 16)
SHORT = Batch("9, 5", (9, 5), 1, 16)
PASSES = [("forward", LONG), ("dq", LONG), ("dkv", LONG), ("short forward", SHORT),
          ("short backward", SHORT)]  # fmt: skip


def timing(ms: float) -> Timing:
    return Timing(ms, ms, ms, 10, 5, 0, trusted=True, graph=True)


@pytest.fixture
def quick(monkeypatch):
    """Times without a clock."""

    def measure(contenders, device, **speed):
        return {name: timing(float(len(name) or 1)) for name in contenders}

    monkeypatch.setattr(tune, "measure", measure)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that run and the blocks and warps that they are given."""
    seen = []
    for module in (attention_file, backward_file):

        def noted(kernel, grid, *args, launch=module.launch, **options):
            if grid:
                seen.append((kernel.fn.__name__, options))
            launch(kernel, grid, *args, **options)

        monkeypatch.setattr(module, "launch", noted)
    return seen


KERNELS = {"forward": "_forward_kernel", "dq": "_dq_kernel", "dkv": "_dkv_kernel",
           "short forward": "_forward_kernel", "short backward": "_short_kernel"}  # fmt: skip


@pytest.mark.parametrize(("name", "batch"), PASSES)
def test_a_tile_reaches_its_kernel_and_no_other(name, batch, launched):
    """Whatever the module chooses for the others, before and after; and all rows are computed."""
    role, tile = ROLES[name], Tile(32, 32, 8, 5)
    bench = Bench(batch, role.kind, HERE)
    run = bench.contender(role, tile)(0)
    launched.clear()
    assert worst_error(run.call(), bench.same_dtype, bench.exact) <= 1
    changed = [kernel for kernel, options in launched if options["num_stages"] == 5]
    assert changed == [KERNELS[name]]
    assert [o["num_warps"] for _, o in launched if o["num_stages"] == 5] == [8]
    launched.clear()
    bench.contender(role, None)(0).call()
    assert not [options for _, options in launched if options["num_stages"] == 5]


@pytest.mark.parametrize("name", ROLES)
def test_tiles_of_the_lists_can_be_launched(name):
    """A program's rows divide a span; a dot has 16 rows and keys; none is listed twice."""
    role = ROLES[name]
    assert len(set(role.tiles)) == len(role.tiles)
    for tile in role.tiles:
        own = tile.N if name == "dkv" else tile.M
        assert role.short or SPAN % own == 0
        assert min(tile.M, tile.N) >= 16
        assert {tile.M.bit_count(), tile.N.bit_count(), tile.warps.bit_count()} == {1}
        assert name != "short backward" or tile.M == tile.N


def test_what_a_module_chose_is_replaced():
    """With or without a limit of registers, and whatever else it says is kept."""
    given = {"BLOCK_M": 1, "BLOCK_N": 2, "num_warps": 3, "num_stages": 4, "maxnreg": 5, "other": 6}
    assert Tile(64, 32, 8, 2).over(given, "BLOCK_M") == {
        "BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "other": 6,
    }  # fmt: skip
    given = {"BLOCK": 1, "num_warps": 3, "num_stages": 4}
    assert Tile(64, 64, 8, 2, 128).over(given, "BLOCK_M") == {
        "BLOCK": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128,
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "split"), [("BLOCK_M", 4), ("BLOCK_N", 2)])
def test_a_span_is_cut_into_the_tiles_that_are_tried(rows, split):
    """Where the module says into how many: 128 rows of its own tile make as many of this one."""
    given = {"BLOCK_M": 128, "BLOCK_N": 128, "SPLIT": 1, "num_warps": 4, "num_stages": 1}
    assert Tile(32, 64, 4, 1).over(given, rows)["SPLIT"] == split
    assert Tile(32, 64, 4, 1).over(given | {"SPLIT": 0}, rows)["SPLIT"] == 0


@pytest.mark.parametrize("when", [{"role": "dq"}, {"short": None}])
def test_a_tile_that_nobody_asked_for_is_no_result(when):
    """A renamed role or a pass that does not launch it: its time would be another's."""
    role = Role("attention", "_tile", when, "forward", False, [])
    run = Bench(LONG, "forward", HERE).contender(role, Tile(32, 32, 1, 1))(0)
    with pytest.raises(LookupError, match=r"nothing asked attention\._tile for"):
        run.call()
    assert attention_file._tile.__name__ == "_tile"


def test_the_modules_choice_is_back_after_a_failure():
    before, during = backward_file._tile, []

    def fails():
        with patched(ROLES["dq"], Tile(32, 32, 1, 1)):
            during.append(backward_file._tile)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert during[0] is not before
    assert backward_file._tile is before


@pytest.mark.usefixtures("quick")
def test_a_tile_is_held_to_the_definition():
    bench, role = Bench(LONG, "forward", HERE), ROLES["forward"]
    right = bench.trial(role, Tile(32, 32, 1, 1))
    assert (right.status, right.timing) == ("timed", timing(1.0))
    bench.exact, bench.same_dtype = (
        tuple(x + 1 for x in part) for part in (bench.exact, bench.same_dtype)
    )
    wrong = bench.trial(role, Tile(32, 32, 1, 1))
    assert (wrong.status, wrong.timing) == ("WRONG", None)
    assert "of what is allowed" in wrong.reason
    bench.exact = tuple(x * math.nan for x in bench.exact)
    assert bench.trial(role, None).status == "WRONG"


def test_one_that_does_not_compile_is_a_line(monkeypatch):
    """And one that fails when it is timed."""
    bench, role = Bench(LONG, "forward", HERE), ROLES["forward"]
    failed = timing(1.0).__class__(*[math.nan] * 3, 0, 0, 0, False, False, error="lost")
    monkeypatch.setattr(tune, "measure", lambda *args, **kwargs: {"": failed})
    assert bench.trial(role, None) == Trial(None, "failed", "lost")
    monkeypatch.setattr(attention_file, "launch", lambda *args, **options: 1 / 0)
    trial = bench.trial(role, Tile(32, 32, 1, 1))
    assert trial == Trial(Tile(32, 32, 1, 1), "failed", "ZeroDivisionError: division by zero")


A, B, C = Tile(32, 32, 1, 1), Tile(64, 32, 4, 2), Tile(16, 16, 1, 1)


@pytest.fixture
def forward_role(monkeypatch):
    """The role with a list of its own."""

    def given(tiles):
        role = Role(**{**vars(ROLES["forward"]), "tiles": tiles})
        monkeypatch.setitem(tune.ROLES, "forward", role)

    return given


def run_job(monkeypatch, capsys, trials, seconds=1e6, device=HERE):
    """What a job makes of such trials: what it wrote, and its lines."""
    bench, left = Bench(LONG, "forward", HERE), iter(trials)
    bench.device = device
    bench.trial = lambda role, tile: next(left)
    times = {t.name: t.timing for t in trials}
    monkeypatch.setattr(tune, "measure", lambda found, *a, **k: {n: times[n] for n in found})
    written = []

    def write(trial, final):
        written.append((trial, final))

    tune.tune(bench, "forward", tune.time.monotonic() + seconds, write)
    return written, capsys.readouterr().out.strip().split("\n")


def test_the_best_come_first_and_a_wrong_one_never(monkeypatch, capsys, forward_role):
    """However fast; every trial is written, finalists once more."""
    forward_role([A, B, C])
    trials = [
        Trial(None, "timed", timing=timing(2.0)),
        Trial(A, "WRONG", "error 7 of what is allowed", timing(0.1)),
        Trial(B, "timed", timing=timing(1.0)),
        Trial(C, "failed", "OutOfResources: shared memory"),
    ]
    written, lines = run_job(monkeypatch, capsys, trials)
    assert [trial for trial, final in written if not final] == trials
    assert [trial.tile for trial, final in written if final] == [B, None]
    assert lines[0] == "forward: 66, 1 heads of 16 bf16"
    assert lines[1].strip() == "32 x 32, 1 warps, 1 stages: WRONG: error 7 of what is allowed"
    assert lines[2].strip().endswith("failed: OutOfResources: shared memory")
    assert lines[4].split()[:6] == ["64", "x", "32,", "4", "warps,", "2"]
    assert "0.500" in lines[4]
    assert lines[5].strip().startswith("as it is")
    assert lines[-1].strip() == "4 of 4 tiles tried"


def test_a_job_ends_in_time_with_what_it_has(monkeypatch, capsys, forward_role):
    """The module's own tile is always tried: it is what others are compared with."""
    forward_role([A, B, C])
    trials = [Trial(None, "timed", timing=timing(2.0))]
    written, lines = run_job(monkeypatch, capsys, trials, seconds=-1)
    assert [final for _, final in written] == [False, True]
    assert lines[-1].strip() == "1 of 4 tiles tried"


@pytest.mark.parametrize("fails", [True, False])
def test_on_a_gpu_many_are_compiled_at_once(fails, monkeypatch, capsys, forward_role):
    """As many as there are cores; where that fails, each when it is launched."""
    forward_role([A, B, C])
    trials = [Trial(tile, "timed", timing=timing(2.0)) for tile in (None, A, B, C)]
    asked = []

    def together(call, role, chosen):
        asked.append(chosen)
        if fails:
            raise RuntimeError("no such mode")

    monkeypatch.setattr(tune, "compile_together", together)
    monkeypatch.setattr(tune, "synchronize", lambda device: None)
    monkeypatch.setattr(tune.os, "cpu_count", lambda: 3)
    _, lines = run_job(monkeypatch, capsys, trials, device=torch.device("cuda"))
    assert asked == [[None, A, B], [C]]
    assert lines[-1].strip() == "4 of 4 tiles tried"
    said = "compiled one by one: RuntimeError: no such mode"
    assert (said in lines[1]) == fails


def test_a_job_of_which_nothing_is_right_ranks_nothing(monkeypatch, capsys, forward_role):
    forward_role([A])
    trials = [Trial(None, "failed", "x"), Trial(A, "WRONG", "y")]
    written, lines = run_job(monkeypatch, capsys, trials)
    assert not any(final for _, final in written)
    assert lines[-1].strip() == "2 of 2 tiles tried"


def test_the_modules_own_is_a_finalist_even_when_slow(monkeypatch):
    bench = Bench(LONG, "forward", HERE)
    trials = [Trial(Tile(32, 32, 1, n), "timed", timing=timing(n)) for n in range(1, 9)]
    trials.append(Trial(None, "timed", timing=timing(99.0)))
    asked = []

    def measure(contenders, device, **speed):
        asked.extend(contenders)
        return {name: timing(9 - i) for i, name in enumerate(contenders)}

    monkeypatch.setattr(tune, "measure", measure)
    final = bench.final(ROLES["forward"], trials)
    assert len(asked) == tune.FINALISTS + 1
    assert final[0].tile is None  # by the times that were taken in turn


@pytest.mark.parametrize(("name", "batch"), PASSES)
def test_launches_are_noted_and_nothing_runs(name, batch):
    """What is compiled for a tile is what will be launched with it."""
    role, tile, launches = ROLES[name], Tile(32, 32, 8, 5), []
    call = Bench(batch, role.kind, HERE).case
    call = call.ways["ours"](call.inputs()).call
    with tune.recorded(launches), patched(role, tile):
        call()
    mine = [(kernel.fn.__name__, grid) for kernel, grid, _, o in launches if o["num_stages"] == 5]
    assert [kernel for kernel, _ in mine] == [KERNELS[name]]
    assert all(len(grid) == 1 and grid[0] > 0 for _, grid in mine)
    assert all(options["enable_fp_fusion"] for *_, options in launches)
    assert attention_file.launch is backward_file.launch


def test_all_tiles_are_compiled_before_the_first_is_tried(monkeypatch):
    """Each kernel of a pass for each tile, by triton's own means, which is stood in for here."""
    compiled = []

    class Mode:
        def __init__(self, pool, ignore_errors):
            assert ignore_errors

        def __enter__(self):
            compiled.append("begin")

        def __exit__(self, *error):
            compiled.append("end")

    kernel = type(attention_file._forward_kernel)
    monkeypatch.setattr(tune.triton, "AsyncCompileMode", Mode)
    monkeypatch.setattr(
        kernel, "warmup", lambda self, *args, grid, **o: compiled.append(o["num_warps"]),
        raising=False,
    )  # fmt: skip
    bench = Bench(LONG, "forward", HERE)
    call = bench.case.ways["ours"](bench.copies[0]).call
    tune.compile_together(call, ROLES["forward"], [Tile(32, 32, 1, 1), Tile(32, 32, 2, 1)])
    assert compiled == ["begin", 1, 2, "end"]


# ----------------------------------------------------------------- the command


def test_shapes_of_the_command():
    assert parse("512x12x64", TOKENS).lengths == (512,) * 32
    assert parse("2048x16:4x128,causal", TOKENS).key_heads == 4
    assert parse("2048x16:4x128,causal", TOKENS).causal
    assert max(parse("sentencesx12x64", TOKENS).lengths) <= 64
    with pytest.raises(SystemExit, match="expected --shape such as 512x12x64"):
        parse("512x12", TOKENS)


def test_jobs_are_those_that_a_shape_has():
    """Long and short kernels where there are such sequences; dropout for the first two."""
    names = list(ROLES)
    found = [(b.p, name) for b, name in jobs(["512x12x64", "9x1x16", "128x1x32"], names, TOKENS)]
    long = [name for name in names if not ROLES[name].short]
    short = [name for name in names if ROLES[name].short]
    assert found == [
        *[(p, name) for p in (0.0, tune.DROPOUT) for name in long],
        *[(p, name) for p in (0.0, tune.DROPOUT) for name in short],
        *[(0.0, name) for name in long],
    ]
    both = {name for _, name in jobs(["squadx1x16"], names, TOKENS)}
    assert both == set(names)


def run_main(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["tune", "attention", *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        tune.main()
    return caught.value.code, capsys.readouterr()


@pytest.mark.usefixtures("quick")
def test_the_command_tries_ranks_and_writes(monkeypatch, capsys, tmp_path):
    out = tmp_path / "tune.jsonl"
    flags = ["--device", DEVICE, "--shape", "9x1x16", "--tokens", "18", "--role", "short forward"]
    code, shown = run_main(monkeypatch, capsys, *flags, "--out", str(out), "--minutes", "5")
    assert code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    tried = [row for row in rows if not row["final"]]
    assert len(tried) == 2 * (1 + len(ROLES["short forward"].tiles))
    assert {row["status"] for row in rows} == {"timed"}
    assert all(row["role"] == "short forward" and row["commit"] and row["p50"] for row in rows)
    assert tried[0]["tile"] is None
    assert tried[1]["tile"]["warps"] == ROLES["short forward"].tiles[0].warps
    assert shown.out.count("tiles tried") == 2


@pytest.mark.usefixtures("quick")
def test_no_job_is_begun_when_time_is_up(monkeypatch, capsys, tmp_path):
    flags = ["--device", DEVICE, "--minutes", "0", "--out", str(tmp_path / "x")]
    code, shown = run_main(monkeypatch, capsys, *flags, "--shape", "9x1x16")
    assert code == 0
    assert shown.out.strip() == "no time for 4 of 4 jobs"


def test_a_wrong_tile_of_the_module_is_exit_status_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Bench, "trial", lambda self, role, tile: Trial(tile, "WRONG", "error 2"))
    flags = ["--device", DEVICE, "--shape", "9x1x16", "--role", "short forward"]
    code, shown = run_main(monkeypatch, capsys, *flags, "--out", str(tmp_path / "x"))
    assert code == 1
    assert "as it is: WRONG: error 2" in shown.out


def test_on_a_cpu_it_needs_the_interpreter(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, shown = run_main(monkeypatch, capsys, "--device", "cpu")
    assert code == 2
    assert shown.err == "expected a GPU, or TRITON_INTERPRET=1 to try it on a CPU\n"


def test_a_doubtful_time_says_so():
    """And one with the cost of launches from Python in it."""
    case = Bench(SHORT, "forward", HERE).case
    took = Timing(1.0, 1.0, 1.0, 10, 5, 4, trusted=False, graph=False, reason="it waits")
    line = table(case, [Trial(A, "timed", timing=took)], 1, 2).split("\n")[1]
    assert line.endswith("  no graph: it waits; DOUBTFUL: the machine was busy")
