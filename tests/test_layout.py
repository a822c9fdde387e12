"""kernels/layout.py: where the rows of packed sequences lie, how they are cut and grouped."""

import itertools
from dataclasses import fields

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minift.kernels.layout import GROUP_OVERHEAD, SHORT, SPAN, Layout

lengths = st.lists(
    st.one_of(st.just(0), st.integers(1, 9), st.integers(1, 200)), min_size=0, max_size=12
)
slack = st.integers(0, 5)


def tensors(record) -> dict[str, torch.Tensor]:
    each = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: x for name, x in each.items() if isinstance(x, torch.Tensor)}


@given(lengths, slack)
@example([], 3)
@example([0, 0], 0)
def test_sequences_lie_end_to_end(lengths, slack):
    """Every index against a walk over the rows."""
    layout = Layout.pack(lengths, sum(lengths) + slack)
    start = 0
    assert layout.cu_seqlens[0] == 0
    for b, length in enumerate(lengths):
        if length:
            assert layout.first[b] == start
            assert layout.last[b] == start + length - 1
        start += length
        for index in (layout.first[b], layout.last[b]):  # of an empty one some row: safe to read
            assert 0 <= index < max(layout.rows, 1)
        assert layout.cu_seqlens[b + 1] == start
    assert layout.lengths == tuple(lengths)
    assert layout.rows == start + slack
    assert layout.max_length == layout.longest == max([0, *lengths])
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.first.dtype == layout.last.dtype == torch.int64
    assert len(layout.first) == len(layout.last) == len(lengths)


def test_rows_of_keys_without_lengths_of_keys():
    with pytest.raises(ValueError, match="expected key_lengths with key_rows"):
        Layout.pack([3, 5], key_rows=20)


@given(lengths, slack)
@example([3, 3, 3], 0)
@example([2, 0, 5], 2)
def test_groups_partition_the_rows_of_sequences(lengths, slack):
    """Groups follow each other and hold every row but the slack, and each sequence whole."""
    layout = Layout.pack(lengths, sum(lengths) + slack)
    real = [length for length in lengths if length]
    stop = n = 0
    for group in layout.groups:
        assert group.start == stop
        members = real[n : n + group.n]
        assert group.stop - group.start == sum(members)
        assert group.length == max(members)
        stop, n = group.stop, n + group.n
    assert stop == sum(lengths)
    assert n == len(real)


@given(lengths)
@example([3, 5, 2])
def test_gather_and_scatter_are_inverse(lengths):
    """Row -> cell -> row is the identity; cell (i, j) holds row j of sequence i; the rest is 0."""
    layout = Layout.pack(lengths)
    n = 0
    real = [length for length in lengths if length]
    for group in layout.groups:
        members, n = real[n : n + group.n], n + group.n
        equal = len(set(members)) == 1
        assert [x is None for x in (group.gather, group.scatter, group.real)] == [equal] * 3
        if equal:
            continue
        rows = group.stop - group.start
        assert torch.equal(group.gather[group.scatter], torch.arange(rows))
        cells = group.gather.view(group.n, group.length)
        row = 0
        for i, length in enumerate(members):
            assert cells[i, :length].tolist() == list(range(row, row + length))
            assert group.real[i].tolist() == [1.0] * length + [0.0] * (group.length - length)
            row += length
            assert set(cells[i, length:].tolist()) <= {row - length}  # its own first row


@given(lengths)
@example([40, 60])
@example([1, 46, 47])
def test_neighbours_share_a_group_while_padding_is_cheap(lengths):
    """A group's padding costs no more than the groups it saves, and no group could take one
    sequence more: the promise that one long sequence does not pad many short ones."""
    layout = Layout.pack(lengths)
    real, n = [length for length in lengths if length], 0
    for group in layout.groups:
        members, n = real[n : n + group.n], n + group.n
        cells = group.n * group.length**2
        assert cells <= sum(m * m for m in members) + (group.n - 1) * GROUP_OVERHEAD
        if n < len(real):
            longer = (group.n + 1) * max(group.length, real[n]) ** 2
            assert longer > cells + real[n] ** 2 + GROUP_OVERHEAD


