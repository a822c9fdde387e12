"""bench/finetune.py: peers that train the same, timed in turn; rows that say what is doubtful."""

import json
import os
import re
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import bench_package  # noqa: F401
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench import finetune, learning, peers, rounds
from bench.ceilings import Ceilings
from bench.peers import Job, Minift, Peer, TorchUnpadded, Transformers, Unavailable
from bench.rounds import Block, Course, Plan
from bench.unpadded import Unpadded, flash, one_by_one, pack, varlen
from bench.workloads import (
    FIRST_WORD,
    MODELS,
    SET,
    TINY,
    WORKLOADS,
    Data,
    lengths,
    make_examples,
    train_config,
    write_model,
)
from minift.bert import BertClassifier
from minift.config import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model, and the same without dropout."""
    return write_model("tiny", tmp_path_factory.mktemp("tiny"), seed=0)


def job(folder: Path, steps: int = 8, dtype: str = "fp32") -> Job:
    config = train_config(TINY, steps, 0, dtype)
    config = replace(config, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.2)
    config = replace(config, learning_rate=1e-2)
    return Job(folder, Data.make(TINY, steps, 0), config, CPU)


# ---------------------------------------------------------------- workloads


def test_the_label_is_the_set_with_more_words():
    """Of two sets; words of neither are there as well. The same texts for the same seed."""
    examples = make_examples(TINY, 25, seed=3)
    others = 0
    for example in examples:
        words = torch.tensor(example.tokens)[1:-1] - FIRST_WORD
        told = (words // SET)[words < 2 * SET]
        assert (told == example.target).sum() > (told != example.target).sum()
        others += (words >= 2 * SET).sum()
    assert 0.2 < float(others) / sum(len(e.tokens) for e in examples) < 0.5
    again = make_examples(TINY, 25, seed=3)
    assert [e.tokens for e in again] == [e.tokens for e in examples]
    assert {e.target for e in examples} == {0, 1}


def test_skewed_texts_are_the_same_with_other_labels():
    """Seven of eight are 1: their gradients do not cancel."""
    data = Data.make(TINY, 4, 0)
    skewed = data.skewed()
    before, after = ([e for k in range(4) for e in d.examples(k)] for d in (data, skewed))
    assert [e.tokens for e in after] == [e.tokens for e in before]
    assert sum(e.target for e in after) == 28
    assert 8 < sum(e.target for e in before) < 24


def test_lengths_are_those_of_the_data():
    """Mean, spread and both ends."""
    sample = torch.tensor(lengths("SQuAD", 4000, 0)).float()
    assert sample.mean().item() == pytest.approx(175, abs=4)
    assert sample.std().item() == pytest.approx(70, abs=4)
    assert (sample.min(), sample.max()) == (20, 384)
    assert set(lengths("full 384", 10, 0)) == {384}
    assert {w.longest for w in WORKLOADS} == {64, 384, 1024}


# -------------------------------------------------------------------- peers


def test_all_peers_take_the_same_steps(folders):
    """Without dropout, in fp32: weights, rows and their order, schedule, clipping, decay and
    moments are the same in each, or the losses would part."""
    task = job(folders[1])
    curves = {}
    for kind in (Minift, Transformers, TorchUnpadded):
        peer = kind(task)
        curves[kind.name] = []
        for k in range(8):
            peer.step(k)
            curves[kind.name].append(peer.loss())
    reference = curves.pop("transformers")
    assert max(reference) - min(reference) > 0.1
    for losses in curves.values():
        assert losses == pytest.approx(reference, rel=1e-4)


def test_gradients_are_the_same_and_what_learns_otherwise_is_found(folders):
    """Peers pass the check; one with a wrong gradient, one with a wrong rate and one that raises
    do not."""
    task = job(folders[1], dtype="bf16")
    found = learning.check_peers([Minift, Transformers, TorchUnpadded], task)
    assert found.keys() == {"minift", "torch unpadded"}
    assert all(result["passed"] for result in found.values())
    exact = replace(task, config=replace(task.config, dtype="fp32"), made={})
    reference = learning.start_of(Transformers, exact)

    class Noisy(TorchUnpadded):
        def gradients(self, k):
            named = super().gradients(k)
            return named | {"bert.embeddings.word.weight": 0 * named["bert.embeddings.word.weight"]}

    class Fast(TorchUnpadded):
        def step(self, k):
            super().step(min(k + 1, 2))

    class Broken(TorchUnpadded):
        def step(self, k):
            raise RuntimeError("no")

    assert learning.check_one(TorchUnpadded, exact, reference)["passed"]
    noisy, fast, broken = (learning.check_one(k, exact, reference) for k in (Noisy, Fast, Broken))
    assert not noisy["passed"]
    assert noisy["loss_difference"] < 1e-3
    assert not fast["passed"]
    assert fast["cosine"] > 0.999
    assert not broken["passed"]
    assert "no" in broken["error"]


def test_torch_drops_where_transformers_does(folders, monkeypatch):
    """As often, at the same rate: of attention in each layer, and of all else."""
    dropped = {"torch": [], "transformers": []}
    whose = "torch"
    attend, drop = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.dropout

    def noted_drop(x, p=0.5, *rest, **kwargs):
        dropped[whose].append(p)
        return drop(x, p, *rest, **kwargs)

    def noted_attend(*args, dropout_p=0.0, **kwargs):
        dropped[whose].append(-dropout_p)
        return attend(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "dropout", noted_drop)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted_attend)
    task = job(folders[0])
    TorchUnpadded(task).step(0)
    whose = "transformers"
    Transformers(task).step(0)
    each = dropped["torch"].count(-0.1) // task.data.batches.batch_size  # one for each sequence
    assert dropped["transformers"].count(-0.1) == each == 2
    assert dropped["transformers"].count(0.1) == dropped["torch"].count(0.1) == 2 * 2 + 2


def test_half_weights_have_fp32_masters(folders):
    """Steps too small for bf16 add up."""
    task = job(folders[1], dtype="bf16")
    peer = TorchUnpadded(replace(task, config=replace(task.config, learning_rate=1e-5)))
    before = [p.clone() for p in peer.masters.masters]
    for k in range(4):
        peer.step(k)
    assert {p.dtype for p in peer.masters.leaves} == {torch.bfloat16}
    assert {p.dtype for p in peer.masters.masters} == {torch.float32}
    moved = [not torch.equal(a, b) for a, b in zip(before, peer.masters.masters, strict=True)]
    assert all(moved)
    for leaf, master in zip(peer.masters.leaves, peer.masters.masters, strict=True):
        assert torch.equal(leaf, master.bfloat16())


def test_a_peer_that_trains_other_rows_is_found_out(folders):
    task = job(folders[0])
    peer = Minift(replace(task, data=replace(task.data, order=task.data.order[::-1])))
    with pytest.raises(RuntimeError, match="step 0 trained other rows"):
        peer.step(0)


def test_batches_are_padded_to_the_longest_or_to_a_bucket():
    examples = make_examples(TINY, 1, seed=0)
    longest = max(len(e.tokens) for e in examples)
    ids, mask, labels = peers.padded(examples, longest, CPU)
    assert ids.shape == (8, longest)
    assert mask.sum(1).tolist() == [len(e.tokens) for e in examples]
    assert (ids * (1 - mask) == 0).all()
    assert labels.tolist() == [e.target for e in examples]
    assert [ids[i, : len(e.tokens)].tolist() for i, e in enumerate(examples)] == [
        e.tokens.tolist() for e in examples
    ]
    same = [e for e in examples if len(e.tokens) == longest]
    assert peers.padded(same, longest, CPU)[1] is None
    assert [peers.bucket(n, 384) for n in (1, 32, 33, 128, 129, 384)] == [32, 32, 64, 128, 384, 384]


def test_rows_beyond_the_texts_change_nothing(folders):
    """A multiple of 16 rows, as a graph needs: a text more, at whose end the rows end."""
    examples = make_examples(TINY, 1, seed=0)
    peer = TorchUnpadded(job(folders[1]))
    plain, more = pack(examples, 24), pack(examples, 24, multiple=16)
    assert len(more.tokens) % 16 == 0
    assert len(more.tokens) > len(plain.tokens) == plain.cu_seqlens[-1]
    assert more.cu_seqlens[-1] == len(more.tokens)
    assert more.cu_seqlens.tolist()[:-1] == plain.cu_seqlens.tolist()
    torch.testing.assert_close(peer.forward(more), peer.forward(plain))


def test_what_cannot_run_here_says_why(folders):
    """Every peer either trains on a CPU or is unavailable with a reason, and none raises else."""
    reasons = {}
    for kind in peers.PEERS:
        if kind is peers.TransformersCompiled:
            continue  # it runs, but takes minutes
        try:
            kind(job(folders[0])).step(0)
        except Unavailable as error:
            reasons[kind.name] = str(error)
    assert reasons["torch unpadded, graphs"] == "CUDA graphs need a GPU"
    assert reasons["torch unpadded, varlen_attn"] == "varlen_attn needs a GPU"
    assert not {"minift", "transformers", "torch unpadded"} & reasons.keys()
    assert len({kind.name for kind in peers.PEERS}) == len(peers.PEERS)


@pytest.mark.filterwarnings("ignore:aten..nll_loss")  # has no gradient without memory
@pytest.mark.parametrize("attention", [flash, varlen])
def test_torch_knows_the_attention_that_a_gpu_is_given(attention):
    """Names, arguments and gradients, of tensors without memory."""
    raw = MODELS["tiny"] | {"id2label": {"0": "a", "1": "b"}}
    model = BertClassifier(ModelConfig.from_hf(raw)).to("meta").bfloat16()
    batch = pack(make_examples(TINY, 1, seed=0), 24)
    batch = batch._replace(**{name: x.to("meta") for name, x in batch.tensors().items()})
    Unpadded(model, attention)(batch).backward()
    assert {p.grad.shape == p.shape for p in model.parameters()} == {True}


class FakeGraph:
    """Runs what it is to capture, and nothing when it is replayed."""

    def __init__(self, *args, **kwargs):
        self.replays = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def replay(self):
        self.replays += 1

    def wait_stream(self, other):
        pass


def test_a_graph_is_captured_for_each_number_of_rows(folders, monkeypatch):
    """After the eager steps; inputs are copied to where the graph reads them, and the rate."""
    task = job(folders[1], steps=14)
    graphs = peers.TorchGraphs.__new__(peers.TorchGraphs)
    for name in ("CUDAGraph", "Stream", "graph", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    graphs.start(task)
    for k in range(14):
        graphs.step(k)
    rows = {k: len(graphs.packed(k).tokens) for k in range(peers.EAGER_STEPS, 14)}
    assert graphs.graphs.keys() == set(rows.values())
    assert sum(graph.replays for graph, *_ in graphs.graphs.values()) == len(rows)
    last = {size: k for k, size in rows.items()}
    for size, (_, inputs, _) in graphs.graphs.items():
        assert torch.equal(inputs.tokens, graphs.packed(last[size]).tokens)
    for group in graphs.masters.optimizer.param_groups:
        assert group["lr"].item() == pytest.approx(task.rate(13))
    assert all(p.grad is None for p in graphs.masters.leaves)


def test_attention_one_by_one_drops_at_the_rate(folders):
    """Half of the probabilities, of constant values: outputs of a mean of 1, and not all 1."""
    batch = pack(make_examples(TINY, 4, seed=0), 24)
    v = torch.ones(len(batch.tokens), 2, 32)
    torch.manual_seed(0)
    out = one_by_one(torch.zeros_like(v), v, v, batch, 0.5)
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)
    assert out.std() > 0.1


# ------------------------------------------------------------------- rounds


class Fake(Peer):
    """Notes its steps, and what each takes on the fake clock."""

    took = 1.0

    def __init__(self, task):
        self.task = task

    def step(self, k):
        log.append((self.name, k))
        now[0] += self.took

    def loss(self):
        return 0.5


def fake(name: str, **attributes) -> type[Peer]:
    return type(name, (Fake,), {"name": name, **attributes})


log: list[tuple[str, int]] = []
now = [0.0]


class FakeClock:
    """Its marks are at `now`."""

    def __init__(self, canaries=()):
        self.marks, self.canaries = [], list(canaries)

    def mark(self):
        self.marks.append(now[0])

    def wait(self):
        pass

    def take(self):
        marks, self.marks = self.marks, []
        return [b - a for a, b in pairwise(marks)]

    def canary(self):
        return self.canaries.pop(0) if self.canaries else 1.0


PLAN = Plan(warm_up=4, blocks=3, steps=5)


@pytest.fixture(autouse=True)
def _no_garbage(monkeypatch):
    """Collecting what transformers leaves takes a second."""
    monkeypatch.setattr(rounds.gc, "collect", lambda: 0)


def fake_courses(*kinds, plan=PLAN, clock=None) -> list[Course]:
    log.clear()
    courses = [rounds.prepare(kind, job_of(plan), plan) for kind in kinds]
    rounds.run_rounds(courses, plan, clock or FakeClock())
    return courses


def job_of(plan: Plan) -> Job:
    return Job(Path(), Data.make(TINY, plan.total, 0), train_config(TINY, plan.total, 0), CPU)


def test_blocks_are_run_in_turn_and_every_peer_takes_every_step_once():
    a, b = fake_courses(fake("a"), fake("b", took=3.0))
    assert [k for name, k in log if name == "a"] == list(range(PLAN.total))
    assert [k for name, k in log if name == "b"] == list(range(PLAN.total))
    after = [name for name, k in log[2 * PLAN.warm_up :]]
    turn = ["a"] * (rounds.AHEAD + 5) + ["b"] * (rounds.AHEAD + 5)
    assert after == turn * 3
    assert [block.times for block in b.blocks] == [[3.0] * 5] * 3
    assert [block.first for block in a.blocks] == [PLAN.first(i) for i in range(3)]
    assert (a.status, a.first_loss, a.last_loss) == ("timed", 0.5, 0.5)


def test_a_peer_that_raises_does_not_stop_the_others():
    """Neither when it is made, nor in a block; its reason is kept."""

    def late(self, k):
        if k == PLAN.first(1):
            raise ValueError("too late")
        Fake.step(self, k)

    def never(self, task):
        raise Unavailable("no GPU")

    broken, missing, fine = fake_courses(
        fake("broken", step=late), fake("missing", __init__=never), fake("fine")
    )
    assert (broken.status, broken.reason) == ("failed", "ValueError: too late")
    assert (missing.status, missing.reason) == ("unavailable", "no GPU")
    assert (fine.status, len(fine.blocks)) == ("timed", 3)


def test_time_that_is_over_ends_the_rounds_after_the_second():
    (a,) = fake_courses(fake("a"), plan=replace(PLAN, deadline=time.monotonic() - 1))
    assert len(a.blocks) == 2


def test_peers_that_no_time_is_left_for_are_not_made(monkeypatch):
    """But for the first two."""
    monkeypatch.setattr(rounds, "make_clock", lambda device: FakeClock())
    plan = replace(PLAN, deadline=time.monotonic() - 1)
    kinds = [fake(name) for name in "abc"]
    courses, _ = rounds.run_peers(kinds, job_of(plan), plan, say=lambda line: None)
    assert [c.status for c in courses] == ["timed", "timed", "unavailable"]
    assert courses[2].reason == "no time was left"


def test_a_peer_that_takes_long_to_make_is_made_if_there_is_time(monkeypatch, folders):
    """By its seconds a layer; the model has two."""
    monkeypatch.setattr(rounds, "make_clock", lambda device: FakeClock())
    kinds = [fake("a"), fake("b"), fake("slow", seconds_a_layer=40.0), fake("c")]
    for seconds, status in ((100.0, "unavailable"), (200.0, "timed")):
        plan = replace(PLAN, deadline=time.monotonic() + seconds)
        task = replace(job_of(plan), folder=folders[0])
        courses, _ = rounds.run_peers(kinds, task, plan, say=lambda line: None)
        assert [c.status for c in courses] == ["timed", "timed", status, "timed"]


def course_of(*blocks: tuple[list[float], float, float]) -> Course:
    made = [Block(PLAN.first(i), *block) for i, block in enumerate(blocks)]
    return Course("a", Fake, blocks=made)


def test_rates_are_medians_over_blocks_of_real_tokens_by_the_wall_clock():
    """One slow block changes the spread and the last percentile, not the rate."""
    course = course_of(([2.0] * 5, 10.0, 1), ([2.0] * 5, 10.0, 1), ([2.0] * 4 + [92.0], 100.0, 1))
    task = job_of(PLAN)
    facts = rounds.timed_facts(course, task, [1.0])
    tokens = [sum(sum(task.data.lengths(k)) for k in rounds.numbers(b)) for b in course.blocks]
    rates = sorted([tokens[0] / 0.01, tokens[1] / 0.01, tokens[2] / 0.1])
    assert facts["tokens_per_second"] == pytest.approx(rates[1])
    assert facts["sequences_per_second"] == pytest.approx(8 * 5 / 0.01)
    assert facts["tokens_per_step"] == pytest.approx(sum(tokens) / 15)
    assert (facts["p10"], facts["p50"], facts["steps"]) == (2.0, 2.0, 15)
    assert facts["block_ms"] == [2.0, 2.0, 2.0]
    assert facts["spread"] == 0.0
    assert facts["doubts"] == ["3 blocks"]


@pytest.mark.parametrize(
    ("blocks", "canaries", "doubts"),
    [
        ([([2.0] * 5, 10.1, 1)] * 5, [1.0], []),
        ([([2.0] * 5, 10.6, 1)] * 5, [1.0], ["clocks differ by 6.0%"]),
        ([([2.0] * 5, 10.0, 1)] * 3 + [([9.0] * 5, 45.0, 2)] * 2, [1.0] * 4 + [2.0], []),
        ([([2.0] * 5, 10.0, 1)] * 2 + [([9.0] * 5, 45.0, 2)] * 3, [1.0] * 4 + [2.0],
         ["3 of 5 blocks beside a busy moment"]),
    ],
    ids=["fine", "clocks", "thrown away", "busy"],
)  # fmt: skip
def test_what_speaks_against_a_row_is_told(blocks, canaries, doubts):
    """Blocks beside a slow canary do not count."""
    plan = replace(PLAN, blocks=5)
    facts = rounds.timed_facts(course_of(*blocks), job_of(plan), canaries)
    assert facts["doubts"] == doubts
    assert facts["p90"] == 2.0


def test_clock_and_power_are_read_where_they_are_told():
    assert rounds.read_clock("1980, 512.34") == (1980, 512.34)
    assert rounds.read_clock("[N/A], 512.34") == (None, 512.34)
    assert rounds.read_clock("") == (None, None)


# ----------------------------------------------------------------- learning


def test_a_curve_outside_the_others_band_has_not_learned_alike():
    """Two peers of three seeds each; one that learns more slowly, one that does not learn."""
    a = [[1.0, 0.50, 0.20], [1.0, 0.54, 0.22], [1.0, 0.58, 0.24]]
    b = [[1.0, 0.52, 0.21], [1.0, 0.55, 0.22], [1.0, 0.57, 0.23]]
    slow = [[1.0, 0.80, 0.40]] * 3
    judged = learning.judge({"a": a, "b": b})
    assert judged["a"] == judged["b"] == {"inside": 1.0, "learned": True, "passed": True}
    assert learning.inside(slow, a) == pytest.approx(1 / 3)
    stuck = [[1.0, 0.99, 0.98]] * 2
    assert learning.judge({"a": stuck, "b": stuck})["a"]["passed"] is False
    assert learning.judge({"a": a}) == {}


# ----------------------------------------------------------------- the rows


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> list[dict]:
    """What a run of the tiny workload writes, the one that is learned from among it."""
    out = tmp_path_factory.mktemp("out") / "rows.jsonl"
    ceilings = Ceilings(copy=4.3e12, matmul=790e12, nominal_copy=4.8e12, nominal_matmul=989e12)
    kinds = [Minift, Transformers, TorchUnpadded, peers.TorchGraphs]
    session = finetune.Session(CPU, "bf16", 0, kinds, ceilings, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "WINDOW", 5)
        learned = finetune.learn_rows(TINY, session, [0, 1], 5)
    finetune.run_workload(TINY, session, Plan(warm_up=2, blocks=2, steps=3), learned)
    return [json.loads(line) for line in out.read_text().splitlines()]


def documented() -> list[str]:
    """The keys that the head of bench/finetune.py explains, in their order."""
    names = re.findall(r"^    ([a-z_0-9, \n]+?)(?:  +\S|$)", finetune.__doc__, re.MULTILINE)
    words = [re.findall(r"[a-z_0-9]+", name) for name in names]
    return [word for line in words for word in line]


def test_a_row_holds_what_is_documented_and_nothing_else(written):
    """On a CPU without the GPU's name and driver."""
    mine = next(row for row in written if row["bench"] == "finetune" and row["peer"] == "minift")
    known = set(documented())
    assert set(mine) <= known
    assert known - set(mine) == {"gpu", "driver"}


