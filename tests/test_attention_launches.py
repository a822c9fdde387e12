"""kernels/attention.py, attention_backward.py and attention_tiles.py: what is launched, with which
tiles, how many binaries that takes, and that nothing else runs. No kernel is executed here."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from accuracy import DEVICE
from launches import FREE, Operations, compilations, launches_are_declared, recorded
from test_attention import drawn
from triton.backends import backends
from triton.backends.compiler import GPUTarget

from minift.kernels import attention as forward
from minift.kernels import attention_backward as backward
from minift.kernels import attention_tiles
from minift.kernels.attention_tiles import CASES
from minift.kernels.launch import NVIDIA_ONLY, without_nvidia
from minift.kernels.layout import SHORT, SPAN, Layout

ROOT = Path(__file__).parent.parent
HALF, FULL = torch.bfloat16, torch.float32
MIXED = [70, 3, 128, SHORT, 0, 129, 1]


def run(lengths, D=64, dtype=HALF, H=4, group=1, causal=False, p=0.0, slack=0):
    """Forward and backward of one batch."""
    layout = Layout.pack(lengths, sum(lengths) + slack).to(DEVICE)
    dropout = drawn(layout, H, p) if p else None
    shape = layout.rows, H + 2 * (H // group), D
    qkv = torch.zeros(shape, dtype=dtype, device=DEVICE, requires_grad=True)
    dout = torch.zeros(layout.rows, H, D, dtype=dtype, device=DEVICE)
    out = forward.attention(qkv, layout, H, causal=causal, dropout=dropout)
    torch.autograd.grad(out, qkv, dout)


# ------------------------------------------------------------------------------ tiles


def tiles(D, dtype, dropout):
    """Tile and options of each launch."""
    yield "forward", forward._tile(D, dtype, False, dropout)
    yield "forward short", forward._tile(D, dtype, True, dropout)
    for role, causal, group in product(("dq", "dkv", "short"), (False, True), (1, 4)):
        yield role, backward._tile(role, D, dtype, dropout, causal, group)


SIZES = [(D, dtype) for D in (16, 17, 32, 33, 40, 64, 65, 80, 96, 128) for dtype in (HALF, FULL)]
SIZES += [(D, HALF) for D in (129, 160, 256)]
sizes = pytest.mark.parametrize(("D", "dtype"), SIZES, ids=str)
dropouts = pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropout"])


@sizes
@dropouts
def test_tiles_divide_what_they_tile(D, dtype, dropout):
    """Programs of a span share it out evenly: of queries for out and dq, of keys for dk and dv.
    A short sequence has a tile of its own size, not that of a span."""
    for role, options in tiles(D, dtype, dropout):
        if role in ("forward", "dq"):
            assert options["SPLIT"] * options["BLOCK_M"] == SPAN
        elif role == "dkv":
            assert options["SPLIT"] * options["BLOCK_N"] == SPAN
        elif role == "short":
            assert options["BLOCK"] == (32 if D <= 128 else 16)
        else:
            assert (options["BLOCK_M"], options["BLOCK_N"], options["SPLIT"]) == (32, 32, 0)


@sizes
@dropouts
@pytest.mark.parametrize("backend", ["nvidia", "amd"])
def test_every_option_is_known_to_the_compiler(D, dtype, dropout, backend):
    """Triton's launcher refuses an option that its compiler has not; AMD's has fewer."""
    amd = backend == "amd"
    target = GPUTarget("hip", "gfx942", 64) if amd else GPUTarget("cuda", 90, 32)
    compiler = backends[backend].compiler(target)
    parameters = {"BLOCK", "BLOCK_M", "BLOCK_N", "SPLIT"}
    for _, found in tiles(D, dtype, dropout):
        older = found.pop("before_hopper", {})
        assert older.keys() <= found.keys() | {"maxnreg"}
        found = without_nvidia(found) if amd else found | older
        options = {k: v for k, v in found.items() if k not in parameters}
        parsed = compiler.parse_options(options)
        assert {name: getattr(parsed, name) for name in options} == options
        assert parsed.default_dot_input_precision in parsed.allowed_dot_input_precisions


@dropouts
def test_fp32_products_are_three_of_tf32(dropout):
    """fp32 alone: one of tf32 would lose 13 of 23 bits."""
    for D in (16, 40, 64, 80, 128):
        found = [
            options.get("default_dot_input_precision") for _, options in tiles(D, FULL, dropout)
        ]
        assert found == ["tf32x3"] * 14
        assert not any(NVIDIA_ONLY[1] in options for _, options in tiles(D, HALF, dropout))


def test_registers_are_limited_only_where_rows_are_wide():
    """Rows of no multiple of 8 elements would spill under a limit."""
    limited = [o.get("maxnreg") for _, o in tiles(64, HALF, True)]
    assert any(limited)
    assert limited == [o.get("maxnreg") for _, o in tiles(40, HALF, True)]
    assert not any(o.get("maxnreg") for _, o in tiles(36, HALF, True))


@pytest.mark.parametrize(("capability", "rows"), [((8, 0), 32), ((9, 0), 64), ((10, 0), 64)])
def test_an_older_gpu_has_options_of_its_own(monkeypatch, capability, rows):
    """What it spills is halved there, and there alone."""

    class Elsewhere:
        is_cuda, device = True, torch.device("cpu")

        def get_device(self):
            return -1

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    launched = []
    kernel = {(3,): lambda *args, **options: launched.append(options)}
    options = backward._tile("dkv", 64, HALF, False)
    attention_tiles.launch(kernel, 3, Elsewhere(), **options)
    assert [o["BLOCK_M"] for o in launched] == [rows]
    assert "before_hopper" not in launched[0]


# ------------------------------------------------------------------------ declarations


def test_declared_launches_are_those_of_real_calls():
    """Each declaration is launched, and each launch at a declared shape is declared: the code that
    `bench.codegen` judges is the code that runs."""
    names = set()
    for case in CASES:
        lengths = [5, SHORT, 1] if case.short else [SHORT + 1, 300]
        shape = {"group": case.GROUP, "causal": case.causal, "p": 0.1 if case.dropout else 0.0}
        with recorded(run=False) as seen:
            run(lengths, case.D, case.dtype, H=12, **shape)
        for module in (forward, backward):
            names |= launches_are_declared(seen, module)
    assert names == {launch.name for launch in forward.LAUNCHES + backward.LAUNCHES}


def test_two_programs_share_an_sm():
    """With heads of 64, so that one computes while another waits: registers, which are given in
    eights, and shared memory of an H100, by what triton 3.6.0 made of each launch."""
    rows = (ROOT / "bench/results/codegen-triton-3.6.0.jsonl").read_text().splitlines()
    found = {(row["kernel"], row["arch"]): row for row in map(json.loads, rows)}
    checked = 0
    for launch in forward.LAUNCHES + backward.LAUNCHES:
        if launch.constexprs["D"] == 64 and "bf16" in launch.types:
            row = found[launch.name, "sm_90"]
            registers = -(-row["registers"] // 8) * 8 * 32 * launch.options["num_warps"]
            assert 2 * registers <= 65536, launch.name
            assert 2 * (row["shared_bytes"] + 1024) <= 228 * 1024, launch.name
            checked += 1
    assert checked >= 12


# ------------------------------------------------------------------------- how many


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("lengths", "slack", "kernels"),
    [
        ([5, SHORT, 1], 0, ["_forward_kernel", "_short_kernel"]),
        ([SHORT + 1, 300], 0, ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]),
        (MIXED, 0, ["_forward_kernel"] * 2 + ["_short_kernel", "_dq_kernel", "_dkv_kernel"]),
        ([300], 7, ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]),
        ([5], 7, ["_forward_kernel", "_short_kernel"]),
        ([0], 7, ["_forward_kernel", "_short_kernel"]),
        ([], 0, []),
        ([0, 0], 0, []),
    ],
    ids=["short", "long", "both", "long, slack", "short, slack", "slack", "nothing", "empty"],
)
def test_only_what_has_work_is_launched(lengths, slack, kernels, p):
    """A batch of one kind of sequences launches two or three kernels; slack rows add none."""
    with recorded(run=False) as seen:
        run(lengths, slack=slack, p=p)
    assert [launch.kernel for launch in seen] == kernels
    assert all(size > 0 for launch in seen for size in launch.grid)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("D", [64, 80])
def test_batches_share_their_binaries(D, p):
    """Five kernels, compiled once: for any lengths, any T (1, a prime, multiples of 16) and any
    number of heads. A dropout's words lie behind one another, so their alignment follows T."""
    with recorded(run=False) as seen:
        for lengths in ([1], [16], [13], [300], [256], [131], MIXED, [65, 64, 3], [66, 1]):
            run(lengths, D, p=p)
        for H in (1, 2, 3, 12, 16):
            run(MIXED, D, H=H, p=p)
        run(MIXED, D, p=p / 2)
        run(MIXED, D, slack=5, p=p)
    assert compilations(seen) == 5


