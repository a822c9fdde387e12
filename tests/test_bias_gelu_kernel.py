"""kernels/bias_gelu.py: the kernels against the definition, over all of the curve."""

import itertools
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import empty_is_poisoned, guarded, poisoned
from launches import compilations, launches_are_declared, recorded
from torch import Tensor

from minift.batch import Example, collate
from minift.bert import BertClassifier
from minift.config import ModelConfig
from minift.kernels import bias_gelu as module
from minift.kernels.bias_gelu import KINDS, bias_gelu, bias_gelu_ref
from minift.layers import init_weights
from minift.ops import TORCH, TRITON
from minift.tasks.classification import Classification

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
kinds = pytest.mark.parametrize("kind", KINDS)
# Around each tile of rows, of 256 columns and of 128 bits; one, primes.
SHAPES = [(1, 1), (2, 1), (1, 2), (3, 5), (7, 8), (8, 7), (5, 31), (9, 255), (17, 256), (16, 257)]
SHAPES += [(4, 511), (1, 513), (33, 16), (67, 3), (3, 1031)]


def make(T, F, dtype=torch.float32, bias="fp32", offset=0, slack=0):
    """x, bias, dy, all numbers of `dtype`; the first of each `offset` past 16 bytes; NaN around."""
    g = torch.Generator().manual_seed(1000 * T + F)
    x, b, dy = (torch.randn(n, F, generator=g).to(dtype) for n in (T, 1, T))
    b = None if bias is None else b[0].float() if bias == "fp32" else b[0]
    near = dict(offset=offset, slack=slack)
    b = None if b is None else guarded(b.to(DEVICE), offset).tensor
    return guarded((3 * x).to(DEVICE), **near).tensor, b, guarded(dy.to(DEVICE), **near).tensor


def run(fn, x, bias, dy, kind, need=(True, True)) -> list[Tensor]:
    """y, and the gradients that are needed of x and bias."""
    given = [None if i is None else i.detach() for i in (x, bias)]
    leaves = [i.requires_grad_() for i, n in zip(given, need, strict=True) if i is not None and n]
    y = fn(*given, kind)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))] if leaves else [y]


def ours(*args, **options) -> list[Tensor]:
    with empty_is_poisoned():
        return run(bias_gelu, *args, **options)


def check(x, bias, dy, kind):
    """Against the definition in the dtype of x and in fp64."""
    narrow, wide = ([None if i is None else i.to(to) for i in (x, bias, dy)]
                    for to in (x.dtype, torch.float64))  # fmt: skip
    actual = ours(x, bias, dy, kind)
    same_dtype, exact = run(bias_gelu_ref, *narrow, kind), run(bias_gelu_ref, *wide, kind)
    assert [a.dtype for a in actual] == [i.dtype for i in (x, x, bias) if i is not None]
    for a, s, e in zip(actual, same_dtype, exact, strict=True):
        assert_as_accurate(a.to(x.dtype), s, e, max(1.0, e.abs().max().item()))


# ---------------------------------------------------------------- values


@kinds
@dtypes
@pytest.mark.parametrize("bias", [None, "fp32", "same"])
def test_the_whole_grid_of_options(kind, dtype, bias):
    """The result and every gradient, for each kind, dtype and dtype of the bias."""
    check(*make(37, 21, dtype, bias), kind)


@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_every_shape(T, F):
    check(*make(T, F, torch.bfloat16), "gelu_erf")


def exact(z, kind):
    """y and dy/dz in fp64 by functions that have the negative tail to the last bit."""
    if kind == "gelu_erf":
        phi = torch.special.erfc(-z / math.sqrt(2)) / 2
        return z * phi, phi + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    z = z.detach().requires_grad_()
    y = z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    return y.detach(), *torch.autograd.grad(y.sum(), z)


