"""minift.batch: what is packed where, and which examples form a step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift import Batches, Example
from minift.batch import bucket, collate, evaluation_batches
from minift.ops import EmbedOrder


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


def test_moving_a_batch_moves_all_of_it():
    """A tensor left behind would fail in the first operation on a GPU: here on 'meta'."""
    batch = collate(make_examples([3, 2]), [0, 1], train=True).to("meta")
    order = batch.order.words
    for x in (batch.tokens, batch.positions, batch.types, batch.key, batch.targets, order):
        assert x.is_meta
    assert batch.layout.first.is_meta
    assert batch.layout.lengths == (2, 3)
    assert batch.rows == (1, 0)


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
