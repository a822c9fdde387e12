"""bench/attention_*.py: what is counted, and that every contender computes the same attention."""

import math
import types

import bench_package  # noqa: F401
import pytest
import torch

from bench import attention_cases, kernels
from bench.attention_batches import TOKENS, Batch, batches, equal, mixed
from bench.attention_cases import attention, definition, drawn, peers
from bench.kernels import Verdict, check, ratios_of, rows_of, summarise, table
from bench.operations import Absent, Case, Inputs, Ratio, backward, forward
from minift.kernels.attention import attention_kv_ref
from minift.ops import Layout

CPU = torch.device("cpu")
RAGGED = Batch("7, 3", (7, 3), 4, 16)
CAUSAL = Batch("2 of 5", (5, 5), 4, 16, Hk=2, causal=True)
DROPPED = Batch("7, 3", (7, 3), 2, 16, p=0.1)
GPU_ONLY = ("torch varlen", "flash, private", "flex, compiled")


def layout_of(batch: Batch) -> Layout:
    return Layout.pack(list(batch.lengths))


def judged(batch: Batch, name: str, way, kind: str) -> Verdict:
    """What becomes of a contender of one batch."""
    case = next(c for c in attention(batch, CPU) if c.kind == kind)
    case = Case(**{**vars(case), "ways": {"definition": case.ways["definition"], name: way}})
    return check(case, case.inputs())[name]


# -------------------------------------------------------------------- batches


def test_flops_are_of_the_scores_that_are_seen():
    """By hand: two products forward, five backward, D multiply-adds a score."""
    full = Batch("", (3, 5), 2, 16)
    assert full.flops("forward") == 2 * 2 * 16 * 2 * (9 + 25)
    assert full.flops("backward") == 2.5 * full.flops("forward")
    causal = Batch("", (3, 5), 2, 16, causal=True)
    assert causal.flops("forward") == 2 * 2 * 16 * 2 * (6 + 15)


def test_bytes_are_those_of_each_tensor_once():
    """With fewer heads of keys fewer: q and out have H, k and v have Hk."""
    batch = Batch("", (3, 5), 4, 16, Hk=1)
    assert batch.bytes("forward") == 2 * 8 * 16 * (4 + 4 + 1 + 1)
    assert batch.bytes("backward") == 2 * 8 * 16 * (4 * 4 + 4 * 1)


def test_a_rate_is_a_time():
    """12 heads of 64 at 512: 25.8 GFLOP forward, so 340 TFLOP/s are 0.076 ms."""
    first = batches()[0]
    assert first.target("forward")["H200"] == pytest.approx(0.07579, abs=1e-5)
    assert first.target("backward")["H200"] == pytest.approx(0.29964, abs=1e-5)
    short = next(b for b in batches() if b.lengths[0] == 128 and b.D == 64)
    assert short.target("backward") == {"H200": 0.080}
    assert Batch("", (3,), 1, 16).target("forward") == {}


def test_batches_are_of_as_many_tokens_and_told_apart():
    made = batches()
    assert {sum(b.lengths) for b in made[:-1]} == {TOKENS}
    assert len({str(b) for b in made}) == len(made)
    assert max(len(f"attention, backward: {b}") for b in made) < 90


@pytest.mark.parametrize(
    ("kind", "mean", "least", "most"), [("sentences", 25, 5, 64), ("squad", 175, 20, 384)]
)
def test_a_mix_is_the_same_in_every_run(kind, mean, least, most):
    """Its last sequence takes what is left and may be shorter."""
    lengths = mixed(kind, 12, 64).lengths
    assert lengths == mixed(kind, 12, 64).lengths
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.05)
    assert least <= min(lengths[:-1])
    assert max(lengths) <= most
    assert len(set(lengths)) > 30


def test_what_a_ratio_refers_to_is_timed_before():
    """Else it could not be told; two shapes with dropout and the mix of sentences have one."""
    made = batches()
    seen = set()
    for batch in made:
        seen.add(str(batch))
        for ratio in batch.ratios:
            assert not ratio.shape or ratio.shape in seen
            names = ["ours", *peers(batch, layout_of(batch), CPU)]
            assert ratio.contender in names
    assert [len(b.ratios) for b in made[:4]] == [0, 1, 2, 2]
    assert [r.shape for r in made[2].ratios] == [str(made[0]), ""]
    assert [r.shape for r in made[3].ratios] == [str(made[1]), ""]