@kinds
@pytest.mark.parametrize("low", range(-10, 10))
def test_every_part_of_the_curve(kind, low):
    """As accurate as the definition in fp32 on each unit of z, at the size that y has there."""
    x = torch.linspace(low, low + 1, 2048, device=DEVICE).view(8, 256)
    one = torch.ones_like(x)
    same_dtype = run(bias_gelu_ref, x, None, one, kind)
    true = exact(x.double(), kind)
    for a, s, e in zip(ours(x, None, one, kind), same_dtype, true, strict=True):
        assert_as_accurate(a, s, e, e.abs().max().item())


def test_every_number_of_bf16():
    """All 65,536: beside the exact result from -6 up, no larger than it is there below that."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    x = x.to(DEVICE)
    y, dx = (i.double() for i in ours(x, None, torch.ones_like(x), "gelu_erf"))
    exact_y, exact_dx = exact(x.double(), "gelu_erf")
    eps, known, nan = torch.finfo(x.dtype).eps, (x >= -6) & x.isfinite() & (x != 0), x.isnan()
    assert ((y - exact_y).abs() <= eps * exact_y.abs() + 2.0**-133)[known].all()
    assert ((dx - exact_dx).abs() <= eps * exact_dx.abs().clamp(min=eps))[known].all()
    for left, size in ((y[x < -6], 7e-9), (dx[x < -6], 5e-8)):
        assert (left <= 0).all()
        assert (left >= -size).all()
    assert torch.equal(y[x > 6], x[x > 6].double())
    assert (dx[x > 6] == 1).all()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(dx.isnan(), nan)


@kinds
@dtypes
def test_far_ends(kind, dtype):
    """The line and zero, with their slopes: no inf * 0, no NaN but of a NaN."""
    big, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.tensor([[-torch.inf, -big, -50, 50, big, torch.inf, torch.nan]]).to(DEVICE, dtype)
    y, dx = ours(x, None, torch.full_like(x, 2), kind)
    assert y[0, :6].tolist() == x[0, :6].clamp(min=0).tolist()
    assert dx[0].tolist()[:6] == [0, 0, 0, 2, 2, 2]
    assert y[0, 6].isnan()
    assert dx[0, 6].isnan()
    x = torch.tensor([[0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4]]).to(DEVICE, dtype)
    y, dx = ours(x, None, torch.full_like(x, 2), kind)
    torch.testing.assert_close(y, x / 2, rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(dx, torch.ones_like(x), rtol=2 * torch.finfo(dtype).eps, atol=0)


@kinds
def test_the_curve_does_not_jump(kind):
    """It falls to its one minimum, near -0.75, and rises from there: no step where formulas meet,
    at 0, or where the polynomial ends, at -6. Steps of fp32's rounding aside."""
    x = torch.linspace(-20, 3, 4096, device=DEVICE).view(16, 256)
    y, dx = (i.flatten().double() for i in ours(x, None, torch.ones_like(x), kind))
    steps, right = y.diff(), x.flatten()[:-1] > -0.74
    ulp = torch.finfo(torch.float32).eps * y.abs().clamp(min=0.1)[1:]
    assert (steps > -ulp)[right].all()
    assert (steps < ulp)[x.flatten()[1:] < -0.76].all()
    assert (dx.diff().abs() < 2 * x.flatten().diff()[0]).all()


def test_kinds_are_told_apart():
    """They differ by 5e-4 at most, which bf16 hides."""
    x, bias, dy = make(9, 300)
    for a, b in zip(*(ours(x, bias, dy, kind) for kind in KINDS), strict=True):
        assert (a - b).abs().max() > 1e-4


def test_the_gradient_of_the_bias_is_summed_in_fp32(monkeypatch):
    """Of 4096 rows of bf16 to 4 ulp of fp32; summed in bf16 they would be 10 % off."""
    monkeypatch.setattr(module, "ROWS", 512)  # fewer programs to interpret
    monkeypatch.setattr(module, "GRADIENT_ROWS", 128)
    x, bias, dy = make(4096, 3, torch.bfloat16)
    dy = dy + 1
    *_, dbias = ours(x, bias, dy, "gelu_erf")
    exact = run(bias_gelu_ref, x.double(), bias.double(), dy, "gelu_erf")[2]
    assert dbias.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(dbias.double(), exact, rtol=4 * eps, atol=0)