def test_every_peer_has_a_row_and_says_why_it_has_no_time(written):
    rows = {row["peer"]: row for row in written if row["bench"] == "finetune"}
    assert list(rows) == ["minift", "transformers", "torch unpadded", "torch unpadded, graphs"]
    assert [row["status"] for row in rows.values()] == ["timed"] * 3 + ["unavailable"]
    last = rows["torch unpadded, graphs"]
    assert last["reason"] == "CUDA graphs need a GPU"
    assert not last["trusted"]
    mine = rows["minift"]
    others = {name: rows[name]["tokens_per_second"] for name in ("transformers", "torch unpadded")}
    assert mine["best_peer"] == max(others, key=others.get)
    assert mine["ratio_to_best_peer"] == mine["tokens_per_second"] / max(others.values())
    assert mine["ratio_to_default_peer"] == mine["tokens_per_second"] / others["transformers"]
    assert mine["check"]["passed"]
    assert mine["doubts"][0] == "2 blocks"
    assert mine["of_floor"] == pytest.approx(mine["floor_ms"] / mine["p50"])
    assert mine["mfu_measured"] / mine["mfu_nominal"] == pytest.approx(989 / 790)
    rate = mine["model_tflop"] / mine["tokens_per_step"] * mine["tokens_per_second"]
    assert mine["mfu_nominal"] == pytest.approx(rate / 989)


