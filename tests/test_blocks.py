"""Whole blocks of BERT and GPT with the kernels: what runs in a step, and that it learns alike."""

from collections import Counter

import pytest
import torch
from accuracy import DEVICE
from definitions import DEFINITIONS
from launches import Operations, recorded
from tiny_gpt import Sizes, TinyGPT

from minift.batch import Example, collate
from minift.bert import BertClassifier
from minift.config import ModelConfig
from minift.layers import Shadows, init_weights
from minift.ops import TORCH, TRITON, Draw
from minift.optim import leaves_of
from minift.step import Gradients, OptimizerStep
from minift.tasks.classification import Classification

LAUNCHED = 27  # of a layer, forward and backward, at most


def bert(n_layer, dim=768, heads=12, vocab=100, positions=512, p=0.1):
    config = ModelConfig(
        vocab_size=vocab, max_len=positions, n_types=2, dim=dim, n_layer=n_layer, n_head=heads,
        ffn_dim=4 * dim, activation="gelu_erf", norm_eps=1e-12,
        embedding_dropout=p, hidden_dropout=p, attention_dropout=p, classifier_dropout=p,
        init_std=0.02, labels=("a", "b"),
    )  # fmt: skip
    return BertClassifier(config)


def gpt(n_layer, dim=768, heads=12, vocab=100, positions=512, p=0.1):
    return TinyGPT(Sizes(vocab, positions, dim, n_layer, heads, p))


def made(make, n_layer, **sizes):
    model = make(n_layer, **sizes)
    init_weights(model, 0.2 if sizes else 0.02, seed=0)
    return model.to(DEVICE)


def examples(lengths, vocab=100):
    g = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(vocab, (n,), generator=g).tolist(), [0] * n, i % 2)
        for i, n in enumerate(lengths)
    ]


# ------------------------------------------------------------------- what runs


def launched(make, n_layer, lengths) -> Counter:
    """Kernels and torch's operations of the gradients of one step in bf16, nothing launched."""
    model = made(make, n_layer)
    batch = collate(examples(lengths), range(len(lengths)), train=True)
    shadows = Shadows(model, torch.bfloat16)
    draw = Draw(torch.tensor(1, device=DEVICE), torch.tensor(0, device=DEVICE))
    task = Classification(("a", "b"))
    gradients = Gradients(model, task, TRITON, torch.bfloat16, draw, shadows)
    with recorded(run=False) as seen, Operations() as plan:
        gradients.add(batch.to(DEVICE))
    return Counter(launch.kernel for launch in seen) + Counter(plan.ran)


MIXES = {"short": [20, 40, 4], "long": [100, 120], "both": [20, 100]}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("make", [bert, gpt])
def test_kernels_of_a_layer(make, mix, capsys):
    """A layer is what a model of three has and one of two has not. GEMMs are in it; of torch there
    is nothing else but the sum of the query, key and value bias: no pointwise kernel, no cast, no
    copy, no fill."""
    layer = launched(make, 3, MIXES[mix]) - launched(make, 2, MIXES[mix])
    with capsys.disabled():
        names = ", ".join(f"{n} {name}" for name, n in sorted(layer.items()))
        print(f"\n{make.__name__}, {mix}: {layer.total()} kernels a layer: {names}")
    assert layer.total() <= LAUNCHED
    ours = {name for name in layer if name.endswith("_kernel")}
    assert {name: layer[name] for name in set(layer) - ours} == {"addmm": 1, "mm": 11, "sum": 1}


# ------------------------------------------------------------------- that it learns alike

SMALL = {"dim": 32, "heads": 2, "vocab": 40, "positions": 72}
LENGTHS = (3, 9, 66, 5, 1, 12, 8, 2, 4, 6)  # one that is not short
STEPS = 20


def losses(make, ops, dtype) -> torch.Tensor:
    """(STEPS,) of AdamW, clipped, with dropout everywhere; in bf16 with fp32 masters."""
    model = made(make, 1, p=0.2, **SMALL).to(torch.promote_types(dtype, torch.float32))
    data = examples(LENGTHS, SMALL["vocab"])
    half = dtype == torch.bfloat16 and ops.masters
    shadows = Shadows(model, dtype) if half else None
    masters = {shadows.leaves[n]: p.detach() for n, p in shadows.masters.items()} if half else None
    groups = [{"params": [*leaves_of(model, shadows).values()], "lr": 2e-3, "weight_decay": 0.01}]
    optimizer = ops.adamw(groups, (0.9, 0.999), 1e-8, 1.0, masters)
    task, step = Classification(("a", "b")), torch.tensor(0, device=DEVICE)
    draw, seen = Draw(torch.tensor(1, device=DEVICE), step), []
    take = OptimizerStep(Gradients(model, task, ops, dtype, draw, shadows), optimizer)
    for index in range(STEPS):
        batch = collate(data, [(index + i) % len(data) for i in range(2)], train=True)
        seen.append(take(index, [batch]).loss)
    return torch.tensor(seen).double()


PAIRS = [(bert, torch.bfloat16), pytest.param(gpt, torch.float32, marks=pytest.mark.slow)]
if DEVICE == "cuda":  # in the interpreter a pair takes ten seconds or more
    PAIRS += [(bert, torch.float32), (gpt, torch.bfloat16)]


@pytest.mark.parametrize(("make", "dtype"), PAIRS)
def test_trains_as_the_definitions_do(make, dtype):
    """Twenty losses of the kernels, and of plain torch's table: none is further from those of the
    definitions in fp64 than twice the furthest of the definitions in the same dtype."""
    exact, same_dtype = (losses(make, DEFINITIONS, d) for d in (torch.float64, dtype))
    assert exact.max() - exact.min() > 0.1  # it does learn
    for ops in (TORCH, TRITON):
        actual = losses(make, ops, dtype)
        error, allowed = (actual - exact).abs().max(), 2 * (same_dtype - exact).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps * exact.max()