@given(
    T=st.integers(1, 70),
    F=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    bias=st.sampled_from([None, "fp32", "same"]),
    offset=st.integers(0, 3),
    slack=st.sampled_from([0, 1, 16]),
)
@settings(max_examples=15)
def test_any_shape_stride_and_alignment(T, F, dtype, kind, bias, offset, slack):
    """Rows that start anywhere; the NaN around them is not read."""
    check(*make(T, F, dtype, bias, offset, slack), kind)


# ---------------------------------------------------------------- memory


@contextmanager
def guarded_results(offset):
    """What is allocated in the block lies in memory that is not its own."""
    guards, original = [], Tensor.new_empty

    def new_empty(self, *shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return original(self, *shape, dtype=dtype or self.dtype, device=device)
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        guards.append(poisoned(*shape, dtype=dtype or self.dtype, offset=offset))
        return guards[-1].tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield guards


@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("T", "F"), [(1, 1), (5, 31), (67, 257), (19, 256)])
def test_writes_all_of_its_results_and_nothing_else(T, F, offset, dtype):
    """y, dx, the partial sums and the sums."""
    inputs = make(T, F, dtype, "fp32", offset, slack=3)
    expected = ours(*inputs, "gelu_erf")
    with guarded_results(offset) as guards:
        actual = run(bias_gelu, *inputs, "gelu_erf")
    assert len(guards) == 4
    for guard in guards:
        guard.assert_untouched()
        guard.assert_written()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_rows_beyond_two_thousand_million_elements():
    """Offsets are 64 bits wide: the third row starts at 2**31 + 4 elements."""
    stride = 2**30 + 2
    flat = torch.empty(2 * stride + 20, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, untouched
    far = [flat.as_strided((3, 6), (stride, 1), at) for at in (0, 7)]
    x, bias, dy = make(3, 6, torch.bfloat16)
    for there, here in zip(far, (x, dy), strict=True):
        there.copy_(here)
    expected = ours(x, bias, dy, "gelu_erf")
    for a, e in zip(run(bias_gelu, far[0], bias, far[1], "gelu_erf"), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["of a sum", "of a transpose", "every other column"])
def test_upstream_gradients_of_any_stride(name):
    """autograd hands over what it has."""
    x, bias, dy = make(6, 9)
    dy = {
        "of a sum": torch.tensor(1.5, device=DEVICE).expand(6, 9),
        "of a transpose": dy.T.contiguous().T,
        "every other column": torch.stack((dy, dy + 1), 2)[..., 0],
    }[name]
    expected = ours(x, bias, dy.contiguous(), "gelu_erf")
    for a, e in zip(ours(x, bias, dy, "gelu_erf"), expected, strict=True):
        assert torch.equal(a, e)


def test_a_bias_of_any_stride_has_its_gradient():
    x, bias, dy = make(6, 9)
    wide = torch.stack((bias, bias + 1), 1)[:, 0].requires_grad_()
    (actual,) = torch.autograd.grad(bias_gelu(x, wide, "gelu_erf"), wide, dy)
    assert torch.equal(actual, ours(x, bias, dy, "gelu_erf")[2])


@pytest.mark.parametrize(("T", "F"), [(0, 5), (5, 0), (0, 0)])
def test_no_elements(T, F):
    """No rows: the gradient of the bias is 0."""
    x, bias, dy = make(T, F)
    y, dx, dbias = ours(x, bias, dy, "gelu_erf")
    assert y.shape == dx.shape == (T, F)
    assert dbias.tolist() == [0] * F


# ---------------------------------------------------------------- promises


def test_a_row_alone_equals_itself_in_any_batch():
    """To the bit, result and gradient."""
    x, bias, dy = make(21, 260, torch.bfloat16)
    y, dx, _ = ours(x, bias, dy, "gelu_erf")
    for i in (0, 7, 8, 20):
        row = slice(i, i + 1)
        y_, dx_, _ = ours(x[row], bias, dy[row], "gelu_erf")
        assert torch.equal(y_, y[row])
        assert torch.equal(dx_, dx[row])


@dtypes
def test_the_same_bits_in_every_run(dtype):
    inputs = make(150, 20, dtype)
    first = ours(*inputs, "gelu_tanh")
    for _ in range(2):
        for a, e in zip(ours(*inputs, "gelu_tanh"), first, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_programs_that_walk_many_tiles(programs, monkeypatch):
    """y and dx to the bit; sums in another order."""
    inputs = make(131, 40, torch.bfloat16)
    expected = ours(*inputs, "gelu_erf")
    monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(module, "_grid", lambda *a, g=module._grid: g(*a[:3], programs))
    with recorded() as seen:
        y, dx, dbias = ours(*inputs, "gelu_erf")
    assert [launch.grid for launch in seen[:2]] == [(1, programs)] * 2
    assert torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1])
    torch.testing.assert_close(dbias, expected[2])