def test_curves_are_written_with_their_verdict(written):
    curves = [row for row in written if row["bench"] == "learning"]
    assert [row["peer"] for row in curves] == ["minift", "transformers", "torch unpadded"]
    for row in curves:
        assert (len(row["loss"]), row["steps"], row["window"]) == (1, 5, 5)
        assert all(len(point) == 2 for point in row["loss"])
        assert row["passed"] is False  # nobody learns in 5 steps
    mine = next(row for row in written if row["peer"] == "minift" and row["bench"] == "finetune")
    assert "learns other than its peers: see learning" in mine["doubts"]
    assert mine["learning"]["inside"] == curves[0]["inside"]


def test_a_peer_with_an_advantage_is_not_the_one_to_beat():
    rows = [
        {"peer": "minift", "status": "timed", "comparable": True, "tokens_per_second": 30.0},
        {"peer": "minift, no graph", "status": "timed", "comparable": True,
         "tokens_per_second": 40.0},
        {"peer": "half", "status": "timed", "comparable": False, "tokens_per_second": 50.0},
        {"peer": "fair", "status": "timed", "comparable": True, "tokens_per_second": 20.0},
    ]  # fmt: skip
    finetune.add_ratios(rows)
    assert (rows[0]["best_peer"], rows[0]["ratio_to_best_peer"]) == ("fair", 1.5)
    assert rows[0]["ratio_to_default_peer"] is None


