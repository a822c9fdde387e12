"""minift.batch: what is packed where, and which examples form a step."""

from array import array
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from accuracy import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from minift import Batches, Example
from minift.batch import OF_LAYOUT, OWN, Batch, bucket, collate, evaluation_batches
from minift.ops import IGNORE_INDEX, EmbedOrder


def make_examples(lengths: list[int]) -> list[Example]:
    """Example i holds tokens i * 1000 + position, so each number says where it is from."""
    return [
        Example([i * 1000 + j for j in range(n)], [j % 2 for j in range(n)], i)
        for i, n in enumerate(lengths)
    ]


def test_collate_packs_by_hand():
    """The header's picture: shortest first, equals in their order, positions from 0, slack 0."""
    examples = make_examples([9, 3, 5, 2, 3])
    batch = collate(examples, [2, 4, 1, 3], first=8)
    assert batch.rows == (3, 4, 1, 2)
    assert batch.targets.tolist() == [3, 4, 1, 2]
    assert batch.layout.lengths == (2, 3, 3, 5)
    slack = [0] * 3
    assert batch.tokens.tolist() == [
        *(3000, 3001),
        *(4000, 4001, 4002),
        *(1000, 1001, 1002),
        *(2000, 2001, 2002, 2003, 2004),
        *slack,
    ]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, *slack]
    assert batch.types.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, *slack]
    # Numbers in the step: where the rows stood in [2, 4, 1, 3], after the 8 before them.
    number = [11] * 2 + [9] * 3 + [10] * 3 + [8] * 5
    assert (batch.key >> 32).tolist() == [*number, *slack]
    assert (batch.key & 0xFFFFFFFF).tolist() == batch.positions.tolist()
    assert batch.layout.rows == 16
    assert batch.layout.cu_seqlens.tolist() == [0, 2, 5, 8, 13]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(0, 99))
def test_collate_loses_nothing(lengths, first):
    """Every sequence comes back whole through the layout, and rows map back to examples."""
    examples = make_examples(lengths)
    rows = list(range(len(lengths)))[::-1]
    batch = collate(examples, rows, first)
    ends = batch.layout.cu_seqlens.tolist()
    assert sorted(batch.rows) == sorted(rows)
    assert list(batch.layout.lengths) == sorted(lengths)
    for b, row in enumerate(batch.rows):
        part = slice(ends[b], ends[b + 1])
        n = lengths[row]
        assert batch.tokens[part].tolist() == examples[row].tokens
        assert batch.types[part].tolist() == examples[row].types
        assert batch.positions[part].tolist() == list(range(n))
        assert (batch.key[part] >> 32).tolist() == [first + rows.index(row)] * n
        assert batch.targets[b] == examples[row].target
    assert len(batch.tokens) == len(batch.types) == len(batch.key) == batch.layout.rows
    assert batch.layout.rows == bucket(sum(lengths))
    real = sum(lengths)
    for x in (batch.tokens, batch.types, batch.positions, batch.key):
        assert x.dtype == torch.int64
        assert x[real:].eq(0).all()


def test_bucket():
    """Few shapes: steps of 16 up to 512 rows, of a 16th of the power of two below from there on."""
    cases = {0: 0, 1: 16, 16: 16, 17: 32, 511: 512, 512: 512, 513: 544, 800: 800, 801: 832,
             1023: 1024, 1025: 1088, 5600: 5632, 5633: 5888}  # fmt: skip
    assert {n: bucket(n) for n in cases} == cases
    assert len({bucket(n) for n in range(4097, 8193)}) == 16


@given(st.integers(1, 10**6))
def test_a_bucket_is_little_larger_than_its_tokens(n):
    """By less than a 16th, or than 16 rows; and a bucket is its own."""
    assert n <= bucket(n) < n + max(16, n / 16)
    assert bucket(n) % 16 == 0
    assert bucket(bucket(n)) == bucket(n)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """All of its tensors, its layout's and its order's, but the memory."""
    found = {}
    for record in (batch, batch.layout, batch.order):
        if record is not None:
            each = {f.name: getattr(record, f.name) for f in fields(record)}
            found |= {name: x for name, x in each.items() if isinstance(x, torch.Tensor)}
    del found["memory"]
    return found


def places(batch: Batch) -> dict[str, tuple]:
    """Of each tensor: byte in memory, dtype, shape, stride."""
    start = batch.memory.data_ptr()
    return {
        name: (x.data_ptr() - start, x.dtype, x.shape, x.stride())
        for name, x in tensors(batch).items()
        if x.numel()
    }


