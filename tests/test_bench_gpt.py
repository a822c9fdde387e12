"""bench/gpt_peers.py, plain_gpt.py, the workloads of a GPT: all peers compute the same losses."""

import json
import os
from dataclasses import replace
from pathlib import Path

import bench_package  # noqa: F401
import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench import finetune, learning, peers, rounds
from bench.ceilings import Ceilings
from bench.gpt_peers import GPT_PEERS, GPTCompiled, GPTTransformers, MiniftGPT, Plain, PlainCompiled
from bench.peers import Job, Unavailable
from bench.rounds import Course, Plan
from bench.workloads import LARGE, TINY, TINY_GPT, WORKLOADS, Data, make_examples, train_config
from minift.ops import IGNORE_INDEX

CPU = torch.device("cpu")
KINDS = [MiniftGPT, GPTTransformers, Plain]


@pytest.fixture(autouse=True)
def _no_garbage(monkeypatch):
    """Collecting what transformers leaves takes a second."""
    monkeypatch.setattr(rounds.gc, "collect", lambda: 0)


def job(folder: Path = Path(), dtype: str = "fp32", steps: int = 6) -> Job:
    config = train_config(TINY_GPT, steps, 0, dtype)
    config = replace(config, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5)
    return Job(folder, Data.make(TINY_GPT, steps, 0), config, CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return finetune.write_model(TINY_GPT.model, tmp_path_factory.mktemp("gpt"), seed=0)[0]


def test_blocks_are_full_and_some_tokens_are_frequent():
    """The target of a token is the next one, of the last none; the same blocks for a seed."""
    blocks = make_examples(TINY_GPT, 50, seed=1)
    assert len(blocks) == 50 * TINY_GPT.batch
    tokens, targets = (np.stack([getattr(b, n) for b in blocks]) for n in ("tokens", "target"))
    assert tokens.shape == targets.shape == (200, 48)
    assert (targets[:, :-1] == tokens[:, 1:]).all()
    assert set(targets[:, -1].tolist()) == {IGNORE_INDEX}
    counts = np.sort(np.bincount(tokens.ravel(), minlength=1020))[::-1]
    assert counts[:10].sum() > 5 * counts[500:510].sum() > 0
    assert (make_examples(TINY_GPT, 50, seed=1)[7].tokens == tokens[7]).all()


def test_smaller_micro_batches_are_the_same_steps():
    """Rows and their order stay."""
    data = Data.make(TINY_GPT, 3, 0)
    halved = data.halved()
    assert (data.batch, halved.batch, halved.batches.accumulation) == (4, 4, 4)
    assert [halved.rows(k) for k in range(3)] == [data.rows(k) for k in range(3)]
    assert data.checked().batches.accumulation == 2


def test_a_step_of_the_real_workloads_is_64k_tokens():
    """Of 1,024 each; micro-batches divide it. The smallest model is in the everyday run."""
    gpts = [w for w in (*WORKLOADS, *LARGE) if w.predicts]
    assert [w.name for w in gpts] == [
        f"GPT-2 {size} LM 1024" for size in ("124M", "355M", "774M", "1.5B")
    ]
    assert {w.batch * w.longest for w in gpts} == {65536}
    assert all(w.batch % w.micro_batches == 0 for w in gpts)
    assert gpts[0] is WORKLOADS[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_peers_take_the_same_steps(folder, dtype):
    """Weights, blocks, schedule, clipping and decay are the same in each, or the losses would part.
    The rows that pad the vocabulary are in the plain model's softmax: 4 of 1,024."""
    curves = {}
    for kind in KINDS:
        peer = kind(job(folder, dtype))
        curves[kind.name] = []
        for k in range(6):
            peer.step(k)
            curves[kind.name].append(peer.loss())
    reference = curves["transformers"]
    assert max(reference) - min(reference) > 0.1
    exact = 1e-5 if dtype == "fp32" else 2e-4
    assert curves["minift"] == pytest.approx(reference, rel=exact)
    assert curves["plain torch"] == pytest.approx(reference, rel=1e-3)


def test_gradients_are_the_same(folder):
    """By minift's names, of the first step: minift's and the plain model's beside transformers'."""
    exact = job(folder)
    exact = replace(exact, data=exact.data.checked(), made={})
    reference = learning.start_of(GPTTransformers, exact)
    for kind in (MiniftGPT, Plain):
        found = learning.compare(learning.start_of(kind, exact), reference, "fp32")
        assert found["passed"]
        assert found["cosine"] > 0.9999


def test_compiled_peers_compute_with_the_model_that_is_compiled(folder, monkeypatch):
    """All of it, and they say why where nothing compiles."""
    seen = []

    def compiled(model, **options):
        seen.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(peers, "compiles", lambda: True)
    for kind in (GPTCompiled, PlainCompiled):
        peer = kind(job(folder))
        peer.step(0)
        assert peer.loss() == pytest.approx(6.93, abs=0.02)
    assert seen == [{"dynamic": False, "mode": None}] * 2
    monkeypatch.setattr(peers, "compiles", lambda: False)
    with pytest.raises(Unavailable, match="no C compiler"):
        PlainCompiled(job(folder))


def test_a_peer_with_other_losses_is_doubted_before_it_is_timed():
    """Its first, or the one after the steps to warm up; also one that is no number."""

    def course(name, first, last):
        return Course(name, Plain, peer=object(), first_loss=first, last_loss=last)

    courses = [course("a", 6.0, 5.0), course("b", 6.001, 5.01), course("c", 6.0, 5.2)]
    courses += [course("d", 6.1, 5.0), course("e", float("nan"), 5.0)]
    rounds.compare_losses([*courses, Course("f", Plain, "failed")], "bf16")
    assert [len(c.doubts) for c in courses] == [0, 0, 1, 1, 1]
    assert courses[2].doubts == ["last_loss 5.2000 before it was timed, others' 5.0000"]


def test_a_peer_without_memory_has_smaller_micro_batches():
    """Halved until it fits; where nothing is left to halve it has failed."""

    class Large(Plain):
        fits = 1

        def __init__(self, task):
            self.size = task.data.batches.batch_size
            if self.size > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def step(self, k):
            pass

        def loss(self):
            return 1.0

    plan = Plan(warm_up=1, blocks=1, steps=1)
    course = rounds.prepare(Large, job(), plan)
    assert (course.status, course.micro_batches) == ("timed", 4)
    Large.fits = 0
    course = rounds.prepare(Large, job(), plan)
    assert (course.status, course.micro_batches) == ("failed", 4)
    assert course.reason.startswith("OutOfMemoryError")


def test_a_run_writes_rows_that_can_be_trusted_but_for_its_shortness(tmp_path):
    """With the floor of a GPT, what the rows are of, and equal losses checked."""
    out = tmp_path / "rows.jsonl"
    ceilings = Ceilings(copy=4.3e12, matmul=790e12, nominal_copy=4.8e12, nominal_matmul=989e12)
    session = finetune.Session(CPU, "bf16", 0, KINDS, ceilings, out, exact=False)
    finetune.run_workload(TINY_GPT, session, Plan(warm_up=2, blocks=2, steps=3), {})
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["peer"] for row in rows] == ["minift", "transformers", "plain torch"]
    for row in rows:
        assert (row["workload"], row["task"]) == ("tiny GPT-2 LM 48", "lm")
        assert (row["batch"], row["micro_batches"], row["tokens_per_step"]) == (4, 2, 192)
        assert not [doubt for doubt in row["doubts"] if "loss" in doubt]
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["p50"])
    assert rows[0]["check"]["passed"]
    matrices, head, seen = 2 * 12 * 64**2 * 192, 64 * 1020 * 192, 2 * 64 * 4 * 48**2
    assert rows[0]["model_tflop"] * 1e12 == pytest.approx(6 * (matrices + head) + 6 * seen)


def test_peers_are_those_of_the_workload_as_many_as_have_room():
    assert finetune.peers_of(TINY_GPT, []) == list(GPT_PEERS)
    assert finetune.peers_of(TINY, ["minift", "plain torch"]) == [peers.Minift]
    assert finetune.peers_of(TINY_GPT, ["plain torch", "minift"]) == [MiniftGPT, Plain]
    assert len(finetune.peers_of(LARGE[-1], [])) == 3