def test_a_loss_that_is_no_number_is_told():
    row = {"peer": "transformers", "doubts": [], "first_loss": 0.7, "last_loss": float("nan"),
           "check": None, "learning": None}  # fmt: skip
    finetune.add_doubts(row)
    assert row["trusted"] is False
    assert row["doubts"] == ["last_loss is no finite number"]


def test_what_is_no_number_is_written_as_null(tmp_path):
    """At any depth: JSON has no NaN, and a row is not lost for one."""
    out = tmp_path / "rows.jsonl"
    session = finetune.Session(CPU, "bf16", 0, [], Ceilings(1.0), out)
    row = {"p50": float("inf"), "check": {"cosine": float("nan")}, "loss": [[1.0, float("nan")]]}
    session.write(row)
    assert json.loads(out.read_text()) == {
        "p50": None, "check": {"cosine": None}, "loss": [[1.0, None]],
    }  # fmt: skip


def test_a_workload_that_fails_does_not_stop_the_next(monkeypatch, capsys, tmp_path):
    """It is told, and the last line is still JSON with the others."""
    ran = []

    def fail_first(workload, session, plan, learned):
        ran.append((workload.name, session.exact))
        if len(ran) == 1:
            raise RuntimeError("the GPU is lost")
        return [{"peer": "minift", "status": "failed"}]

    monkeypatch.setattr(finetune, "run_workload", fail_first)
    monkeypatch.setattr(finetune, "measure_ceilings", lambda *args, **kwargs: Ceilings(1.0))
    flags = ["--out", str(tmp_path / "rows.jsonl"), "--workload", "BERT-base SST-2"]
    monkeypatch.setattr(sys, "argv", ["finetune", *flags, "MiniLM-L6 SST-2"])
    summary = finetune.run(finetune.parse_args(), CPU)
    assert ran == [("BERT-base SST-2", True), ("MiniLM-L6 SST-2", False)]
    assert summary["BERT-base SST-2"] == {"failed": "RuntimeError: the GPU is lost"}
    assert summary["MiniLM-L6 SST-2"]["p50"] is None


