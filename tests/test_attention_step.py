"""kernels/attention_step.py and key_values.py: one step of decoding, in torch and in kernels,
against the definition; to the bit where a bit is promised.

Room for up to 128 keys is one split, and one kernel; more is several, and two.
"""

import math

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import POISON, bits, empty_is_poisoned, guarded, poison
from launches import Operations, compilations, launches_are_declared, recorded
from test_attention_kernel import guarded_outputs, refused

from minift.kernels import attention_step as module
from minift.kernels.attention import attention_kv_ref, attention_ref
from minift.kernels.attention_step import attention_step_ref
from minift.ops import TORCH, TRITON, KeyValues, Layout, fill_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
tables = pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
rooms = pytest.mark.parametrize("L", [20, 140], ids=["one split", "two splits"])
groups = pytest.mark.parametrize(("H", "Hk"), [(2, 2), (4, 1)], ids=["one query", "a group"])
EMPTY = -1

# id: H, Hk, L, D, lengths
CASES = {
    "the first token: nothing but v passes": (2, 2, 5, 16, [0]),
    "the last that fits": (1, 1, 5, 16, [4, 4]),
    "slots of all kinds": (1, 1, 9, 16, [3, EMPTY, 0, 8, 9, -7, 100]),
    "no slot in use": (1, 1, 9, 16, [EMPTY, EMPTY]),
    "no slots": (1, 1, 9, 16, []),
    "room for one": (1, 1, 1, 16, [0, 1]),
    "room for a whole split": (1, 1, 128, 16, [127, 5, 64]),
    "around the first split": (1, 1, 300, 16, [0, 1, 127, 128, 129, 299]),
    "around the second split": (1, 1, 385, 16, [255, 256, 257, 384, 385]),
    "more splits than a tile of them": (1, 1, 2200, 16, [2199, 3]),
    "a group around a tile": (2, 1, 300, 64, [63, 64, 65, 127, 128, 129, 200]),
    "a group of many heads": (16, 1, 140, 16, [139, 2]),
    "a group of more heads than a product's rows": (20, 1, 140, 16, [139, 2]),
    "two groups of three heads": (6, 2, 140, 16, [139, 2]),
    "heads narrower than a product": (2, 1, 140, 8, [139, 2]),
    "D = 1": (1, 1, 9, 1, [8, 2]),
    "heads of an odd size": (2, 2, 140, 9, [139, 2]),
    "a group of an odd size": (4, 2, 140, 9, [139, 2]),
    "D = 32": (1, 1, 140, 32, [139, 2]),
    "D = 40, no power of two": (2, 2, 140, 40, [139, 2]),
    "D = 40 in a group": (2, 1, 140, 40, [139, 2]),
    "D = 64": (1, 1, 140, 64, [139, 63, 64, 65]),
    "D = 96, no power of two": (1, 1, 140, 96, [139, 2]),
    "D = 128": (1, 1, 140, 128, [139, 31, 32, 33]),
    "D = 128 in a group": (2, 1, 140, 128, [139, 33]),
    "D = 256": (1, 1, 140, 256, [139, 17]),
    "D = 256 in a group": (2, 1, 140, 256, [139, 17]),
}
CHOSEN = [(case, DTYPES[i % 3]) for i, case in enumerate(CASES.values())]
cases = pytest.mark.parametrize(("case", "dtype"), CHOSEN, ids=CASES)


def make(case, dtype=torch.float32, seed=0):
    """(qkv, cache, lengths); where nothing was written yet, the cache is NaN."""
    H, Hk, L, D, lengths = case
    generator = torch.Generator().manual_seed(seed)
    S = len(lengths)
    qkv = torch.randn(S, H + 2 * Hk, D, generator=generator).to(DEVICE, dtype)
    k, v = torch.randn(2, S, Hk, L, D, generator=generator).to(DEVICE, dtype)
    for x in (k, v):
        for s, n in enumerate(lengths):
            poison(x[s, :, max(n, 0) :])
    return qkv, KeyValues(k, v), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def copied(cache):
    return KeyValues(*(x.clone() for x in cache))