def test_on_a_cpu_there_is_a_small_share():
    for case in attention_cases.attention_cases(CPU):
        assert case.flops < 2 * 10**10


# ----------------------------------------------------------------- contenders


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("batch", [RAGGED, CAUSAL, DROPPED], ids=str)
def test_a_long_batch_is_defined_head_by_head(batch, kind, monkeypatch):
    """The same numbers, gradients too, whether the heads are computed at once or apart."""
    layout, dropout = layout_of(batch), drawn(batch, CPU) if batch.p else None
    inputs = attention(batch, CPU)[0].inputs().double()
    of = {"forward": forward, "backward": backward}[kind]
    whole = of(definition(batch, layout, dropout))(inputs).call()
    monkeypatch.setattr(attention_cases, "DENSE", 1)
    apart = of(definition(batch, layout, dropout))(inputs).call()
    torch.testing.assert_close(apart, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("batch", [RAGGED, CAUSAL], ids=str)
def test_flex_sees_what_the_definition_sees(batch, monkeypatch):
    """Its blocks of sequences, uncompiled: which has no gradient on a CPU."""
    monkeypatch.setattr(attention_cases, "compiled", lambda fn: fn)
    monkeypatch.setattr(attention_cases, "only_on", lambda device, fn: fn)
    batch = Batch(**{**vars(batch), "flex": True})
    peer = peers(batch, layout_of(batch), CPU)["flex, compiled"]
    assert judged(batch, "flex, compiled", peer.way("forward", batch), "forward").status == "right"


def varlen_of_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    lengths = cu_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    return attention_kv_ref(q, k, v, Layout.pack(lengths), causal=is_causal)


def varlen_of_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
    assert window_size in ((-1, -1), (-1, 0))
    return varlen_of_2_10(q, k, v, cu_q, cu_k, max_q, max_k, window_size == (-1, 0))


def varlen_of_2_12(*args, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return varlen_of_2_11(*args, window_size=window_size)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("batch", [RAGGED, CAUSAL], ids=str)
@pytest.mark.parametrize("version", [varlen_of_2_10, varlen_of_2_11, varlen_of_2_12])
def test_torchs_varlen_is_called_as_its_version_wants(version, batch, kind, monkeypatch):
    monkeypatch.setattr(attention_cases, "only_on", lambda device, fn: fn)
    module = types.SimpleNamespace(varlen_attn=version)
    monkeypatch.setitem(__import__("sys").modules, "torch.nn.attention.varlen", module)
    peer = peers(batch, layout_of(batch), CPU)["torch varlen"]
    assert judged(batch, "torch varlen", peer.way(kind, batch), kind).status == "right"


@pytest.mark.parametrize("batch", [RAGGED, CAUSAL, DROPPED], ids=str)
def test_the_private_entry_takes_these_arguments(batch):
    """On no device at all: shapes of its result and gradients, through autograd."""
    call = attention_cases.private_flash(batch, layout_of(batch).to("meta"))
    q, k = (
        torch.empty(10, heads, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (batch.H, batch.key_heads)
    )
    if batch.p:  # its seed is on no device either
        with pytest.raises(Absent, match="its seed is on the host"):
            call(q, k, k)
    else:
        out = call(q, k, k)
        assert out.shape == q.shape
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k))] == [q.shape, k.shape]
    with pytest.raises(Absent, match=r"NotImplementedError|RuntimeError"):
        attention_cases.private_flash(batch, layout_of(batch))(*(torch.zeros(10, 4, 16),) * 3)


def test_each_says_why_it_is_absent():
    """With dropout: who has none, and who would read the seed from the wrong memory."""
    found = {}
    for batch in (RAGGED, CAUSAL, DROPPED):
        case = attention(batch, CPU)[0]
        case.ways.pop("torch.compile")
        found |= {(batch, name): v for name, v in check(case, case.inputs()).items()}
    assert found[RAGGED, "sdpa padded flash"] == Verdict("absent", "takes no mask")
    assert found[DROPPED, "torch varlen"] == Verdict("absent", "has no dropout")
    assert found[DROPPED, "flex, compiled"] == Verdict("absent", "has no dropout")
    assert found[RAGGED, "flex, compiled"].reason.startswith("left out")
    assert "seed" in found[DROPPED, "sdpa padded efficient"].reason
    for name in ("sdpa math", "sdpa flash"):
        assert found[CAUSAL, name].status == "right"
    assert found[RAGGED, "sdpa padded math"].status == "right"
    reason = "not judged: its mask is another"
    assert found[DROPPED, "sdpa padded math"] == Verdict("right", reason)