def test_groups_are_made_when_asked_for():
    """Once: a GPU's kernels never ask, and a model asks in every layer."""
    layout = Layout.pack([3, 5, 2])
    assert "groups" not in vars(layout)
    assert layout.groups is layout.groups
    assert "groups" not in vars(layout.to("meta"))


def test_equal_lengths_are_one_view():
    """However long: there is no padding to pay for."""
    (group,) = Layout.pack([128] * 7).groups
    assert (group.start, group.stop, group.n, group.length) == (0, 7 * 128, 7, 128)
    assert group.gather is group.scatter is group.real is None


def test_one_long_sequence_among_short_ones_has_its_own_group():
    layout = Layout.pack([4] * 6 + [300] + [4] * 6)
    assert [(g.n, g.length) for g in layout.groups] == [(6, 4), (1, 300), (6, 4)]


@pytest.mark.parametrize(
    ("lengths", "rows", "message"),
    [
        ([3, -1, 4], None, r"expected lengths >= 0 that fit 6 rows, got \[3, -1, 4\]"),
        ([3, 4], 6, r"expected lengths >= 0 that fit 6 rows, got \[3, 4\]"),
    ],
    ids=["negative", "rows too few"],
)
def test_lengths_that_do_not_fit_are_named(lengths, rows, message):
    with pytest.raises(ValueError, match=message):
        Layout.pack(lengths, rows)


# ---------------------------------------------------------------- spans

edges = st.sampled_from([SHORT, SHORT + 1, SPAN, SPAN + 1])
any_length = st.one_of(st.integers(0, 9), st.integers(0, 300), edges)
pairs = st.lists(st.tuples(any_length, any_length), max_size=8)  # queries, keys


def owned(layout):
    """How many spans own each query row, and each key row: exactly what a kernel visits."""
    queries, keys = torch.zeros(layout.rows), torch.zeros(layout.key_rows)
    for _, begin, end, key_begin, key_end in layout.short.tolist():
        queries[begin:end] += 1
        keys[key_begin:key_end] += 1
    for first, begin, end, _, _ in layout.long.tolist():
        queries[begin + first : min(begin + first + SPAN, end)] += 1
    for first, _, _, begin, end in layout.long_keys.tolist():
        keys[begin + first : min(begin + first + SPAN, end)] += 1
    return queries, keys


def bounds(lengths):
    """(begin, end) of each sequence."""
    ends = [0, *itertools.accumulate(lengths)]
    return list(itertools.pairwise(ends))


@given(pairs, slack, slack, st.booleans())
@example([], 3, 2, False)
@example([(SHORT, SHORT), (0, 0), (SHORT + 1, 0)], 0, 0, False)
@example([(SHORT, SHORT + 1), (3, 200)], 2, 3, True)
def test_every_row_is_in_one_span(pairs, slack, key_slack, padded):
    """Of sequences, of slack, of queries and of keys: nothing is left out, nothing done twice."""
    lengths, keys = [a for a, _ in pairs], [b for _, b in pairs]
    bucket = (len(pairs) + 1, max([1, *lengths, *keys])) if padded else None
    layout = Layout.pack(lengths, sum(lengths) + slack, keys, sum(keys) + key_slack, bucket=bucket)
    for counts in owned(layout):
        assert (counts == 1).all()