def same(a, b):
    """To the bit, NaN too."""
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def check(ops, case, dtype):
    """Result against the definition in the same dtype and in fp64; the cache to the bit."""
    qkv, cache, lengths = make(case, dtype)
    expected, after = attention_step_ref(qkv, cache, lengths)
    exact, _ = attention_step_ref(qkv.double(), KeyValues(*(x.double() for x in cache)), lengths)
    out = ops.attention_step_(qkv, cache, lengths)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    assert out.is_contiguous()
    assert same(cache, after)
    assert torch.equal(out.isnan(), expected.isnan())
    assert not out[lengths < 0].any()
    fits = (lengths >= 0) & (lengths < case[2])
    results = (x[fits] for x in (out, expected, exact))
    assert_as_accurate(*results, scale=max(4.0, qkv.abs().max().item() if len(qkv) else 0))


# ---------------------------------------------------------------- the definition


def test_the_definition_is_that_of_the_whole_sequence():
    """The last row of causal attention, and attention of one query to keys of their own."""
    qkv, cache, lengths = make((4, 2, 9, 16, [5, 0, 8]), torch.float64)
    out, after = attention_step_ref(qkv, cache, lengths)
    for s, n in enumerate(lengths.tolist()):
        k, v = (x[s, :, : n + 1].transpose(0, 1) for x in after)
        layout = Layout.pack([1], key_lengths=[n + 1])
        expected = attention_kv_ref(qkv[s : s + 1, :4], k, v, layout)
        torch.testing.assert_close(out[s : s + 1], expected)
        queries = torch.randn(n + 1, 4, 16, dtype=torch.float64, device=DEVICE)
        queries[-1] = qkv[s, :4]
        packed = torch.cat([queries, k, v], 1)
        whole = attention_ref(packed, Layout.pack([n + 1]), 4, causal=True)
        torch.testing.assert_close(out[s], whole[-1])


def test_the_definition_writes_nothing():
    qkv, cache, lengths = make((2, 1, 9, 16, [5, 0, EMPTY, 9]))
    before = copied(cache)
    attention_step_ref(qkv, cache, lengths)
    assert same(cache, before)


# ---------------------------------------------------------------- values


@tables
@cases
def test_every_case(ops, case, dtype):
    """Whatever lies beyond the keys of a slot is NaN; so is fresh memory."""
    with empty_is_poisoned():
        check(ops, case, dtype)


