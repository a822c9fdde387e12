"""bench/floors.py: the published table, flops as torch counts them, lengths as they are."""

import bench_package  # noqa: F401
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import floors
from bench.floors import BERT_WORK, GPT_WORK, H200, Machine, Sizes, Work, floor_of
from bench.unpadded import Unpadded, pack
from bench.workloads import MODELS, TINY, make_examples
from minift.batch import collate
from minift.bert import BertClassifier
from minift.config import ModelConfig
from minift.layers import init_weights
from minift.ops import TORCH


@pytest.mark.parametrize(
    ("model", "work", "ideal", "floor", "target"),
    [
        ("BERT-base", BERT_WORK["SST-2 unpadded"], 0.91, 1.31, 2.18),
        ("MiniLM-L6", BERT_WORK["SST-2 unpadded"], 0.18, 0.24, 0.55),
        ("BERT-base", BERT_WORK["SQuAD unpadded"], 3.80, 4.66, 6.98),
        ("BERT-base", BERT_WORK["SQuAD padded to 384"], 8.70, 9.49, 13.60),
        ("BERT-large", BERT_WORK["full 384"], 30.24, 34.60, 45.23),
        ("GPT-2 124M", GPT_WORK["64 x 1024"], 66.99, 76.35, 100.18),
    ],
)
def test_the_table_is_the_one_that_the_goals_were_taken_from(model, work, ideal, floor, target):
    found = floor_of(Sizes.of(model), work)
    assert (found.ideal, found.floor, found.target) == pytest.approx(
        (ideal, floor, target), abs=0.00501
    )


@pytest.mark.parametrize(
    ("model", "millions"), [("BERT-base", 109.5), ("BERT-large", 335.1), ("GPT-2 124M", 124.4)]
)
def test_parameters_are_those_of_the_published_models(model, millions):
    assert Sizes.of(model).parameters / 1e6 == pytest.approx(millions, abs=0.05)


def tiny() -> BertClassifier:
    raw = MODELS["tiny"] | {"id2label": {"0": "a", "1": "b"}}
    model = BertClassifier(ModelConfig.from_hf(raw))
    init_weights(model, 0.02, seed=0)
    return model


def test_parameters_are_those_of_a_model():
    count = sum(p.numel() for p in tiny().parameters())
    assert Sizes.of("tiny").parameters == count


def test_model_flops_are_those_that_torch_counts():
    """Forward and backward of real lengths, with attention as two products for each sequence. The
    classifier's two columns and the products of its backward are the only difference."""

    def products(q, k, v, batch, p):
        sizes = batch.cu_seqlens.diff().tolist()
        parts = [x.transpose(0, 1).split(sizes, dim=1) for x in (q, k, v)]
        outs = [(a @ b.mT).softmax(-1) @ c for a, b, c in zip(*parts, strict=True)]
        return torch.cat(outs, dim=1).transpose(0, 1)

    examples = make_examples(TINY, 1, seed=0)
    lengths = [len(example.tokens) for example in examples]
    assert len(set(lengths)) > 3
    module = Unpadded(tiny(), products)
    with FlopCounterMode(display=False) as counter:
        module(pack(examples, TINY.longest)).backward()
    head = 6 * len(examples) * 64 * 2
    counted = counter.get_total_flops() - head
    assert counted == floors.model_flops(Sizes.of("tiny"), Work.of(lengths))


@pytest.mark.parametrize("first_only", [True, False], ids=["first tokens", "all tokens"])
def test_the_matmuls_of_a_step_are_those_that_are_run(first_only):
    """minift's model computes first tokens alone in the last layer, the module in torch all."""
    examples, model = make_examples(TINY, 1, seed=0), tiny()
    batch = collate(examples, range(len(examples)), train=True)
    packed = pack(examples, TINY.longest)
    with FlopCounterMode(display=False) as counter:
        if first_only:
            model(batch, TORCH).sum().backward()
        else:
            Unpadded(model, lambda q, k, v, batch, p: v.clone())(packed).backward()
    tokens = len(batch.tokens if first_only else packed.tokens)
    shapes = floors.step_matmuls(Sizes.of("tiny"), tokens, len(examples), first_only)
    flops = sum(2 * count * M * N * K for count, M, N, K in shapes)
    products = counter.get_flop_counts()["Global"]
    matmuls = (torch.ops.aten.mm, torch.ops.aten.addmm)
    assert sum(n for op, n in products.items() if op in matmuls) == flops


def test_a_list_of_lengths_is_what_its_statistics_say():
    """And padding costs time, but is no work of the model's."""
    lengths = [10, 20, 30, 40]
    sizes, packed = Sizes.of("BERT-base"), Work.of(lengths)
    mean, variation = 25, (125 / 625) ** 0.5
    like = Work.like(4, mean, variation)
    assert (like.tokens, like.real) == (packed.tokens, packed.real) == (100, 100)
    assert like.squares == pytest.approx(packed.squares)
    padded = Work.of(lengths, width=40)
    assert (padded.tokens, padded.squares, padded.real) == (160, 6400, 100)
    ours, theirs = floor_of(sizes, packed), floor_of(sizes, padded)
    assert theirs.floor > ours.floor
    assert theirs.model_flops == ours.model_flops


def test_the_mean_over_steps_is_the_mean():
    sizes, steps = Sizes.of("MiniLM-L6"), [[10] * 32, [40] * 32]
    alone = [floor_of(sizes, Work.of(lengths)) for lengths in steps]
    both = floors.mean_floor(sizes, steps)
    assert both.target == pytest.approx((alone[0].target + alone[1].target) / 2)
    assert both.kernels == alone[0].kernels


def test_measured_rates_take_the_place_of_the_assumed_ones():
    """A machine of half the rates takes twice as long; what is not measured stays."""
    sizes, work = Sizes.of("BERT-large"), BERT_WORK["full 384"]
    half = Machine(matmul=395e12, copy=2.15e12, exps=H200.exps / 2)
    assert floor_of(sizes, work, half).floor == pytest.approx(2 * floor_of(sizes, work).floor)
    assert floors.measured(None, 4e12) == Machine(copy=4e12)
    assert floors.measured(700e12, None) == Machine(matmul=700e12)


def test_causal_scores_are_half_of_the_model_flops():
    gpt = Sizes.of("GPT-2 124M")
    work = Work.like(1, 1024, 0.0)
    head = 6 * 768 * 50257 * 1024
    attention = floors.model_flops(gpt, work) - 6 * gpt.matrices * 1024 - head
    assert attention == 6 * 12 * 768 * 1024**2


def test_the_tables_are_printed():
    lines = floors.table_lines()
    line = next(line for line in lines if line.startswith("BERT-base SST-2 unpadded"))
    assert line.split()[3:7] == ["800", "0.41", "0.91", "1.31"]
    detail = floors.detail_lines("BERT-base SST-2 unpadded")
    total = sum(int(line[36:42]) * float(line[61:71]) for line in detail[1:])
    assert total == pytest.approx(1310, abs=5)
    with pytest.raises(SystemExit, match="expected a model and lengths"):
        floors.detail_lines("BERT-base novels")