@settings(max_examples=40)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=7), st.booleans(), st.integers(0, 7))
def test_all_tensors_lie_in_one_piece_of_memory(lengths, train, more):
    """None over another, each at a multiple of 16 bytes, with less than 16 to the next."""
    batch = collate(make_examples(lengths), range(len(lengths)), 0, train, len(lengths) + more)
    assert set(tensors(batch)) >= {*OWN, *OF_LAYOUT} - {"at"}
    assert batch.memory.dtype == torch.uint8
    end = 0
    for name, (at, *_) in sorted(places(batch).items(), key=lambda item: item[1][0]):
        x = tensors(batch)[name]
        assert x.untyped_storage().data_ptr() == batch.memory.untyped_storage().data_ptr()
        assert at % 16 == 0
        assert 0 <= at - end < 16
        assert x.is_contiguous()
        end = at + x.nbytes
    assert 0 <= len(batch.memory) - end < 16


def test_a_batch_moves_within_memory():
    """To 'meta', which stands for a GPU: a tensor left behind would fail in the first operation
    there. What the host knows stays what it is; on its own device a batch is itself."""
    batch = collate(make_examples([3, 2]), [0, 1], train=True)
    moved = batch.to("meta")
    assert all(x.is_meta for x in tensors(moved).values())
    assert len(tensors(moved)) == 12
    assert moved.memory.is_meta
    assert (moved.layout.lengths, moved.rows, moved.shape) == ((2, 3), (1, 0), batch.shape)
    assert batch.to("cpu") is batch


def test_a_batch_within_other_memory():
    """At any place of a larger piece; its bytes are not touched."""
    examples = make_examples([3, 9, 2])
    batch = collate(examples, [0, 1, 2], train=True)
    room = torch.full((len(batch.memory) + 48,), 7, dtype=torch.uint8)
    part = room[32:-16]
    slot = batch.within(part)
    assert (room == 7).all()
    assert slot.memory is part
    part.copy_(batch.memory)
    for name, x in tensors(batch).items():
        assert torch.equal(tensors(slot)[name], x), name
    assert places(slot) == places(batch)
    assert (room[:32] == 7).all()
    assert (room[-16:] == 7).all()
    assert slot.rows is batch.rows


@pytest.mark.parametrize("size", [(0,), (15,), (16,), (2, 8)])
def test_memory_that_does_not_fit_is_named(size):
    batch, memory = collate(make_examples([3]), [0]), torch.zeros(size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"expected memory \({len(batch.memory)},\) torch.uint8"):
        batch.within(memory)
    with pytest.raises(ValueError, match=r"expected memory .* got .* torch.int8"):
        batch.within(batch.memory.view(torch.int8))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_pinned_batch_moves_by_one_copy():
    batch = collate(make_examples([3, 70, 2]), [0, 1, 2], train=True, sequences=5)
    pinned = batch.pinned()
    assert all(x.is_pinned() for x in (pinned.memory, *tensors(pinned).values()) if x.numel())
    moved = pinned.to(DEVICE)
    assert moved.memory.data_ptr() % 16 == 0
    assert places(moved) == places(pinned) == places(batch)
    for name, x in tensors(batch).items():
        assert torch.equal(tensors(moved)[name].cpu(), x), name


@st.composite
def steps_of_one_shape(draw):
    """Lengths of two batches of as many rows, the longest of both in the same power of two, and
    how many sequences a batch has."""
    longest = draw(st.sampled_from([9, 64, 65, 128, 129, 300]))
    lengths = st.lists(st.integers(1, longest), max_size=6)
    a, b = [longest, *draw(lengths)], [longest, *draw(lengths)]
    while bucket(sum(a)) != bucket(sum(b)):
        short = a if sum(a) < sum(b) else b
        short.append(min(longest, abs(sum(a) - sum(b))))
    return a, b, max(len(a), len(b)) + draw(st.integers(0, 2))


@settings(max_examples=60)
@given(steps_of_one_shape())
def test_training_batches_of_one_shape_lie_alike(drawn):
    """Whatever the lengths are: by one copy one takes the place of the other, as in a captured
    step."""
    *lengths, sequences = drawn
    slot, other = (collate(make_examples(n), range(len(n)), 0, True, sequences) for n in lengths)
    assert slot.shape == other.shape
    assert hash(slot.shape) == hash(other.shape)
    assert places(slot) == places(other)
    slot.memory.copy_(other.memory)
    for name, x in tensors(other).items():
        assert torch.equal(tensors(slot)[name], x), name


def test_shapes_differ_where_tensors_do():
    examples = make_examples([5, 64, 65, 128, 129])
    base = collate(examples, [0], 0, True, 4)
    others = [
        collate(examples, [0], 0, True, 5),
        collate(examples, [1], 0, True, 4),
        collate(examples, [2], 0, True, 4),
        collate(examples, [4], 0, True, 4),
        collate(examples, [0], 0, False),
    ]
    assert len({base.shape, *(b.shape for b in others)}) == 6
    assert [b.layout.longest for b in (base, *others)] == [64, 64, 64, 128, 256, 5]