@tables
@dtypes
@rooms
@groups
def test_the_whole_grid_of_options(ops, dtype, L, H, Hk):
    check(ops, (H, Hk, L, 24, [L - 1, 0, EMPTY, L, L // 2]), dtype)


@tables
@groups
def test_token_by_token_is_the_whole_sequence(ops, H, Hk):
    """Prompts of different lengths, then step by step, each in a slot of its own: as attention
    over all of it at once, and the cache holds all keys and values."""
    prompts, steps, slots, L = [3, 127, 1], 3, [2, 0, 3], 131
    totals = [n + steps for n in prompts]
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(totals), H + 2 * Hk, 16, generator=generator).to(DEVICE)
    texts = whole.split(totals)
    expected = attention_ref(whole, Layout.pack(totals), H, causal=True).split(totals)
    cache = KeyValues(*(poison(torch.empty(4, Hk, L, 16, device=DEVICE)) for _ in range(2)))
    prompt = torch.cat([text[:n] for text, n in zip(texts, prompts, strict=True)])
    fill_(cache, prompt, Layout.pack(prompts), slots)
    lengths = torch.full((4,), EMPTY, dtype=torch.int32, device=DEVICE)
    lengths[slots] = torch.tensor(prompts, dtype=torch.int32, device=DEVICE)
    for step in range(steps):
        qkv = poison(torch.empty(4, H + 2 * Hk, 16, device=DEVICE))
        for slot, text, n in zip(slots, texts, prompts, strict=True):
            qkv[slot] = text[n + step]
        out = ops.attention_step_(qkv, cache, lengths)
        lengths[slots] += 1
        for slot, rows, n in zip(slots, expected, prompts, strict=True):
            torch.testing.assert_close(out[slot], rows[n + step])
        assert not out[1].any()
    for slot, text in zip(slots, texts, strict=True):
        kept = torch.cat([x[slot, :, : len(text)].transpose(0, 1) for x in cache], 1)
        assert torch.equal(kept, text[:, H:])
        assert cache.k[slot, :, len(text) :].isnan().all()


slot_lengths = st.one_of(st.integers(-1, 6), st.integers(120, 140))
any_case = st.builds(
    lambda heads, L, D, lengths: (*heads, L, D, lengths),
    st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    st.sampled_from([5, 128, 140]),
    st.sampled_from([8, 9, 16, 32]),
    st.lists(slot_lengths, min_size=1, max_size=2),
)


@tables
@settings(max_examples=20)
@given(any_case, st.sampled_from(DTYPES))
def test_any_step_is_as_accurate_as_the_definition(ops, case, dtype):
    """Lengths, heads and room that nobody thought of."""
    check(ops, case, dtype)


@settings(max_examples=15)
@given(any_case)
def test_a_slot_alone_equals_itself_among_others(case):
    """To the bit, wherever it lies and whatever the others hold."""
    qkv, cache, lengths = make(case)
    before = copied(cache)
    out = TRITON.attention_step_(qkv, cache, lengths)
    for s in range(len(qkv)):
        own = KeyValues(*(x[s : s + 1].clone() for x in before))
        alone = TRITON.attention_step_(qkv[s : s + 1], own, lengths[s : s + 1])
        assert torch.equal(bits(alone[0]), bits(out[s]))
        assert same(own, [x[s : s + 1] for x in cache])


def test_in_torch_other_lengths_change_a_result_by_rounding_at_most():
    """Also where a call is shared, and what is read beyond a slot's end is NaN or huge."""
    lengths = [100, 60, 99]
    qkv, cache, at = make((2, 2, 128, 16, lengths))
    out = TORCH.attention_step_(qkv, copied(cache), at)
    for value in (3e38, -3e38, math.inf, 0.0):
        other = copied(cache)
        for x in other:
            for s, n in enumerate(lengths):
                x[s, :, n:] = value
        again = TORCH.attention_step_(qkv, other, at)
        torch.testing.assert_close(again, out)
    for s in range(3):
        own = KeyValues(*(x[s : s + 1].clone() for x in cache))
        alone = TORCH.attention_step_(qkv[s : s + 1], own, at[s : s + 1])
        torch.testing.assert_close(alone[0], out[s])


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([9, 9, 9], [(3, 10)]),
        ([90, 80, EMPTY, 99], [(4, 100)]),
        ([90, 79, EMPTY, 99], [1, 1, 1]),
        ([], []),
    ],
    ids=["equal", "just alike enough", "too different", "nothing"],
)
def test_in_torch_slots_share_a_call_unless_padding_costs_more(monkeypatch, lengths, calls):
    """(slots, keys) of each call; slots that differ by more than a call costs go alone."""
    qkv, cache, at = make((1, 1, 1000, 8, lengths))
    for x in cache:
        x.nan_to_num_()
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, *args, **options):
        seen.append((len(k), k.shape[2]) if len(k) > 1 else 1)
        return original(q, k, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    TORCH.attention_step_(qkv, cache, at)
    assert seen == calls


@rooms
@groups
def test_two_runs_are_bitwise_equal(L, H, Hk):
    """And a token written again, where it was, changes nothing."""
    qkv, cache, lengths = make((H, Hk, L, 16, [L - 1, 3]), torch.bfloat16)
    first, kept = TRITON.attention_step_(qkv, cache, lengths), copied(cache)
    assert torch.equal(TRITON.attention_step_(qkv, cache, lengths), first)
    assert same(cache, kept)


# ---------------------------------------------------------------- extremes


@tables
@rooms
@groups
def test_huge_scores_do_not_overflow(ops, L, H, Hk):
    """Scores of 1e4 and more pick the largest key, in whichever split it lies."""
    qkv, cache, lengths = make((H, Hk, L, 16, [L - 1, L // 2]))
    qkv[:, : H + Hk] *= 100
    cache.k.mul_(100)
    expected, _ = attention_step_ref(qkv, cache, lengths)
    exact, _ = attention_step_ref(qkv.double(), KeyValues(*(x.double() for x in cache)), lengths)
    out = ops.attention_step_(qkv, cache, lengths)
    assert out.isfinite().all()
    assert_as_accurate(out, expected, exact, scale=4.0)


@tables
@rooms
@groups
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_below_those_of_padding(ops, L, H, Hk, sign):
    """All scores are -1e3, those of keys that a tile only pads itself with would be 0: it is the
    mean of the values all the same."""
    qkv, cache, lengths = make((H, Hk, L, 16, [L - 1, 5]))
    qkv[:, :H], qkv[:, H : H + Hk] = sign * 16.0, -sign * 16.0
    cache.k.fill_(-sign * 16.0)
    out = ops.attention_step_(qkv, cache, lengths)
    for s, n in enumerate(lengths.tolist()):
        mean = cache.v[s, :, : n + 1].mean(1).repeat_interleave(H // Hk, 0)
        torch.testing.assert_close(out[s], mean)


@tables
@rooms
@groups
@pytest.mark.parametrize("part", ["q", "new k", "new v", "k", "v"])
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of numpy, in the interpreter
def test_what_is_not_finite_stays_in_its_slot(ops, L, H, Hk, part):
    """NaN anywhere in a slot makes a NaN there, and reaches no other."""
    case = (H, Hk, L, 16, [L // 3, L - 1, 3])
    clean = ops.attention_step_(*make(case))
    qkv, cache, lengths = make(case)
    {
        "q": qkv[1, :H],
        "new k": qkv[1, H : H + Hk],
        "new v": qkv[1, H + Hk :],
        "k": cache.k[1, :, L // 3],
        "v": cache.v[1, :, L // 3],
    }[part][..., 2] = math.nan
    out = ops.attention_step_(qkv, cache, lengths)
    assert out[1].isnan().any(-1).all()
    torch.testing.assert_close(out[[0, 2]], clean[[0, 2]])


@rooms
@groups
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # rows that only fill up a product
def test_keys_of_minus_infinity_count_nothing(L, H, Hk):
    """Where all scores of a split are -inf, the other splits decide."""
    qkv, cache, lengths = make((H, Hk, L, 16, [L - 1]))
    qkv[:, :H] = qkv[:, :H].abs() + 0.1
    cache.k[:, :, : L // 2] = -math.inf
    out = TRITON.attention_step_(qkv, cache, lengths)
    expected, _ = attention_step_ref(qkv, cache, lengths)
    assert expected.isfinite().all()
    torch.testing.assert_close(out, expected)


# ---------------------------------------------------------------- storage


@rooms
@pytest.mark.parametrize(("dtype", "offset"), list(zip(DTYPES, [1, 0, 3], strict=True)))
@pytest.mark.parametrize("D", [24, 9])
def test_nothing_is_touched_beside_the_tensors(L, dtype, offset, D):
    """Tensors that lie anywhere, with NaN between their rows; of the cache one row a slot is
    written, and nothing around it is."""
    qkv, cache, lengths = make((4, 2, L, D, [L - 1, 0, EMPTY, L, 7]), dtype)
    expected, after = attention_step_ref(qkv, cache, lengths)
    inputs = [guarded(x, offset, slack=8) for x in (qkv, *cache)]
    before = inputs[0].memory.clone()
    with guarded_outputs() as guards:
        out = TRITON.attention_step_(
            inputs[0].tensor, KeyValues(*(x.tensor for x in inputs[1:])), lengths
        )
    assert same([x.tensor for x in inputs[1:]], after)
    assert torch.equal(bits(inputs[0].memory), bits(before))
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02, equal_nan=True)
    for guard in (*inputs, *guards):
        guard.assert_untouched()
    guards[0].assert_written()


@tables
def test_the_cache_may_lie_as_it_likes(ops):
    """Of all layers in one tensor; (S, L, Hk, D) seen as (S, Hk, L, D); heads of q in turn."""
    case = (4, 2, 140, 16, [139, 5, EMPTY])
    qkv, cache, lengths = make(case)
    kept = copied(cache)
    expected = ops.attention_step_(qkv, cache, lengths)
    layers = poison(torch.empty(2, 3, *kept.k.shape, device=DEVICE))
    layers[:, 1].copy_(torch.stack(list(kept)))
    turned = KeyValues(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in kept))
    assert turned.k.stride(1) < turned.k.stride(2)
    for other in (KeyValues(*layers[:, 1]), turned):
        out = ops.attention_step_(qkv.transpose(0, 1).contiguous().transpose(0, 1), other, lengths)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        assert same(other, cache)
    assert (bits(layers[:, ::2]) == POISON[torch.float32]).all()


@pytest.mark.parametrize("axis", ["slot", "head", "key"])
def test_caches_beyond_two_thousand_million_elements(axis):
    """The last slot, head or key begins past 2**31 elements."""
    S, Hk, L = {"slot": (2, 1, 3), "head": (1, 3, 3), "key": (1, 1, 140)}[axis]
    case = (Hk, Hk, L, 16, [L - 1] * S)
    qkv, cache, lengths = make(case, torch.bfloat16)
    far = {"slot": (2**31 + 16, 64, 16, 1), "head": (16, 2**30 + 16, 16, 1),
           "key": (16, 16, 2**24, 1)}[axis]  # fmt: skip
    size = sum((n - 1) * stride for n, stride in zip(cache.k.shape, far, strict=True)) + 1
    memory = torch.empty(size + 64, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, untouched
    assert size > 2**31
    # v beside k would want as much again: it lies in the same rows, and k is v here.
    k = memory.as_strided(cache.k.shape, far).copy_(cache.k)
    qkv[:, 2 * Hk :] = qkv[:, Hk : 2 * Hk]
    expected, after = attention_step_ref(qkv, KeyValues(cache.k, cache.k), lengths)
    out = TRITON.attention_step_(qkv, KeyValues(k, k), lengths)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert same([k], after[:1])


@tables
def test_qkv_and_lengths_are_only_read(ops):
    """And lengths may lie anywhere."""
    qkv, cache, _ = make((2, 1, 140, 16, [139, 5, EMPTY]))
    lengths = torch.tensor([139, 9, 5, 9, EMPTY, 9], dtype=torch.int32, device=DEVICE)
    kept = qkv.clone(), lengths.clone(), *copied(cache)
    out = ops.attention_step_(qkv, cache, lengths[::2])
    expected, _ = attention_step_ref(qkv, KeyValues(*kept[2:]), lengths[::2])
    torch.testing.assert_close(out, expected)
    assert same((qkv, lengths), kept[:2])
    assert (qkv._version, lengths._version) == (0, 0)


# ---------------------------------------------------------------- what is launched


def launched(S, H, Hk, L, D, dtype=torch.bfloat16, length=0, first=0):
    """The launches of a step, none executed; lengths are part of a list, from `first` on."""
    qkv = torch.zeros(S, H + 2 * Hk, D, dtype=dtype, device=DEVICE)
    cache = KeyValues(*torch.zeros(2, S, Hk, L, D, dtype=dtype, device=DEVICE))
    lengths = torch.full((first + S,), length, dtype=torch.int32, device=DEVICE)[first:]
    with recorded(run=False) as seen:
        TRITON.attention_step_(qkv, cache, lengths)
    return seen


@pytest.mark.parametrize(
    ("L", "splits"), [(1, 1), (128, 1), (129, 2), (1024, 8), (8192, 64), (8193, 33), (40000, 40)]
)
def test_programs_follow_from_slots_heads_and_room(L, splits):
    """As many splits in any batch; at most 64, of at least 128 keys; the same grid for all
    lengths, and nothing for no slots."""
    for S, H, Hk in ((1, 4, 4), (3, 4, 2)):
        grids = [(S * Hk * splits,), (S * H,)][: 1 + (splits > 1)]
        for length in (EMPTY, 0, L - 1, L):
            assert [x.grid for x in launched(S, H, Hk, L, 16, length=length)] == grids
    keys = module._keys_of(L)
    assert keys * splits >= L > keys * (splits - 1)
    assert keys >= 128
    assert splits <= 64
    assert not launched(0, 4, 4, L, 16)


@groups
def test_slots_and_room_compile_nothing_new(H, Hk):
    """One binary of each kernel, wherever the lengths lie; a second of the first for room that is
    one split."""
    several = (1, 129), (2, 300), (17, 8193), (16, 1024)
    seen = [x for S, L in several for x in launched(S, H, Hk, L, 64)]
    assert compilations(seen) == 2
    seen += [x for S, L in ((1, 128), (3, 77), (16, 1)) for x in launched(S, H, Hk, L, 64)]
    assert compilations(seen) == 3
    seen += launched(3, H, Hk, 300, 64, first=1)
    assert compilations(seen) == 3


def test_nothing_else_runs_and_nobody_waits():
    """No operation of torch reaches the device: what a graph captures are the two kernels."""
    qkv, cache, lengths = make((4, 2, 300, 16, [299, 5]))
    with recorded(run=False) as seen, Operations() as operations:
        TRITON.attention_step_(qkv, cache, lengths)
    assert [x.kernel for x in seen] == ["_split_kernel", "_combine_kernel"]
    assert not operations.ran


def test_what_is_declared_is_what_is_launched():
    """Packed rows and a contiguous cache, at each of the declared cases."""
    seen = []
    for dtype, D, group, several in module._CASES:
        L = 1024 if several else 128
        seen += launched(2, 2 * group, 2, L, D, module._DTYPES[dtype])[:1]
    for dtype, D, *_ in module._CASES:
        seen += launched(2, 2, 2, 1024, D, module._DTYPES[dtype])[1:]
    found = launches_are_declared(seen, module)
    assert found == {launch.name for launch in module.LAUNCHES}


@pytest.mark.parametrize("group", [1, 4])
def test_tiles_keep_enough_loads_on_their_way(group):
    """64 bytes a thread at least, of keys and values; products have 16 keys or more."""
    for D in (1, 16, 17, 64, 80, 128, 256):
        for dtype in DTYPES:
            found = module._tile(D, dtype, group)
            threads = 32 * found["num_warps"]
            row = 2 * max(16, 1 << (D - 1).bit_length()) * dtype.itemsize
            ahead = found["TILES"] if group == 1 else found["num_stages"] - 1
            assert found["BLOCK"] * ahead * row >= 64 * threads
            assert group == 1 or 16 <= found["BLOCK"] <= 128
            assert found["BLOCK"] <= 16 or found["BLOCK"] * row <= 2**14


# ---------------------------------------------------------------- the cache


def test_prompts_go_to_their_slots():
    """To the bit, in a bucket too; slack rows, other slots and rows beyond a prompt stay."""
    H, Hk, D, L = 4, 2, 9, 7
    for bucket in (None, (6, 8)):
        layout = Layout.pack([3, 0, 7], 13, bucket=bucket).to(DEVICE)
        qkv = torch.randn(13, H + 2 * Hk, D, device=DEVICE, requires_grad=True)
        guards = [guarded(poison(torch.empty(4, Hk, L, D, device=DEVICE)), 3, 1) for _ in range(2)]
        cache = KeyValues(*(x.tensor for x in guards))
        fill_(cache, qkv, layout, [2, 1, 0])
        for x, first, guard in zip(cache, (H, H + Hk), guards, strict=True):
            rows = qkv.detach()[:, first : first + Hk].transpose(0, 1)
            assert torch.equal(x[2, :, :3], rows[:, :3])
            assert torch.equal(x[0], rows[:, 3:10])
            assert not x.requires_grad
            left = [x[1], x[3], x[2, :, 3:]]
            assert all((bits(y) == POISON[torch.float32]).all() for y in left)
            guard.assert_untouched()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0], r"different slots in 0 to 3 for 2 sequences, got \[0\]"),
        ([0, 0], "different slots"),
        ([0, 4], "different slots"),
        ([-1, 0], "different slots"),
        ([0, 1, 2, 3, 4], "different slots"),
    ],
)
def test_slots_that_do_not_fit_are_named(slots, message):
    cache = KeyValues.empty((4, 2, 7, 16), torch.float32, DEVICE)
    with pytest.raises(ValueError, match=message):
        fill_(cache, torch.zeros(5, 8, 16, device=DEVICE), Layout.pack([3, 2]), slots)


def test_prompts_that_do_not_fit_are_named():
    cache = KeyValues.empty((4, 2, 7, 16), torch.float32, DEVICE)
    with pytest.raises(ValueError, match="expected at most 7 tokens a sequence, got 8"):
        fill_(cache, torch.zeros(8, 8, 16, device=DEVICE), Layout.pack([8]), [0])
    for shape in ((4, 8, 16), (5, 4, 16), (5, 8, 15), (5, 128)):
        with pytest.raises(ValueError, match=r"expected qkv \(5, H \+ 2 \* 2, 16\), got "):
            fill_(cache, torch.zeros(shape, device=DEVICE), Layout.pack([5]), [0])


def test_an_empty_cache():
    """Two tensors of that shape that share no memory."""
    cache = KeyValues.empty((4, 2, 7, 16), torch.bfloat16, torch.device(DEVICE))
    for x in cache:
        assert (tuple(x.shape), x.dtype, x.device.type) == ((4, 2, 7, 16), torch.bfloat16, DEVICE)
        assert x.is_contiguous()
    assert cache.v.data_ptr() - cache.k.data_ptr() == 2 * cache.k.numel()


# ---------------------------------------------------------------- what does not fit


def arguments(**changes):
    """qkv, cache and lengths of three slots, some of them other."""
    found = {
        "qkv": torch.zeros(3, 8, 16), "k": torch.zeros(3, 2, 7, 16), "v": torch.zeros(3, 2, 7, 16),
        "lengths": torch.zeros(3, dtype=torch.int32),
    }  # fmt: skip
    found |= changes
    found = {name: x if x.is_meta else x.to(DEVICE) for name, x in found.items()}
    return found["qkv"], KeyValues(found["k"], found["v"]), found["lengths"]


half, meta = torch.zeros(3, 2, 7, 16).half(), torch.zeros(3, 2, 7, 16, device="meta")


@tables
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(3, 7, 16)}, r"k, v \(S, Hk, L, D\), got \[\(3, 7, 16\), \(3, 2"),
        ({"v": torch.zeros(3, 2, 8, 16)}, r"k, v .* got .*, \(3, 2, 8, 16\)\]"),
        ({name: torch.zeros(3, 2, 0, 16) for name in "kv"}, r"k, v \(S"),
        (
            {"qkv": torch.zeros(2, 8, 16)},
            r"qkv \(3, H \+ 2 \* 2, 16\), 2 dividing H, got \(2, 8, 16\)",
        ),
        ({"qkv": torch.zeros(3, 8, 8)}, r"qkv \(3, H .*, got \(3, 8, 8\)"),
        ({"qkv": torch.zeros(3, 128)}, r"qkv \(3, H .*, got \(3, 128\)"),
        ({"qkv": torch.zeros(3, 4, 16)}, r"2 dividing H, got \(3, 4, 16\)"),
        ({"qkv": torch.zeros(3, 7, 16)}, r"2 dividing H, got \(3, 7, 16\)"),
        (
            {"lengths": torch.zeros(2, dtype=torch.int32)},
            r"lengths \(3,\) int32, got \(2,\), torch.int32",
        ),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"int32, got \(3,\), torch.int64"),
        (
            {"lengths": torch.zeros(3, dtype=torch.int32, device="meta")},
            "expected all on .*, got torch.int32, meta",
        ),
        ({"k": half}, r"expected all on \w+(:0)?, the cache in torch.float32, got torch.float16"),
        ({"v": half}, r"expected all on \w+(:0)?, the cache in torch.float32, got torch.float16"),
        ({"k": meta}, "expected all on .*, got torch.float32, meta"),
        ({"v": meta}, "expected all on .*, got torch.float32, meta"),
        ({"qkv": torch.zeros(3, 8, 16, requires_grad=True)}, "no gradient: call it under torch.no"),
        ({"v": torch.zeros(3, 2, 7, 16, requires_grad=True)}, "no gradient"),
    ],
)
def test_what_does_not_fit_is_named(ops, changes, message):
    refused(ops.attention_step_, message, *arguments(**changes))