@given(pairs, slack)
@example([(SHORT, SHORT), (0, 0), (SHORT + 1, 3), (3, SHORT + 1), (1, 0), (0, 1)], 2)
def test_a_span_is_of_one_sequence(pairs, slack):
    """It names its own queries and keys, in full; slack sees none and is seen by none. Which list
    it is in depends on its own lengths, and an empty sequence is in none."""
    lengths, keys = [a for a, _ in pairs], [b for _, b in pairs]
    layout = Layout.pack(lengths, sum(lengths) + slack, keys, sum(keys) + slack)
    sequences = [(*q, *k) for q, k in zip(bounds(lengths), bounds(keys), strict=True)]
    end, key_end = sum(lengths), sum(keys)
    idle = {(end, end + slack, key_end, key_end), (end, end, key_end, key_end + slack)}
    short = [s for s, pair in zip(sequences, pairs, strict=True) if 0 < max(pair) <= SHORT]
    long = [s for s, pair in zip(sequences, pairs, strict=True) if max(pair) > SHORT]
    found = {name: [tuple(x) for x in getattr(layout, name).tolist()]
             for name in ("short", "long", "long_keys")}  # fmt: skip
    of = {name: [x[1:] for x in spans] for name, spans in found.items()}
    assert [x for x in of["short"] if x not in idle] == sorted(short, key=reach, reverse=True)
    assert {x for x in of["long"] if x not in idle} == {x for x in long if x[0] < x[1]}
    assert {x for x in of["long_keys"] if x not in idle} == {x for x in long if x[2] < x[3]}
    for first, *_ in found["short"]:
        assert first == 0
    for name, at in (("long", 1), ("long_keys", 3)):
        for span in found[name]:
            assert span[0] % SPAN == 0
            assert span[at] + span[0] < span[at + 1]


def reach(span):
    """What decides how long the programs of a sequence run."""
    return max(span[1] - span[0], span[3] - span[2])


@given(pairs)
def test_the_longest_come_first(pairs):
    """And within a sequence the queries that see most keys under a causal mask, and the keys that
    most queries see. Slack comes last."""
    lengths, keys = [a for a, _ in pairs], [b for _, b in pairs]
    layout = Layout.pack(lengths, sum(lengths) + 2, keys, sum(keys) + 2)
    for spans, order in ((layout.short, 0), (layout.long, -1), (layout.long_keys, 1)):
        spans = spans.tolist()
        real = [x for x in spans if x[1] < sum(lengths) or x[3] < sum(keys)]
        assert spans[: len(real)] == real
        sizes = [reach(x[1:]) for x in real]
        assert sizes == sorted(sizes, reverse=True)
        for a, b in itertools.pairwise(real):
            if a[1:] == b[1:]:
                assert b[0] - a[0] == order * SPAN


def test_spans_as_drawn():
    """A short and a long sequence and slack, written out."""
    layout = Layout.pack([3, SPAN + 2, 0, 64], 200)
    assert layout.short.tolist() == [[0, 133, 197, 133, 197], [0, 0, 3, 0, 3]]
    whole = [3, 133, 3, 133]
    assert layout.long.tolist() == [[SPAN, *whole], [0, *whole], [0, 197, 200, 197, 197]]
    assert layout.long_keys.tolist() == [[0, *whole], [SPAN, *whole], [0, 197, 197, 197, 200]]
    assert layout.short.dtype == layout.long.dtype == layout.long_keys.dtype == torch.int32


def test_slack_goes_where_a_kernel_is_launched_anyway():
    """After short sequences only, the kernels of long ones need not run."""
    layout = Layout.pack([3, 64], 70)
    assert [len(x) for x in (layout.short, layout.long, layout.long_keys)] == [4, 0, 0]
    layout = Layout.pack([3, 65], 70)
    assert [len(x) for x in (layout.short, layout.long, layout.long_keys)] == [1, 2, 2]


@st.composite
def buckets(draw):
    """Two batches of a bucket: its limits, and for each the lengths of queries and of keys."""
    longest = draw(st.sampled_from([1, 9, SHORT, SHORT + 1, SPAN, SPAN + 1, 300]))
    length = st.one_of(
        st.integers(0, longest), st.sampled_from([longest, min(longest, SHORT + 1), 0])
    )
    sequences = draw(st.integers(1, 6))
    batch = st.lists(st.tuples(length, length), max_size=sequences)
    return (sequences, longest), draw(batch), draw(batch)


@settings(max_examples=200)
@given(buckets(), st.booleans(), slack)
def test_batches_of_a_bucket_have_the_same_shapes(drawn, same, slack):
    """Of all tensors that a kernel takes: a captured step is replayed on any such batch. No batch
    needs more spans than it has room for."""
    bucket, *batches = drawn
    rows = max(sum(a for a, _ in batch) for batch in batches) + slack
    key_rows = max(sum(b for _, b in batch) for batch in batches) + slack
    shapes = []
    for batch in batches:
        keys = {} if same else {"key_lengths": [b for _, b in batch], "key_rows": key_rows}
        layout = Layout.pack([a for a, _ in batch], rows, bucket=bucket, **keys)
        assert len(layout.lengths) == len(layout.key_lengths) == bucket[0]
        shapes.append({name: x.shape for name, x in tensors(layout).items()})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("longest", [SHORT, SHORT + 1, SPAN + 1])