def test_without_an_h200_there_is_no_floor():
    facts = {"p50": 1.0, "tokens_per_second": 1e6, "tokens_per_step": 30}
    found = finetune.speed_facts(TINY, [[10, 20]], facts, Ceilings(1e10, 1e12))
    assert found["mfu_nominal"] is found["of_target"] is found["floor_ms"] is None
    assert found["mfu_measured"] > 0


def test_names_of_peers_and_workloads_are_checked():
    assert finetune.chosen(peers.PEERS, ["transformers", "minift"]) == [Minift, Transformers]
    assert finetune.chosen(WORKLOADS, []) == WORKLOADS
    with pytest.raises(SystemExit, match=r"expected 'BERT-base SST-2'.*got 'BERT-huge'"):
        finetune.chosen(WORKLOADS, ["BERT-huge"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_chooses_what_to_run(monkeypatch, capsys):
    """On a CPU, transformers' Trainer; with --tiny, side by side; no GPU, no run on one."""
    ran = []
    monkeypatch.setattr(finetune, "run", lambda args, device: ran.append("side") or {})
    monkeypatch.setattr(finetune.trainers, "run", lambda args: ran.append("trainer") or {})
    for flags in (["--device", "cpu"], ["--tiny"], []):
        monkeypatch.setattr(sys, "argv", ["finetune", *flags])
        finetune.main()
    assert ran == ["trainer", "side", "trainer"]
    assert capsys.readouterr().out == "{}\n" * 3
    monkeypatch.setattr(sys, "argv", ["finetune", "--device", "cuda"])
    with pytest.raises(SystemExit, match="expected a GPU"):
        finetune.main()