def test_a_short_batch_is_filled_with_empty_sequences():
    """They own no row and have no target; the rest is what it is without them."""
    examples = make_examples([9, 3, 5])
    whole, plain = collate(examples, [2, 0], 4, True, 4), collate(examples, [2, 0], 4, True)
    assert whole.rows == plain.rows == (2, 0)
    assert whole.layout.lengths == (5, 9, 0, 0)
    assert plain.layout.lengths == (5, 9)
    assert whole.targets.tolist() == [2, 0, IGNORE_INDEX, IGNORE_INDEX]
    assert whole.layout.rows == plain.layout.rows == 16
    for name in ("tokens", "positions", "types", "key"):
        assert torch.equal(getattr(whole, name), getattr(plain, name))
    assert torch.equal(whole.order.words, plain.order.words)
    assert whole.layout.first.tolist()[:2] == [0, 5]
    (*_, last) = Batches(examples, 2).epoch(0)
    assert [len(last[0].rows), len(last[0].targets)] == [1, 2]


@pytest.mark.parametrize(
    "kind", [list, np.array, partial(array, "i"), partial(array, "q"), range], ids=repr
)
def test_tokens_may_be_any_sequence(kind):
    """Also one kind beside another."""
    ids = [range(7, 10), range(20, 25), range(3)]
    examples = [Example(kind(i) if kind is not range else i, kind([0] * len(i))
                        if kind is not range else range(len(i)), 0) for i in ids]  # fmt: skip
    mixed = [examples[0], Example(list(ids[1]), [1] * 5, 0), examples[2]]
    for data in (examples, mixed):
        batch = collate(data, [0, 1, 2])
        assert batch.tokens.tolist() == [7, 8, 9, 0, 1, 2, 20, 21, 22, 23, 24, 0, 0, 0, 0, 0]
        assert batch.types[6:11].tolist() == list(data[1].types)


def test_a_batch_to_train_on_knows_which_rows_share_an_id():
    """By tokens, positions, types, and one type for all; one to evaluate has no need of it."""
    examples = make_examples([9, 3, 5])
    batch = collate(examples, [0, 1, 2], train=True)
    ids = batch.tokens, batch.positions, batch.types, torch.zeros_like(batch.types)
    expected = EmbedOrder.sort(ids)
    assert torch.equal(batch.order.words, expected.words)
    assert (batch.order.rows, batch.order.lines) == (batch.layout.rows, (0, 1, 2, 3))
    (step,) = Batches(examples, 3).epoch(0)
    assert step[0].order.rows == 32
    (whole,) = evaluation_batches(examples)
    assert whole.order is None
    assert whole.to("cpu").order is None