@tables
def test_weights_may_want_a_gradient_where_none_is_made(ops):
    """Under no_grad a projection by trainable weights is as good as any."""
    with torch.no_grad():
        out = ops.attention_step_(*arguments(qkv=torch.zeros(3, 8, 16, requires_grad=True)))
    assert not out.requires_grad


def caches(*shape, dtype=torch.float32):
    return {name: torch.zeros(shape, dtype=dtype) for name in "kv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qkv": torch.zeros(3, 8, 16).double()} | caches(3, 2, 7, 16, dtype=torch.float64),
            "expected fp32, fp16 or bf16, got torch.float64",
        ),
        (
            {"qkv": torch.zeros(3, 8, 257)} | caches(3, 2, 7, 257),
            "expected heads of at most 256, got 257",
        ),
        ({"qkv": torch.zeros(3, 16, 8).mT}, r"unit stride along D, got \(128, 1, 8\): call"),
        ({"k": torch.zeros(3, 2, 16, 7).mT}, r"unit stride along D, got \(224, 112, 1, 7\)"),
        ({"v": torch.zeros(3, 2, 9, 16)[:, :, 1:8]}, "k and v alike in strides, got "),
    ],
    ids=["fp64", "D 257", "strided qkv", "strided k", "v otherwise"],
)
def test_what_does_not_fit_the_kernels_is_named(changes, message):
    refused(TRITON.attention_step_, message, *arguments(**changes))


def test_keys_too_far_apart_are_named():
    """Within a tile an offset has 32 bits."""
    memory = torch.empty(8 * 2**24, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((3, 2, 7, 16), (32, 16, 2**24 + 8, 1))
    qkv, _, lengths = arguments(qkv=torch.zeros(3, 8, 16).half())
    message = r"rows at most 2\^24 elements apart, got 16777224"
    refused(TRITON.attention_step_, message, qkv, KeyValues(far, far), lengths)


def test_a_device_without_kernels_is_named(monkeypatch):
    """Rather than a wild read: CPU tensors where nothing interprets."""
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    qkv, cache, lengths = (torch.zeros(3, 8, 16), KeyValues(*torch.zeros(2, 3, 2, 7, 16)),
                           torch.zeros(3, dtype=torch.int32))  # fmt: skip
    refused(TRITON.attention_step_, "expected tensors on a GPU, got cpu", qkv, cache, lengths)