def test_a_bucket_has_room_for_its_fullest_batch(longest):
    """As many sequences as fit, each just long enough to be cut once more, and slack."""
    for n, length in ((5, longest), (5, SHORT + 1), (1, longest)):
        length = min(length, longest)
        rows = n * length + 1
        exact = Layout.pack([length] * n, rows)
        padded = Layout.pack([length] * n, rows, bucket=(n, longest))
        empty = Layout.pack([], rows, bucket=(n, longest))
        assert len(padded.short) == n + (2 if longest <= SHORT else 0)  # slack, where it goes
        for name in ("short", "long", "long_keys"):
            a, b, c = (getattr(x, name) for x in (exact, padded, empty))
            assert len(a) <= len(b) == len(c)
            assert torch.equal(b[: len(a)], a)
            assert not b[len(a) :].any()


def test_a_bucket_fills_up_with_empty_sequences():
    layout = Layout.pack([3, 5], 10, bucket=(4, 70))
    assert layout.lengths == layout.key_lengths == (3, 5, 0, 0)
    assert (layout.max_length, layout.longest) == (5, 70)
    assert layout.cu_seqlens.tolist() == [0, 3, 8, 8, 8]
    layout = Layout.pack([3, 5], key_lengths=[4, 9], bucket=(3, 70))
    assert layout.key_lengths == (4, 9, 0)
    assert (layout.rows, layout.key_rows) == (8, 13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket": (1, 9)}, r"at most 1 sequences, none longer than 9, got \[3, 4\]: choose"),
        ({"bucket": (2, 3)}, r"at most 2 sequences, none longer than 3, got \[3, 4\]: choose"),
        ({"bucket": (2, 4), "key_lengths": [1, 5]}, r"none longer than 4, got \[1, 5\]: choose"),
        ({"key_lengths": [3]}, "a key length for each sequence, got 1 for 2 sequences"),
        ({"key_lengths": [3, 4, 5]}, "a key length for each sequence, got 3 for 2 sequences"),
        ({"key_lengths": [3, -1]}, r"lengths >= 0 that fit 2 rows, got \[3, -1\]"),
        ({"key_lengths": [3, 4], "key_rows": 6}, r"lengths >= 0 that fit 6 rows, got \[3, 4\]"),
    ],
    ids=["many", "long", "long keys", "fewer keys", "more keys", "negative", "rows of keys"],
)
def test_buckets_and_keys_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Layout.pack([3, 4], **options)
    assert "\n" not in str(error.value)


def test_keys_are_the_queries_unless_told():
    layout = Layout.pack([3, 4], 9)
    assert (layout.key_lengths, layout.key_rows) == ((3, 4), 9)


# ---------------------------------------------------------------- devices


def test_moved_to_the_device_it_is_on_nothing_changes():
    layout = Layout.pack([3, 0, 5, 90, 90], 200)
    moved = layout.to("cpu")
    pairs = [(layout, moved), *zip(layout.groups, moved.groups, strict=True)]
    for old, new in pairs:
        assert type(new) is type(old)
        for field in fields(old):
            a, b = getattr(old, field.name), getattr(new, field.name)
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
                assert a.dtype == b.dtype
            elif field.name != "groups":
                assert a == b


def test_every_tensor_moves():
    """A tensor left behind would fail only on a GPU: `meta` stands in for one."""
    layout = Layout.pack([3, 5, 90, 90], 200).to("meta")
    assert any(group.gather is not None for group in layout.groups)
    for record in (layout, *layout.groups):
        assert {x.device.type for x in tensors(record).values()} <= {"meta"}
    assert len(tensors(layout)) == 6
    assert all(len(x) for x in tensors(layout).values())