# ---------------------------------------------------------------- order


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 50), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_order_is_a_permutation_that_can_be_asked_for_again(n, seed, epoch):
    """A function of (seed, epoch): a resumed run needs no random state."""
    order = Batches(range(n), 4, seed=seed).order(epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == Batches(range(n), 7, 2, seed=seed).order(epoch).tolist()


def test_order_differs_between_epochs_and_seeds():
    orders = {
        tuple(Batches(range(20), 4, seed=seed).order(epoch))
        for seed in range(5)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 15


def test_order_is_what_it_has_always_been():
    """A change would make a resumed run see some examples twice and others never."""
    assert Batches(range(12), 4, seed=7).order(3).tolist() == GOLDEN


GOLDEN = [6, 1, 8, 11, 3, 4, 0, 7, 5, 2, 10, 9]


@pytest.mark.parametrize("n", [1_000, 10_000])
def test_epochs_are_independent(n):
    """The place of an example in one epoch says nothing of its place in the next, or near it."""
    batches = Batches(range(n), 32)
    a, b = batches.order(0), batches.order(1)
    for shift in range(20):
        correlation = np.corrcoef(a[: n - shift], b[shift:])[0, 1]
        assert abs(correlation) < 5 / n**0.5, shift


# ---------------------------------------------------------------- steps


def numbers(step) -> list[int]:
    """Numbers in the step of a step's examples, micro-batch by micro-batch, in sorted order."""
    firsts = [batch.layout.first[: len(batch.rows)] for batch in step]
    keys = [batch.key[first] for batch, first in zip(step, firsts, strict=True)]
    return [(key >> 32).sort().values.tolist() for key in keys]


@pytest.mark.parametrize(
    ("n", "size", "accumulation"), [(24, 4, 2), (25, 4, 2), (31, 4, 2), (3, 4, 1)]
)
def test_an_epoch_holds_every_example_once_in_order(n, size, accumulation):
    """Steps follow `order`; the last may be short, also in its micro-batches."""
    batches = Batches(make_examples([2 + i % 5 for i in range(n)]), size, accumulation, seed=1)
    steps, order = list(batches.epoch(2)), batches.order(2).tolist()
    assert len(steps) == len(batches) == -(-n // (size * accumulation))
    for k, step in enumerate(steps):
        rows = order[k * size * accumulation : (k + 1) * size * accumulation]
        assert sorted(r for batch in step for r in batch.rows) == sorted(rows)
        for j, batch in enumerate(step):
            assert sorted(batch.rows) == sorted(rows[j * size : (j + 1) * size])
        assert [len(batch.rows) for batch in step[:-1]] == [size] * (len(step) - 1)
    assert sum(len(batch.rows) for step in steps for batch in step) == n


def test_accumulation_keeps_the_numbers_of_examples():
    """4 micro-batches of 2 are the step that 1 of 8 is: same examples under the same numbers."""
    examples = make_examples([2 + i % 5 for i in range(20)])
    one, four = Batches(examples, 8, 1, seed=3), Batches(examples, 2, 4, seed=3)
    for whole, parts in zip(one.epoch(0), four.epoch(0), strict=True):

        def named(step):
            return {
                (row, int(batch.key[first] >> 32))
                for batch in step
                for row, first in zip(batch.rows, batch.layout.first.tolist(), strict=False)
            }

        assert named(whole) == named(parts)
        in_parts = [number for part in numbers(parts) for number in part]
        assert in_parts == numbers(whole)[0] == list(range(len(named(whole))))


def test_starting_inside_an_epoch_is_its_tail():
    """What a resumed run does."""
    batches = Batches(make_examples([2 + i % 5 for i in range(23)]), 3, 2, seed=5)
    full = list(batches.epoch(4))
    for start in range(len(batches) + 1):
        tail = list(batches.epoch(4, start))
        assert len(tail) == len(full) - start
        for got, want in zip(tail, full[start:], strict=True):
            assert [b.rows for b in got] == [b.rows for b in want]
            assert all(torch.equal(g.key, w.key) for g, w in zip(got, want, strict=True))


# ---------------------------------------------------------------- evaluation


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 120))
def test_evaluation_sees_every_example_once_within_the_limit(lengths, limit):
    """A longer example than the limit has a batch of its own; no batch could take one more."""
    batches = list(evaluation_batches(make_examples(lengths), limit))
    assert sorted(r for b in batches for r in b.rows) == list(range(len(lengths)))
    for batch, after in zip(batches, [*batches[1:], None], strict=False):
        total = sum(batch.layout.lengths)
        assert total <= limit or len(batch.rows) == 1
        assert after is None or total + after.layout.lengths[0] > limit
    assert [n for b in batches for n in b.layout.lengths] == sorted(lengths)


def test_an_evaluation_batch_may_be_exactly_full():
    batches = list(evaluation_batches(make_examples([3, 2, 3, 4]), 8))
    assert [b.layout.lengths for b in batches] == [(2, 3, 3), (4,)]


def test_nothing_to_evaluate():
    assert list(evaluation_batches([])) == []
    assert list(Batches([], 4).epoch(0)) == []
    assert len(Batches([], 4)) == 0


@pytest.mark.parametrize(
    "targets", [(0.5, -1.0, 2.0), (np.array([0, 1], np.uint8), np.array([1, 1], np.uint8))]
)
def test_numbers_to_come_near_lie_beside_their_sequences(targets):
    """Floats, or arrays of them, follow the order of the batch; an empty sequence has NaN, and the
    batch is the same one after a copy."""
    examples = [Example([1] * (3 - i), (), target) for i, target in enumerate(targets)]
    batch = collate(examples, range(len(examples)), 0, True, 4)
    assert batch.targets.dtype == torch.float32
    assert batch.at is None
    assert batch.targets.shape == (4, *np.shape(targets[0]))
    for row, found in zip(batch.rows, batch.targets, strict=False):
        np.testing.assert_array_equal(found.numpy(), targets[row])
    assert batch.targets[len(targets) :].isnan().all()
    copy = batch.within(batch.memory.clone())
    assert torch.equal(copy.targets[: len(targets)], batch.targets[: len(targets)])
    assert copy.shape == batch.shape
    assert torch.equal(copy.tokens, batch.tokens)


def test_batches_of_another_number_of_outputs_have_another_shape():
    """A captured step may not be replayed on them."""
    shapes = {
        collate([Example([1, 2], (), np.zeros(k, np.uint8))], [0], 0, True, 1).shape for k in (2, 3)
    }
    assert len(shapes) == 2
