"""kernels/dropout.py: its bits, what they depend on, how they are distributed; TORCH.drop, and the
kernels, which draw and drop the same."""

from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
from accuracy import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import empty_is_poisoned, guarded, poisoned
from launches import compilations, launches_are_declared, recorded

from minift.kernels import dropout as module
from minift.kernels.dropout import (
    Dropout,
    draw_dropout,
    draw_dropout_ref,
    drop,
    dropout_keep,
    dropout_ref,
    philox,
    threshold,
)
from minift.ops import TORCH, TRITON, Draw

WORD = 2**32 - 1
words = st.integers(0, WORD)
seeds = st.integers(-(2**63), 2**63 - 1)


def plain_philox(seed: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 of one counter as Salmon et al. print it, in unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def keys(examples, positions) -> torch.Tensor:
    """One row for each (example, position)."""
    pairs = [(e << 32) + i for e, i in zip(examples, positions, strict=True)]
    return torch.tensor(pairs, dtype=torch.int64, device=DEVICE)


def drawn(key, seed=5, step=7, columns=16, sites=3, heads=2, by=TORCH.draw_dropout) -> Dropout:
    number = torch.tensor([seed, step], device=DEVICE)
    return by(Draw(number[0], number[1]), key, columns, sites, heads)


def masks(dropout: Dropout, p=0.5, sites=3) -> torch.Tensor:
    """(sites, T, heads, columns)"""
    each = (dropout.at(site, p) for site in range(sites))
    return torch.stack([dropout_keep(d, len(d.columns)) for d in each])


# ---------------------------------------------------------------- the bits


@pytest.mark.parametrize(
    ("seed", "counter", "answer"),
    [
        (0, "0 0 0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            "243f6a88 85a308d3 13198a2e 03707344",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_gives_the_known_answers_of_random123(seed, counter, answer):
    column = torch.tensor([[int(word, 16)] for word in counter.split()], device=DEVICE)
    actual = philox(torch.tensor(seed, device=DEVICE), column)
    assert actual[:, 0].tolist() == [int(word, 16) for word in answer.split()]
    assert plain_philox(seed, column[:, 0].tolist()) == actual[:, 0].tolist()


@given(seeds, st.lists(st.tuples(words, words, words, words), min_size=1, max_size=9))
def test_philox_is_plain_philox_for_any_key_and_counter(seed, counters):
    """Negative seeds and words past 2^31 included: int64 wraps where it should."""
    counter = torch.tensor(counters, device=DEVICE).T
    actual = philox(torch.tensor(seed, device=DEVICE), counter)
    assert actual.T.tolist() == [plain_philox(seed, list(c)) for c in counters]


@given(
    seeds,
    words,
    st.lists(st.tuples(st.integers(0, 2**31 - 1), words), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_mask_is_the_formula_of_the_header(seed, step, rows, p):
    """Fixes the bits themselves: who names what, in which counter word. A resumed run needs it."""
    dropout = drawn(keys(*zip(*rows, strict=True)), seed, step, columns=4, sites=2, heads=3)
    for site in range(2):
        actual = dropout_keep(dropout.at(site, p), 4).tolist()
        for t, (example, position) in enumerate(rows):
            r = plain_philox(seed, [position, example, step, 0])
            for head in range(3):
                u = plain_philox(seed, [head, site, step, 1])[0]
                a, b = r[0] * u + r[1], r[2] * u + r[3]
                for column in range(4):
                    x = plain_philox(seed, [column, 0, step, 2])[0]
                    assert actual[t][head][column] == ((a * x + b) % 2**32 >= p * 2**32)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
def test_smallest_kept_word_is_kept_and_the_one_below_is_not(p):
    """The compare is unsigned and `>=`, in the definition and in torch's signed arithmetic."""
    smallest = round(p * 2**32)
    word = torch.tensor([smallest - 1, smallest, smallest + 1, 0, WORD, 2**31 - 1, 2**31])
    expected = (word >= smallest).tolist()
    rows = torch.zeros(len(word), 4, dtype=torch.int32, device=DEVICE)
    rows[:, 3] = word.to(torch.int32)  # a = 0, b = word: every column has the row's word
    place = torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
    dropout = Dropout(p, 0, rows, torch.arange(3, dtype=torch.int32, device=DEVICE), place)
    assert dropout_keep(dropout, 3)[:, 0].tolist() == [[e] * 3 for e in expected]
    dropped = TORCH.drop(torch.ones(len(word), 3, device=DEVICE), dropout)
    assert (dropped != 0).tolist() == [[e] * 3 for e in expected]
    assert threshold(p) == smallest - 2**31


# ---------------------------------------------------------------- what a mask depends on


def test_permuting_rows_permutes_the_mask():
    """A token's mask does not depend on where in the batch it lies."""
    torch.manual_seed(0)
    key = keys([0, 0, 1, 1, 1, 2, 9], [0, 1, 0, 1, 2, 0, 5])
    order = torch.randperm(len(key), device=DEVICE)
    assert torch.equal(masks(drawn(key[order])), masks(drawn(key))[:, order])


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_splitting_rows_splits_the_mask(cut):
    """Nor on the batch it is packed into: accumulation and ranks change nothing."""
    key = keys([0, 0, 1, 1, 1, 2, 9], [0, 1, 0, 1, 2, 0, 5])
    whole = masks(drawn(key))
    assert torch.equal(torch.cat([masks(drawn(key[:cut])), masks(drawn(key[cut:]))], 1), whole)


def test_wider_draw_keeps_the_mask_of_the_narrow_one():
    """A batch with a longer sequence, or a model with more places, draws the same bits first."""
    key = keys([0, 3], [1, 0])
    wide = masks(drawn(key, columns=40, sites=5, heads=4))
    assert torch.equal(wide[:, :, :2, :16], masks(drawn(key, columns=16, sites=3, heads=2)))


def test_at_picks_rows():
    """The last layer drops only the rows that are wanted, with the bits they would have had."""
    dropout = drawn(keys([0, 0, 1, 2], [0, 1, 0, 0]))
    picked = dropout.at(1, 0.5, torch.tensor([2, 0], device=DEVICE))
    assert torch.equal(dropout_keep(picked, 16), dropout_keep(dropout.at(1, 0.5), 16)[[2, 0]])


def test_at_leaves_the_draw_alone():
    """One draw serves all places of a step."""
    dropout = drawn(keys([0], [0]))
    moved = dropout.at(2, 0.25)
    assert (moved.site, moved.p) == (2, 0.25)
    assert (dropout.site, dropout.p) == (0, 0.0)


def test_probability_zero_is_no_dropout():
    """`at` gives None, so that no operation pays for a mask of ones."""
    assert drawn(keys([0], [0])).at(1, 0.0) is None
    x = torch.randn(2, 3, device=DEVICE)
    assert TORCH.drop(x, None) is x
    assert dropout_ref(x, None, 0.0) is x


# ---------------------------------------------------------------- how the bits are distributed

T = 1 << 16


def many_rows(example=0):
    return torch.arange(T, device=DEVICE) + (example << 32)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_fraction_is_within_four_sigma(p):
    """Elements are pairwise independent: the count has a binomial's variance."""
    keep = masks(drawn(many_rows(), columns=32), p)
    sigma = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - p)) < 4 * sigma


# Of chi-square with 3 degrees of freedom: above it once in a million, were the bits independent.
CRITICAL = 30.665


def pair_chi_square(a, b, p):
    """Counts of (a, b) over independent pairs against those of two independent coins: 3 dof."""
    observed = torch.bincount((2 * a.long() + b).flatten(), minlength=4).double()
    q = torch.tensor([p, 1 - p], dtype=torch.float64, device=DEVICE)
    expected = (q[:, None] * q).flatten() * a.numel()
    return ((observed - expected) ** 2 / expected).sum().item()


def neighbours(p, draw=drawn, rows=T):
    """(what differs, pairs): each pair holds one element a row, so that pairs are independent."""
    first = draw(many_rows()[:rows], columns=9, heads=3)
    m = masks(first, p)
    for i in range(8):
        yield f"columns {i}, {i + 1}", m[0, :, 0, i], m[0, :, 0, i + 1]
    yield "columns 0, 8", m[0, :, 0, 0], m[0, :, 0, 8]
    yield "heads 0, 1", m[0, :, 0, 0], m[0, :, 1, 0]
    yield "heads 0, 2", m[0, :, 0, 3], m[0, :, 2, 3]
    yield "sites 0, 1", m[0, :, 0, 0], m[1, :, 0, 0]
    yield "sites 0, 2", m[0, :, 1, 3], m[2, :, 1, 3]
    yield "(site, head) (0, 1), (1, 0)", m[0, :, 1, 3], m[1, :, 0, 3]
    yield "rows 2i, 2i + 1", m[0, 0::2, 0, 0], m[0, 1::2, 0, 0]
    yield "rows 2i + 1, 2i + 2", m[0, 1:-1:2, 0, 0], m[0, 2::2, 0, 0]
    yield "(row, column) (2i, 1), (2i + 1, 0)", m[0, 0::2, 0, 1], m[0, 1::2, 0, 0]
    others = {
        "examples": draw(many_rows(example=1)[:rows], columns=9, heads=3),
        "examples of the next rank": draw(many_rows(example=32)[:rows], columns=9, heads=3),
        "steps": draw(many_rows()[:rows], step=8, columns=9, heads=3),
        "seeds": draw(many_rows()[:rows], seed=6, columns=9, heads=3),
        "seeds 2^32 apart": draw(many_rows()[:rows], seed=5 + 2**32, columns=9, heads=3),
    }
    for name, other in others.items():
        other = masks(other, p)
        yield name, m[0, :, 0, 0], other[0, :, 0, 0]
        yield f"{name}, column 5", m[1, :, 2, 5], other[1, :, 2, 5]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_that_differ_in_anything_are_independent(p):
    """Chi-square of 3 degrees of freedom on 32,768 to 65,536 pairs, each of the 28 above 30.665
    once in a million: a correlation of 3 % is found."""
    statistics = {name: pair_chi_square(a, b, p) for name, a, b in neighbours(p)}
    found = {n: s for n, s in statistics.items() if s >= CRITICAL}
    assert not found


def places_of(draw, p):
    """(site, head) -> mask of 65,536 elements, each in a row of its own: of 8 seeds and steps, 16
    examples of two ranks, 512 positions, at columns that change from row to row."""
    examples = torch.arange(16, device=DEVICE) + 2**20 * (torch.arange(16, device=DEVICE) // 8)
    key = ((examples << 32)[:, None] + torch.arange(512, device=DEVICE)).flatten()
    column = (torch.arange(len(key), device=DEVICE) % 7)[:, None]
    found = {}
    for i in range(8):
        m = masks(draw(key, seed=i, step=i // 2, columns=7, sites=5), p, sites=5)
        for site in range(5):
            for head in range(2):
                picked = m[site, :, head].gather(1, column)[:, 0]
                found.setdefault((site, head), []).append(picked)
    return {place: torch.cat(parts) for place, parts in found.items()}


def dependent_places(draw, p) -> list:
    bits = places_of(draw, p)
    pairs = combinations(bits, 2)
    return [pair for pair in pairs if pair_chi_square(*(bits[i] for i in pair), p) >= CRITICAL]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_every_two_places_are_independent(p):
    """All 45 pairs of 5 sites with 2 heads, as attention has them, over seeds, steps, ranks,
    examples, positions and columns. At 0.5 the bit that is tested is the highest of a word; at 0.1
    it depends on the lower ones."""
    assert dependent_places(drawn, p) == []


def ignoring(name):
    """A generator that leaves out one of the things that name an element."""

    def draw(key, seed=5, step=7, columns=16, sites=3, heads=2):
        key = {"example": key & WORD, "position": key >> 32 << 32}.get(name, key)
        numbers = {"seed": seed, "step": step} | ({name: 3} if name in ("seed", "step") else {})
        d = drawn(key, **numbers, columns=columns, sites=sites, heads=heads)
        places = {"site": d.places[:1], "head": d.places[:, :1]}.get(name, d.places)
        wide = d.columns[:1] if name == "column" else d.columns
        return replace(d, places=places.expand_as(d.places), columns=wide.expand_as(d.columns))

    return draw


@pytest.mark.parametrize(
    "name", ["site", "head", "example", "position", "column", "step", "seed", "nothing"]
)
def test_a_generator_that_ignores_something_is_found(name):
    """The two tests above can fail: each thing that is left out makes pairs of equal bits."""
    pairs = neighbours(0.5, ignoring(name), rows=1 << 13)
    found = {n for n, a, b in pairs if pair_chi_square(a, b, 0.5) >= CRITICAL}
    said = {"position": "row"}.get(name, name)
    assert any(said in n for n in found) == (name != "nothing")
    if name in ("site", "head"):
        assert len(dependent_places(ignoring(name), 0.5)) == {"site": 20, "head": 5}[name]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_kept_count_of_a_row_varies_as_a_binomial(p):
    """Columns share a row's words, yet the variance over 65,536 rows is C p (1 - p) within 5 %."""
    C = 64
    counts = dropout_keep(drawn(many_rows(), columns=C).at(1, p), C)[:, 0].double().sum(-1)
    assert counts.var().item() == pytest.approx(C * p * (1 - p), rel=0.05)


def test_kept_count_of_a_column_varies_as_a_binomial():
    """Rows are independent: so many of a column, over 512 columns."""
    rows, C, p = 4096, 512, 0.1
    keep = dropout_keep(drawn(many_rows()[:rows], columns=C).at(1, p), C)[:, 0]
    assert keep.double().sum(0).var().item() == pytest.approx(rows * p * (1 - p), rel=0.3)


# ---------------------------------------------------------------- TORCH.drop


def dropped_pair(dtype, p=0.1, C=16):
    """(x, TORCH.drop(x), the definition in dtype, the definition in fp64, mask)"""
    torch.manual_seed(0)
    dropout = drawn(many_rows()[:500], columns=40).at(1, p)
    x = (torch.randn(500, C, device=DEVICE).abs() + 0.1).to(dtype)
    keep = dropout_keep(dropout, C)[:, 0]
    exact = dropout_ref(x.double(), keep, p)
    return x, TORCH.drop(x, dropout), dropout_ref(x, keep, p), exact, keep


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_keeps_what_the_definition_keeps(p, dtype):
    """The same elements exactly; values within an ulp; the dtype of x; fewer columns than drawn."""
    _, actual, same_dtype, exact, keep = dropped_pair(dtype, p)
    assert actual.dtype == same_dtype.dtype == dtype
    assert torch.equal(actual != 0, keep)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_equals_the_definition_at_one_half(dtype):
    """Where 1 / (1 - p) is a power of two there is nothing to round."""
    _, actual, same_dtype, _, _ = dropped_pair(dtype, 0.5)
    assert torch.equal(actual, same_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_is_unbiased(dtype):
    """Rounding may go either way, but the mean of what is kept is x / (1 - p), backward too."""
    x, actual, _, exact, keep = dropped_pair(dtype, 0.1)
    bias = (actual.double()[keep] / exact[keep]).mean().item() - 1
    assert abs(bias) < 1e-4
    leaf = torch.ones_like(x).requires_grad_()
    TORCH.drop(leaf, drawn(many_rows()[:500], columns=40).at(1, 0.1)).backward(x)
    assert torch.equal(leaf.grad, actual)  # the same multiplication


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_uses_the_same_bits_backward(dtype):
    """The gradient is 0 exactly where the output was dropped, and scaled elsewhere."""
    torch.manual_seed(0)
    dropout = drawn(many_rows()[:300]).at(2, 0.3)
    x = torch.rand(300, 16, device=DEVICE).add(0.5).to(dtype).requires_grad_()
    y = TORCH.drop(x, dropout)
    dy = torch.rand(300, 16, device=DEVICE).add(0.5).to(dtype)
    y.backward(dy)
    assert torch.equal(x.grad != 0, y != 0)
    expected = dropout_ref(dy.double(), y != 0, 0.3)
    torch.testing.assert_close(x.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_drop_of_a_place_without_heads_is_head_0():
    """As the definition says; the other heads' words are attention's."""
    dropout = drawn(many_rows()[:64], heads=3).at(1, 0.5)
    kept = TORCH.drop(torch.ones(64, 16, device=DEVICE), dropout) != 0
    assert torch.equal(kept, dropout_keep(dropout, 16)[:, 0])
    assert not torch.equal(kept, dropout_keep(dropout, 16)[:, 1])


# ---------------------------------------------------------------- the kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
ROWS_OF = module.DRAW["BLOCK"]


def assert_same_draw(actual: Dropout, expected: Dropout) -> None:
    """To the bit, and dense: kernels take pointers."""
    for field in fields(Dropout):
        a, e = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(e, torch.Tensor):
            assert (a.dtype, a.shape, a.is_contiguous()) == (e.dtype, e.shape, True)
            assert torch.equal(a, e), field.name
        else:
            assert a == e


def both_draws(key, *args, **sizes):
    with empty_is_poisoned():
        actual = drawn(key, *args, **sizes, by=draw_dropout)
    assert_same_draw(actual, drawn(key, *args, **sizes, by=draw_dropout_ref))


@given(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), words), max_size=300),
    seeds,
    words,
    st.integers(0, 300),
    st.integers(0, 7),
    st.integers(1, 13),
)
@settings(max_examples=40)
def test_kernel_draws_what_the_definition_draws(rows, seed, step, columns, sites, heads):
    """To the bit: negative seeds, steps and positions past 2^31, examples below it, nothing."""
    both_draws(keys(*zip(*rows, strict=True)) if rows else keys([], []), seed, step, columns,
               sites, heads)  # fmt: skip


@pytest.mark.parametrize("rows", [0, 1, ROWS_OF - 1, ROWS_OF, ROWS_OF + 1, 3 * ROWS_OF])
@pytest.mark.parametrize("columns", [0, 1, ROWS_OF])
def test_kernel_draws_around_its_tiles(rows, columns):
    """Rows, places and columns follow one another in one tile, or end with it."""
    both_draws(many_rows(3)[:rows], columns=columns, sites=4, heads=3)


def test_kernel_draws_for_any_key():
    """Every other of its numbers; the same example twice; a key out of order."""
    both_draws(many_rows(7)[:99:2])
    both_draws(keys([5, 5, 0, 2**31 - 1], [WORD, WORD, 0, 1]))
    both_draws(many_rows().view(256, 256)[:, 3])


@pytest.mark.parametrize(("T", "sites", "heads", "columns"), [(5, 3, 2, 7), (130, 1, 1, 1)])
def test_kernel_draws_all_of_its_words_and_nothing_else(T, sites, heads, columns):
    key, places = guarded(many_rows(2)[:T]), sites * heads
    number = torch.tensor([5, 7], device=DEVICE)
    sizes = (T, 4), (places,), (columns,)
    words = [poisoned(*size, dtype=torch.int32) for size in sizes]
    module._draw_kernel[(4,)](
        key.tensor, number[0], number[1], *(w.tensor for w in words), T, heads, places, columns,
        **module.DRAW,
    )  # fmt: skip
    expected = drawn(key.tensor, columns=columns, sites=sites, heads=heads)
    wanted = expected.rows, expected.places.flatten(), expected.columns
    for word, e in zip(words, wanted, strict=True):
        word.assert_untouched()
        assert torch.equal(word.tensor, e)


def test_one_launch_and_one_binary_for_all_batches():
    """A new number of rows, columns or places compiles nothing."""
    with recorded(run=False) as seen:
        for T, columns, sites, heads in [(1, 1, 1, 1), (16, 16, 3, 1), (17, 768, 39, 12)]:
            drawn(many_rows()[:T], T, 1, columns, sites, heads, by=draw_dropout)
    assert len(seen) == 3
    assert compilations(seen) == 1


def meta(*shape):
    return torch.zeros(shape, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    "change",
    [
        {"key": torch.zeros(2, 3, dtype=torch.int64)},
        {"key": torch.zeros(3, dtype=torch.int32)},
        {"seed": torch.zeros(())},
        {"step": torch.zeros((), dtype=torch.int32)},
        {"step": meta()},
        {"key": meta(3)},
    ],
    ids=["key of two axes", "int32 key", "float seed", "int32 step", "step elsewhere", "key"],
)
def test_a_draw_that_does_not_fit_is_refused(change):
    zero = torch.zeros((), dtype=torch.int64)
    given = {"key": torch.zeros(3, dtype=torch.int64), "seed": zero, "step": zero} | change
    with pytest.raises(ValueError, match=r"expected key \(T,\), seed and step in int64 on one"):
        draw_dropout(Draw(given["seed"], given["step"]), given["key"], 4, 2, 2)


def test_a_device_without_kernels_is_named(monkeypatch):
    """Rather than a wild read: a CPU tensor where nothing interprets."""
    dropout, zero = drawn(many_rows()[:3]).at(1, 0.5), torch.zeros((), dtype=torch.int64)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="expected a key on a GPU, got cpu"):
        draw_dropout(Draw(zero, zero), zero.expand(3), 16, 3, 2)
    with pytest.raises(ValueError, match="expected x on a GPU, got cpu"):
        drop(torch.zeros(3, 4), dropout)


def dropped(x, dropout, dy=None):
    """drop(x) and its gradient, in memory that was poison."""
    leaf = x.detach().requires_grad_()
    with empty_is_poisoned():
        y = drop(leaf, dropout)
        (dx,) = torch.autograd.grad(y, leaf, x if dy is None else dy)
    return y.detach(), dx


def check_dropped(x, dropout):
    """The definition's elements exactly, its values within an ulp; the same backward."""
    keep = dropout_keep(dropout, x.shape[1])[:, 0]
    for actual in dropped(x, dropout):
        assert actual.dtype == x.dtype
        assert torch.equal(actual != 0, keep & (x != 0))
        expected = dropout_ref(x.double(), keep, dropout.p)
        unit = torch.finfo(x.dtype)  # half of one from rounding, and what fp32 lost before it
        least = unit.eps * unit.tiny  # one of subnormal numbers
        torch.testing.assert_close(actual.double(), expected, rtol=unit.eps, atol=least)


@dtypes
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 2**-20])
def test_kernel_drops_what_the_definition_drops(p, dtype):
    """With fewer columns than were drawn; 1 / (1 - p) is not rounded to the dtype. fp16 has no
    number so large as the last."""
    scale = 2.0**-10 if p > 0.99 else 1.0
    x = dropped_pair(dtype)[0] * scale
    check_dropped(x[:50], drawn(many_rows()[:50], columns=40).at(2, p))


@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
    st.sampled_from([0, 1, 16]),
)
@settings(max_examples=20)
def test_kernel_drops_any_shape_stride_and_alignment(T, C, dtype, offset, slack):
    """What lies between and around the rows, NaN, is not read."""
    torch.manual_seed(T + C)
    x = guarded(torch.randn(T, C, device=DEVICE).to(dtype), offset, slack).tensor
    check_dropped(x, drawn(many_rows(C)[:T], columns=C).at(1, 0.3))


def test_kernel_drops_columns_that_are_not_side_by_side():
    x = torch.rand(40, 17, device=DEVICE).T + 0.5
    dropout = drawn(many_rows()[:17], columns=40).at(1, 0.3)
    for a, e in zip(dropped(x, dropout), dropped(x.contiguous(), dropout), strict=True):
        assert torch.equal(a, e)


def test_kernel_takes_upstream_gradients_of_any_stride():
    """Of a sum: one number for all elements."""
    x, dropout = torch.rand(17, 40, device=DEVICE), drawn(many_rows()[:17], columns=40).at(1, 0.3)
    one = torch.tensor(1.5, device=DEVICE)
    _, dx = dropped(x, dropout, one.expand(17, 40))
    assert torch.equal(dx, drop(one.expand(17, 40).contiguous(), dropout))


@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("T", "C"), [(1, 1), (9, 257), (8, 256)])
def test_kernel_writes_what_it_drops_and_nothing_else(T, C, offset, dtype):
    x = torch.rand(T, C, device=DEVICE).add(1).to(dtype)
    dropout = drawn(many_rows()[:T], columns=C).at(1, 0.5)
    y = poisoned(T, C, dtype=dtype, offset=offset)
    words = module.dropout_arguments(dropout)
    module._drop_kernel[(2, 2)](x, y.tensor, *words[:3], T, C, C, *words[3:], **module.DROP)
    y.assert_untouched()
    y.assert_written()
    assert torch.equal(y.tensor, drop(x, dropout))


def test_what_is_dropped_is_0_whatever_it_was():
    """inf and NaN, too: a row that overflowed is not the kernel's to spread."""
    dropout = drawn(many_rows()[:50]).at(1, 0.5)
    keep = dropout_keep(dropout, 16)[:, 0]
    x = torch.full((50, 16), torch.nan, device=DEVICE)
    x[::2] = torch.inf
    y = drop(x, dropout)
    assert (y[~keep] == 0).all()
    assert torch.equal(y.isnan(), keep & x.isnan())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_kernel_drops_nothing_of_nothing(shape):
    x = torch.zeros(shape, device=DEVICE)
    y, dx = dropped(x, drawn(many_rows()[: shape[0]]).at(1, 0.5))
    assert y.shape == dx.shape == shape
    assert drop(x, None) is x


def test_kernel_drops_picked_rows():
    """The last layer's: the bits that they would have had."""
    x = torch.rand(9, 16, device=DEVICE) + 0.5
    rows = torch.tensor([7, 2, 2], device=DEVICE)
    draw = drawn(many_rows()[:9])
    assert torch.equal(drop(x[rows], draw.at(1, 0.5, rows)), drop(x, draw.at(1, 0.5))[rows])


def test_drop_launches_once_a_pass_and_compiles_once():
    """For all rows, sites and probabilities."""
    with recorded(run=False) as seen:
        for T, site, p in [(1, 0, 0.1), (16, 1, 0.1), (17, 2, 0.5), (800, 1, 0.9)]:
            x = torch.zeros(T, 48, device=DEVICE, requires_grad=True)
            dropout = drawn(many_rows()[:T], columns=48, heads=site + 1, by=draw_dropout)
            drop(x, dropout.at(site, p)).sum().backward()
    drops = [launch for launch in seen if launch.kernel == "_drop_kernel"]
    assert len(drops) == 8
    assert compilations(drops) == 1


def test_declared_launches_are_those_that_run():
    """What is compiled without a GPU is what a GPU runs."""
    with recorded(run=False) as seen:
        number = [torch.tensor(i, device=DEVICE) for i in (5, 7)]
        draw = draw_dropout(Draw(*number), many_rows()[:19], 48, 3, 2)
        for dtype in (torch.bfloat16, torch.float32):
            drop(torch.zeros(19, 48, dtype=dtype, device=DEVICE), draw.at(1, 0.1))
    assert launches_are_declared(seen, module) == {launch.name for launch in module.LAUNCHES}


def test_the_table_has_the_kernels():
    assert (TRITON.draw_dropout, TRITON.drop) == (draw_dropout, drop)


@pytest.mark.parametrize(
    ("x", "dropout", "message"),
    [
        (torch.zeros(3, 4).double(), {}, r"in fp32, fp16 or bf16, got \(3, 4\) torch.float64"),
        (torch.zeros(3, 4, 1), {}, r"expected \(T, C\) in .*, got \(3, 4, 1\)"),
        (torch.zeros(4, 4), {}, r"\(rows, columns, heads\) \(4, 4, 1\), got \(3, 16, 2\)"),
        (torch.zeros(3, 17), {}, r"\(3, 17, 1\), got \(3, 16, 2\)"),
        (torch.zeros(3, 4), 0.1, r"expected draw_dropout\(...\).at\(site, p\), got 0.1"),
    ],
    ids=["fp64", "axes", "rows", "columns", "a number"],
)  # fmt: skip
def test_a_drop_that_does_not_fit_is_refused(x, dropout, message):
    dropout = drawn(many_rows()[:3]).at(1, 0.5) if dropout == {} else dropout
    with pytest.raises(ValueError, match=message):
        drop(x.to(DEVICE), dropout)
