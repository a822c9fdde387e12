"""kernels/dropout.py: its bits, what they depend on, how they are distributed; and TORCH.drop."""

import pytest
import torch
from accuracy import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from minift.kernels.dropout import Dropout, dropout_keep, dropout_ref, philox, threshold
from minift.ops import TORCH, Draw

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


def drawn(key, seed=5, step=7, columns=16, sites=3, heads=2) -> Dropout:
    number = torch.tensor([seed, step], device=DEVICE)
    return TORCH.draw_dropout(Draw(number[0], number[1]), key, columns, sites, heads)


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


def pair_chi_square(a, b, p):
    """Counts of (a, b) over independent pairs against those of two independent coins: 3 dof."""
    observed = torch.bincount((2 * a + b).flatten(), minlength=4).double()
    q = torch.tensor([p, 1 - p], dtype=torch.float64, device=DEVICE)
    expected = (q[:, None] * q).flatten() * a.numel()
    return ((observed - expected) ** 2 / expected).sum().item()


def neighbours(p):
    """(what differs, pairs): each pair holds one element a row, so that pairs are independent."""
    first = drawn(many_rows(), columns=9, heads=3)
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
        "examples": drawn(many_rows(example=1), columns=9, heads=3),
        "steps": drawn(many_rows(), step=8, columns=9, heads=3),
        "seeds": drawn(many_rows(), seed=6, columns=9, heads=3),
        "seeds 2^32 apart": drawn(many_rows(), seed=5 + 2**32, columns=9, heads=3),
    }
    for name, other in others.items():
        yield name, m[0, :, 0, 0], masks(other, p)[0, :, 0, 0]
        yield f"{name}, column 5", m[1, :, 2, 5], masks(other, p)[1, :, 2, 5]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_that_differ_in_anything_are_independent(p):
    """Chi-square of 3 degrees of freedom on 32,768 to 65,536 pairs: above 30 once in 700,000."""
    statistics = {name: pair_chi_square(a.long(), b.long(), p) for name, a, b in neighbours(p)}
    assert max(statistics.values()) < 30, {n: s for n, s in statistics.items() if s >= 30}


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