def test_what_changes_the_code_is_counted():
    """Causal or not, groups, sizes and dtypes are other binaries: the count above can fail."""
    with recorded(run=False) as seen:
        run(MIXED)
        for other in ({"causal": True}, {"group": 2}, {"D": 32}, {"dtype": FULL}, {"p": 0.1}):
            run(MIXED, **other)
    assert compilations(seen) == 6 * 5


# ------------------------------------------------------------------- nothing beside it


def packed(layout, dropout):
    qkv = torch.zeros(layout.rows, 8, 64, device=DEVICE, requires_grad=True)
    with recorded(run=False), Operations() as seen:
        out = forward.attention(qkv, layout, 4, dropout=dropout)
        torch.autograd.grad(out, qkv, out.detach())
    return seen.names


def separate(layout, dropout):
    """Each one a slice of something wider."""
    q, k, v = (
        torch.zeros(layout.rows, H + 1, 64, device=DEVICE, requires_grad=True)[:, 1:]
        for H in (4, 2, 2)
    )
    with recorded(run=False), Operations() as seen:
        out = forward.attention_kv(q, k, v, layout, dropout=dropout)
        torch.autograd.grad(out, (q, k, v), out.detach())
    return seen.names


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("call", [packed, separate])
def test_nothing_runs_but_the_kernels(call, p):
    """Forward and backward are views and fresh memory: no copy, no concatenation, no filling."""
    layout = Layout.pack(MIXED, sum(MIXED) + 5).to(DEVICE)
    names = call(layout, drawn(layout, 4, p) if p else None)
    assert "new_empty" in names
    assert set(names) <= FREE
