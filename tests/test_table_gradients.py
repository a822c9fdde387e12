"""kernels/table_gradients.py: gradients in memory that is kept are those in new memory."""

from dataclasses import replace

import pytest
import torch
from accuracy import DEVICE
from kit import poison
from launches import compilations, launches_are_declared, recorded

from minift.kernels import table_gradients as module
from minift.kernels.embed import embed
from minift.kernels.embed_order import EmbedOrder
from minift.kernels.table_gradients import TableGradients
from minift.ops import TORCH, Norm

ROWS, C = (50, 20, 2), 24
OPS = [TORCH.embed, embed] if DEVICE == "cpu" else [embed]
each_way = pytest.mark.parametrize("fn", OPS, ids=["torch", "kernels"][-len(OPS) :])


def parameters(frozen=()):
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(n, C, generator=g).to(DEVICE) for n in ROWS]
    return [x.requires_grad_(k not in frozen) for k, x in enumerate(tables)]


def batch(T, seed):
    g = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(n, (T,), generator=g) for n in ROWS)
    return tuple(i.to(DEVICE) for i in ids), EmbedOrder.sort(ids).to(DEVICE)


def backward(fn, tables, T, seed, kept=None):
    """Adds to the tables' gradients those of a batch, which `seed` names."""
    ids, order = batch(T, seed)
    norm = Norm(torch.linspace(-1, 2, C, device=DEVICE), torch.ones(C, device=DEVICE), 1e-5)
    y = fn(ids, tuple(tables), norm, torch.float32, None, replace(order, gradients=kept))
    y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).sin())


def grads(tables):
    return [None if x.grad is None else x.grad.clone() for x in tables]


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def expected(fn, *seeds, frozen=(), T=70):
    tables = parameters(frozen)
    for seed in seeds:
        backward(fn, tables, T, seed)
    return grads(tables)


def forget(tables):
    for x in tables:
        x.grad = None


@each_way
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=str)
def test_five_steps_in_one_memory(fn, frozen):
    """The same bits as in new memory, batch after batch of other ids and sizes, and autograd takes
    the memory as it is: no copy, no new one."""
    tables, kept, places = parameters(frozen), TableGradients(), set()
    for seed, T in enumerate((70, 3, 200, 1, 70)):
        backward(fn, tables, T, seed, kept)
        kept.settle()
        assert same(grads(tables), expected(fn, seed, frozen=frozen, T=T)), seed
        places |= {tuple(x.grad.data_ptr() for x in tables if x.grad is not None)}
        forget(tables)
        kept.clear()
        assert not kept._memory.any()
    assert len(places) == 1


@each_way
def test_micro_batches_add_up(fn):
    """The second finds the memory taken; what it adds is cleared too."""
    tables, kept = parameters(), TableGradients()
    for seeds in ((1, 2, 3), (4,), (5, 6)):
        for seed in seeds:
            backward(fn, tables, 70, seed, kept)
        kept.settle()
        assert same(grads(tables), expected(fn, *seeds))
        forget(tables)
        kept.clear()


@each_way
def test_who_writes_to_a_gradient_is_noticed(fn):
    """Noise in every row, by a hook: the next step does not see it. Scaling all of them after
    `settle`, as clipping does, costs no fill and leaves nothing behind either."""
    tables, kept = parameters(), TableGradients()
    backward(fn, tables, 70, 1, kept)
    tables[0].grad += 1
    kept.settle()
    forget(tables)
    kept.clear()
    backward(fn, tables, 70, 2, kept)
    kept.settle()
    assert same(grads(tables), expected(fn, 2))
    tables[0].grad *= 0.5
    forget(tables)
    kept.clear()
    assert not kept._memory.any()


@each_way
def test_two_backward_passes_of_one_batch(fn):
    tables, kept = parameters(), TableGradients()
    ids, order = batch(70, 1)
    order = replace(order, gradients=kept)
    y = fn(ids, tuple(tables), None, torch.float32, None, order).sin().sum()
    y.backward(retain_graph=True)
    once = grads(tables)
    y.backward()
    assert same(grads(tables), [2 * x for x in once])
    kept.settle()
    forget(tables)
    kept.clear()
    assert not kept._memory.any()


@each_way
def test_tables_of_other_sizes_get_other_memory(fn):
    """A user who trains another model with the same state."""
    kept = TableGradients()
    for scale in (1, 2):
        tables = [x.detach().repeat(scale, 1).requires_grad_() for x in parameters()]
        backward(fn, tables, 70, 1, kept)
        kept.settle()
        assert same([x.grad[: len(x) // scale] for x in tables], expected(fn, 1))
        forget(tables)
        kept.clear()


def test_only_touched_rows_are_cleared():
    """Poison in the others stays: that is what is spared. Long segments, and ids that are none."""
    tables, kept = parameters(), TableGradients()
    ids = [torch.zeros(150).long(), torch.arange(150) % 20, torch.arange(150) % 2]
    ids[0][:4] = torch.tensor([7, 49, -1, 50])
    order = EmbedOrder.sort(ids).to(DEVICE)
    ids = [i.to(DEVICE) for i in ids]
    kept.take(tables, (True, False, True), ids, order)[0].add_(1)
    kept.settle()
    kept.clear()  # everything, and that is forgotten
    parts = kept.take(tables, (True, False, True), ids, order)
    for part in (parts[0], parts[2]):
        poison(part.data)
    with recorded() as seen:
        kept.clear()
    assert [launch.kernel for launch in seen] == ["_clear_kernel"]
    touched = torch.zeros(50, dtype=torch.bool, device=DEVICE)
    touched[[0, 7, 49]] = True
    assert (parts[0][touched] == 0).all()
    assert parts[0][~touched].isnan().all()
    assert parts[1] is None
    assert (parts[2] == 0).all()


def test_launches_are_those_that_are_declared():
    """And neither the number of rows nor their ids make another binary."""
    with recorded(run=False) as seen:
        for K in (2, 3):
            tables = [torch.zeros(n, 768, device=DEVICE) for n in ROWS][:K]
            for T in (5, 64, 300):
                ids = [torch.zeros(T, device=DEVICE).long()] * K
                kept = TableGradients()
                kept.take(tables, (True,) * K, ids, EmbedOrder.sort(ids).to(DEVICE))
                kept.clear()
    assert launches_are_declared(seen, module) == {launch.name for launch in module.LAUNCHES}
    assert compilations(seen) == 2
