"""minift/ops.py: the tables of operations, how one is chosen, and what all operations promise."""

import inspect
from dataclasses import fields, replace

import pytest
import torch
from accuracy import DEVICE

from minift import ops
from minift.batch import Example, collate
from minift.bert import BertClassifier
from minift.config import ModelConfig
from minift.layers import init_weights
from minift.ops import IGNORE_INDEX, TABLES, TORCH, TRITON, Draw, Layout, Norm, Ops, ops_for
from minift.tasks.classification import Classification

FACTS = {"masters", "captured"}
NAMES = [f.name for f in fields(Ops) if f.name not in FACTS]
IN_MODEL = ["draw_dropout", "attention", "attention_at", "add_norm", "bias_gelu", "embed", "drop"]


# ---------------------------------------------------------------- the tables


def test_tables_have_the_same_operations():
    """Every operation is there, with the same parameters by name, order and default."""
    assert TABLES == {"torch": TORCH, "triton": TRITON}
    for name in NAMES:
        torch_op, triton_op = getattr(TORCH, name), getattr(TRITON, name)
        assert callable(torch_op)
        assert callable(triton_op)
        signatures = [inspect.signature(op).parameters for op in (torch_op, triton_op)]
        each = [[(p.name, p.default, p.kind) for p in s.values()] for s in signatures]
        assert each[0] == each[1], name


def test_the_device_chooses_the_table(monkeypatch):
    """With a TRITON of its own, so that the tables can be told apart while they hold the same."""
    kernels = replace(TORCH)
    monkeypatch.setattr(ops, "TRITON", kernels)
    assert ops_for(torch.device("cpu")) is TORCH
    assert ops_for(torch.device("cuda")) is kernels
    assert ops_for(torch.device("cuda", 1)) is kernels


def tiny():
    """(model, batch, draw)"""
    config = ModelConfig(
        vocab_size=20, max_len=8, n_types=2, dim=8, n_layer=2, n_head=2, ffn_dim=16,
        activation="gelu_erf", norm_eps=1e-12,
        embedding_dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1,
        classifier_dropout=0.1, init_std=0.5, labels=("a", "b"),
    )  # fmt: skip
    model = BertClassifier(config)
    init_weights(model, config.init_std, seed=0)
    examples = [Example([1, 2, 3], [0, 0, 1], 0), Example([4, 5], [0, 0], 1)]
    draw = Draw(torch.tensor(0, device=DEVICE), torch.tensor(0, device=DEVICE))
    return model.to(DEVICE), collate(examples, [0, 1]).to(DEVICE), draw


class Called(Exception):
    pass


def raising(name):
    def operation(*args, **kwargs):
        raise Called

    return replace(TORCH, **{name: operation})


@pytest.mark.parametrize("name", IN_MODEL)
def test_model_takes_this_operation_from_its_table(name):
    """A model that reached around its table would never run a kernel."""
    model, batch, draw = tiny()
    model(batch, TORCH, draw=draw)
    with pytest.raises(Called):
        model(batch, raising(name), draw=draw)


def test_every_other_operation_is_the_trainers():
    """Or a decoder's, or a model's with a prefix; so the list above is complete. Of a language
    model's head linear_cross_entropy is a part."""
    others = {"cross_entropy", "linear_cross_entropy", "adamw", "attention_step_"}
    others |= {"attention_prefix"}  # test_adapter_training.py
    assert {*NAMES} == {*IN_MODEL, *others}
    _, batch, _ = tiny()
    logits = torch.zeros(2, 2, device=DEVICE)
    task = Classification(("a", "b"))
    assert task.loss(logits, batch, TORCH).isfinite()
    with pytest.raises(Called):
        task.loss(logits, batch, raising("cross_entropy"))


def test_model_without_a_table_takes_the_devices():
    """Same bits as when it is handed over."""
    model, batch, draw = tiny()
    table = ops_for(torch.device(DEVICE))
    assert torch.equal(model(batch, draw=draw), model(batch, table, draw=draw))


# ---------------------------------------------------------------- inputs are only read