@pytest.mark.parametrize(
    ("T", "F", "grid"),
    [
        (16384, 3072, (12, 64)),  # 768 programs of 792
        (4096, 3072, (12, 64)),
        (800, 3072, (12, 50)),
        (16384, 768, (3, 256)),
        (16384, 16, (1, 256)),
        (64, 2**20, (4096, 1)),
        (1, 1, (1, 1)),
    ],
)
def test_few_partial_sums_and_many_programs(T, F, grid):
    """Six programs on each of 132 multiprocessors, or nearly; all with as many tiles, the last
    with fewer; sums of 264 rows at most."""
    assert module._grid(T, F, 8, module._most(F)) == grid


def test_a_grid_has_two_axes():
    """The second may have 65,535 programs: of more rows each walks several tiles."""
    assert module._grid(2**20 - 16, 1, 16) == (1, 65535)
    assert module._grid(2**20, 1, 16) == (1, 32768)
    assert module._grid(0, 1, 16) == (1, 0)


def test_inputs_are_only_read():
    x, bias, dy = make(9, 33, torch.bfloat16)
    watched = [x.requires_grad_(), bias.requires_grad_(), dy]
    before = [(i.detach().clone(), i._version) for i in watched]
    bias_gelu(x, bias, "gelu_erf").backward(dy)
    for i, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(i, value)
        assert i._version == version


@pytest.mark.parametrize(
    ("biased", "need", "kernels"),
    [
        (True, (True, True), ["_gelu_kernel", "_gradient_kernel", "_column_sums_kernel"]),
        (True, (True, False), ["_gelu_kernel", "_gradient_kernel"]),
        (True, (False, True), ["_gelu_kernel", "_gradient_kernel", "_column_sums_kernel"]),
        (True, (False, False), ["_gelu_kernel"]),
        (False, (True, False), ["_gelu_kernel", "_gradient_kernel"]),
    ],
)
def test_what_is_frozen_costs_nothing(biased, need, kernels):
    """No sums without a bias to learn, no dx without a need of it; the rest to the bit."""
    x, bias, dy = make(19, 40, bias="fp32" if biased else None)
    every = ours(x, bias, dy, "gelu_erf")
    with recorded() as seen:
        some = ours(x, bias, dy, "gelu_erf", need=need)
    assert [launch.kernel for launch in seen] == kernels
    wanted = [every[0], *(e for e, n in zip(every[1:], need, strict=False) if n)]
    for a, e in zip(some, wanted, strict=True):
        assert torch.equal(a, e)
    if len(seen) > 1:
        assert (seen[1].arguments["dx_ptr"] is not None) == need[0]
        assert (seen[1].arguments["partials_ptr"] is not None) == need[1]


def test_evaluation_saves_nothing():
    """Nor does it in inference mode, where tensors have no version."""
    x, bias, dy = make(5, 20)
    with torch.inference_mode():
        y = bias_gelu(x.clone(), bias.clone(), "gelu_erf")
    assert torch.equal(y, ours(x, bias, dy, "gelu_erf")[0])
    assert not bias_gelu(x, bias, "gelu_erf").requires_grad