# -------------------------------------------------------------------- judging


@pytest.mark.parametrize("spoiled", ["nan", "shape", "fewer"])
def test_who_is_not_judged_by_values_must_still_be_finite_and_in_shape(spoiled):
    case = attention(DROPPED, CPU)[1]

    def wrong(inputs: Inputs):
        run = case.ways["definition"](inputs)
        (grad,) = run.call()
        bad = {"nan": (grad * math.nan,), "shape": (grad[1:],), "fewer": ()}[spoiled]
        return kernels.Run(lambda: bad)

    verdict = judged(DROPPED, "flash, private", wrong, "backward")
    assert verdict == Verdict("wrong", "not finite, or of another shape")
    assert judged(DROPPED, "ours", wrong, "backward").status in ("wrong", "failed")


def test_what_is_not_timed_is_judged_all_the_same(monkeypatch):
    """The definition of long sequences; the reason stands in its line."""
    case = attention(RAGGED, CPU)[0]
    ways = {name: case.ways[name] for name in ("definition", "torch")}
    case = Case(**{**vars(case), "ways": ways, "untimed": {"definition": "too slow"}})
    took = kernels.Timing(0.5, 0.5, 0.5, 10, 5, 0, True, True)
    monkeypatch.setattr(kernels, "measure", lambda found, *a, **k: dict.fromkeys(found, took))
    found = kernels.run_case(case, CPU, kernels.QUICK)
    assert found["definition"] == (Verdict("right", "too slow", found["definition"][0].error), None)
    assert found["definition"][0].error is not None
    assert found["torch"][1] is took


def timed(shape: str, contender: str, p50: float, status: str = "timed") -> dict:
    return {"op": "attention", "pass": "forward", "shape": shape, "contender": contender,
            "status": status, "p50": p50}  # fmt: skip


def test_a_target_may_be_a_share_of_anothers_time():
    """In the same case or an earlier one; one that was not timed decides nothing."""
    ratios = Ratio("torch varlen", 0.5), Ratio("ours", 1.2, "plain"), Ratio("flash, private", 0.8)
    case = Case("attention", "dropped", "forward", None, {}, 1, ratios=ratios)
    rows = [
        timed("plain", "ours", 1.0),
        timed("plain", "torch varlen", 0.1),
        timed("dropped", "torch varlen", 4.0),
        timed("dropped", "flash, private", 4.0, "failed"),
        timed("dropped", "ours", 1.5),
    ]
    found = ratios_of(case, rows)
    assert [(r["ratio"], r["met"]) for r in found] == [(0.375, True), (1.5, False), (None, None)]
    notes = list(map(kernels.ratio_note, found))
    assert notes == [
        "0.38 of torch varlen, target 0.50 met",
        "1.50 of ours at plain, target 1.20 MISSED",
        "target 0.80 of flash, private: not timed",
    ]


def test_rates_and_ratios_are_printed():
    """Flops of a case over the time of each contender."""
    took = kernels.Timing(0.5, 0.5, 0.5, 10, 5, 0, True, True)
    case = Case("attention", "s", "forward", None, {}, 10**6, 10**11)
    ceilings = kernels.Ceilings(4e12, 8e14)
    (row,) = rows_of(case, {"ours": (Verdict("right"), took)}, ceilings, "")
    assert row["tflops"] == pytest.approx(200)
    row["ratios"] = ratios_of(Case("attention", "s", "forward", None, {}, 1,
                                   ratios=(Ratio("ours", 1.1),)), [row])  # fmt: skip
    last = table([row]).split("\n")[-1]
    assert "200 TFLOP/s; 1.00 of ours, target 1.10 met" in last
    assert summarise([row])["ratios"] == ["attention, forward: s: 1.00 of ours, target 1.10 met"]


def test_no_peer_takes_part_on_a_cpu_that_needs_a_gpu():
    found = peers(equal(4, 2, 16, 8, flex=True), Layout.pack([4, 4]), CPU)
    for name in GPU_ONLY:
        with pytest.raises(Absent, match="needs a GPU"):
            found[name].call(*(torch.zeros(8, 2, 16),) * 3)