def calls(dtype):
    """name: (float inputs, other inputs, call); an operation sees them as the models pass them."""
    torch.manual_seed(0)
    T, C = 10, 12

    def rand(*shape, dtype=dtype):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    draw = Draw(torch.tensor(3, device=DEVICE), torch.tensor(1, device=DEVICE))
    key = torch.arange(T, device=DEVICE)
    dropout = TORCH.draw_dropout(draw, key, 16, 3, 2).at(1, 0.3)
    words = [dropout.rows, dropout.columns, dropout.places]
    ids = tuple(torch.randint(4, (T,), device=DEVICE) for _ in range(2))
    target = torch.randint(3, (T,), device=DEVICE)
    target[2] = IGNORE_INDEX
    listed = torch.tensor([1, 2, 5, 9], device=DEVICE)

    def attention(lengths):
        layout = Layout.pack(lengths, T).to(DEVICE)
        kept = [layout.cu_seqlens, *(x for g in layout.groups for x in (g.gather, g.real))]
        kept = [x for x in kept if x is not None]

        def call(qkv):
            return TORCH.attention(qkv, layout, 2, causal=True, dropout=dropout)

        return [rand(T, 6, 4)], words + kept, call

    def attention_at(lengths):
        layout = Layout.pack(lengths, T).to(DEVICE)

        def call(qkv):
            return TORCH.attention_at(qkv, layout, 2, layout.first, dropout)

        return [rand(T, 6, 4)], [*words, layout.first], call

    def wide(*shape):
        return rand(*shape, dtype=torch.float32)

    return {
        "attention, view of one": attention([10]),
        "attention, view": attention([5, 5]),
        "attention, gather": attention([3, 5]),
        "attention_at": attention_at([3, 5]),
        "add_norm": (
            [rand(T, C), rand(T, C), wide(C), wide(C), wide(C)],
            words,
            lambda x, r, w, nb, b: TORCH.add_norm(x, r, Norm(w, nb, 1e-5), b, dropout),
        ),
        "add_norm without bias or dropout": (
            [rand(T, C), rand(T, C), wide(C), wide(C)],
            [],
            lambda x, r, w, nb: TORCH.add_norm(x, r, Norm(w, nb, 1e-5)),
        ),
        "bias_gelu": (
            [rand(T, C), wide(C)],
            [],
            lambda x, b: TORCH.bias_gelu(x, b, "gelu_erf"),
        ),
        "bias_gelu without bias": (
            [rand(T, C)],
            [],
            lambda x: TORCH.bias_gelu(x, None, "gelu_tanh"),
        ),
        "embed": (
            [wide(4, C), wide(4, C), wide(C), wide(C)],
            [*ids, *words],
            lambda a, b, w, nb: TORCH.embed(ids, (a, b), Norm(w, nb, 1e-5), dtype, dropout),
        ),
        "embed of one table": (
            [wide(4, C)],
            [ids[0]],
            lambda a: TORCH.embed(ids[:1], (a,), None, dtype),
        ),
        "drop": ([rand(T, C)], words, lambda x: TORCH.drop(x, dropout)),
        "cross_entropy": (
            [rand(T, 3)],
            [target],
            lambda x: TORCH.cross_entropy(x, target, None, 0.1),
        ),
        "linear_cross_entropy": (
            [rand(T, C), wide(5, C), wide(5)],
            [target, listed],
            lambda x, w, b: TORCH.linear_cross_entropy(
                x, w, target[listed], listed, bias=b, workspace_mib=1e-6
            ),
        ),
        "linear_cross_entropy of all rows": (
            [rand(T, C), rand(5, C)],
            [target],
            lambda x, w: TORCH.linear_cross_entropy(x, w, target),
        ),
        "draw_dropout": (
            [rand(1)],
            [key, draw.seed, draw.step],
            lambda x: x * TORCH.draw_dropout(draw, key, 16, 3, 2).rows.sum(),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", calls(torch.float32))
def test_inputs_are_never_written_to(name, dtype):
    """Neither in the forward pass nor backward, nor the gradient that comes in; autograd's
    version counters, which see a write of the same value too, stand still."""
    inputs, others, call = calls(dtype)[name]
    leaves = [x.requires_grad_() for x in inputs]
    watched = [*leaves, *others]
    before = [(x.detach().clone(), x._version) for x in watched]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [torch.randn_like(y) for y in results]
    after_forward = [y.detach().clone() for y in results]
    sent = [g.clone() for g in upstream]
    torch.autograd.backward(results, upstream)
    for x, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    for now, then in zip([*results, *upstream], after_forward + sent, strict=True):
        assert torch.equal(now, then)