def test_saved_is_x_alone():
    """T x F numbers, and no copy of them."""
    x, bias, _ = make(5, 20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, id):
        bias_gelu(x.requires_grad_(), bias.requires_grad_(), "gelu_erf")
    assert kept == [x.data_ptr(), bias.data_ptr()]


def test_one_binary_for_all_rows():
    """A new T compiles nothing."""
    with recorded(run=False) as seen:
        for T, F in itertools.product([1, 2, 16, 17, 800, 4096], [32, 48]):
            x, bias, dy = (torch.zeros(n, F, device=DEVICE) for n in (T, 1, T))
            run(bias_gelu, x, bias[0], dy, "gelu_erf")
    assert compilations(seen) == 3


def test_declared_launches_are_those_that_run():
    """What is compiled without a GPU is what a GPU runs: every kind, dtype and option."""
    cases = [(kind, dtype, "fp32", (True, True)) for kind in KINDS for dtype in DTYPES]
    cases += [
        ("gelu_erf", torch.bfloat16, "same", (True, True)),
        ("gelu_erf", torch.bfloat16, None, (True, True)),
        ("gelu_erf", torch.bfloat16, "fp32", (False, True)),
    ]
    with recorded(run=False) as seen:
        for kind, dtype, bias, need in cases:
            run(bias_gelu, *make(9, 48, dtype, bias), kind, need)
    assert launches_are_declared(seen, module) == {launch.name for launch in module.LAUNCHES}


# ---------------------------------------------------------------- in a model


def test_the_table_has_the_kernel():
    assert TRITON.bias_gelu is bias_gelu


@kinds
def test_a_model_learns_the_same_with_it(kind):
    """Loss and gradients of a small BERT, the MLP's biases among them, as TORCH has them."""
    config = ModelConfig(
        vocab_size=20, max_len=8, n_types=2, dim=8, n_layer=2, n_head=2, ffn_dim=24,
        activation=kind, norm_eps=1e-12,
        embedding_dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1,
        classifier_dropout=0.1, init_std=0.5, labels=("a", "b"),
    )  # fmt: skip
    model = BertClassifier(config)
    init_weights(model, config.init_std, seed=0)
    model.to(DEVICE)
    examples = [Example([1, 2, 3], [0, 0, 1], 0), Example([4, 5], [0, 0], 1)]
    batch, task = collate(examples, [0, 1]).to(DEVICE), Classification(("a", "b"))
    found = []
    for table in (TORCH, replace(TORCH, bias_gelu=bias_gelu)):
        loss = task.loss(model(batch, table), batch, TORCH)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "relu"}, "expected kind gelu_erf or gelu_tanh, got 'relu'"),
        ({"bias": torch.zeros(1)}, r"expected bias \(5,\), got \(1,\)"),
        ({"x": torch.zeros(2, 5).double()}, r"fp32, fp16 or bf16, got \(2, 5\) torch.float64"),
        ({"x": torch.zeros(1, 2, 5)}, r"expected \(T, F\) in .*, got \(1, 2, 5\)"),
        ({"x": torch.zeros(5, 2).T}, r"unit stride along F, got \(1, 2\): call .contiguous"),
        ({"bias": torch.zeros(5).half()}, "bias in fp32 or torch.float32, got torch.float16"),
        ({"bias": torch.zeros(5, device="meta")}, "expected bias on .*, got meta"),
    ],
    ids=["kind", "width", "fp64", "axes", "strided", "dtype", "device"],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"x": torch.zeros(2, 5), "bias": torch.zeros(5), "kind": "gelu_erf"} | change
    with pytest.raises(ValueError, match=message):
        bias_gelu(**given)


def test_a_device_without_kernels_is_named(monkeypatch):
    """Rather than a wild read: a CPU tensor where nothing interprets."""
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="expected x on a GPU, got cpu"):
        bias_gelu(torch.zeros(2, 5), None, "gelu_erf")
