"""kernels/column_sums.py: sums over programs against fp64, whatever the shape."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import empty_is_poisoned, guarded, poisoned
from launches import compilations, launches_are_declared, recorded

from minift.kernels import column_sums as module
from minift.kernels.column_sums import OPTIONS, PROGRAMS, TILE, column_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
R, C = TILE["BLOCK_R"], TILE["BLOCK_C"]
# One, primes, a tile and its neighbours, as many programs as there may be.
SHAPES = [(1, 1, 1), (2, 3, 5), (1, R - 1, C - 1), (1, R, C), (2, R + 1, C + 1), (1, 2 * R, 2 * C)]
SHAPES += [(3, 7, 97), (1, PROGRAMS, 131), (2, PROGRAMS + 7, 3)]


def make(K, programs, columns, offset=0):
    """Partial sums of every size, the first `offset` past 16 bytes; NaN around them."""
    g = torch.Generator().manual_seed(programs * columns + K)
    x = torch.randn(K, programs, columns, generator=g) * torch.rand(columns, generator=g).exp2()
    return guarded(x.to(DEVICE), offset).tensor


def check(partials, dtype):
    with empty_is_poisoned():
        actual = column_sums(partials, dtype)
    assert actual.dtype == dtype
    same_dtype, exact = partials.sum(1).to(dtype), partials.double().sum(1)
    scale = partials.abs().sum(1).max().item() if partials.numel() else 1.0
    assert_as_accurate(actual, same_dtype, exact, scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape):
    """As accurate as torch's sum; what lies around is neither read nor written."""
    check(make(*shape), torch.float32)


@given(st.integers(0, 3), st.integers(0, 300), st.integers(0, 70), st.integers(0, 3),
       st.sampled_from(DTYPES))  # fmt: skip
@settings(max_examples=25)
def test_any_shape_alignment_and_dtype(K, programs, columns, offset, dtype):
    check(make(K, programs, columns, offset), dtype)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_no_elements(shape):
    """The sums of no programs are 0, and written."""
    with empty_is_poisoned():
        sums = column_sums(torch.zeros(shape, device=DEVICE))
    assert sums.tolist() == [[0.0] * shape[2]] * shape[0]


@dtypes
def test_results_are_rounded_once(dtype):
    """From the sum in fp32: 264 ones added in bf16 would stop at 256."""
    partials = make(2, PROGRAMS, 40)
    assert torch.equal(column_sums(partials, dtype), column_sums(partials).to(dtype))
    assert (column_sums(torch.ones_like(partials), dtype) == PROGRAMS).all()


@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("columns", [1, C - 1, C, 2 * C + 1])
def test_writes_its_results_and_nothing_else(columns, offset, dtype):
    partials = make(3, 5, columns, offset)
    sums = poisoned(3, columns, dtype=dtype, offset=offset)
    grid = (-(-columns // C), 3)
    module._column_sums_kernel[grid](partials, sums.tensor, 5, columns, **TILE, **OPTIONS)
    sums.assert_untouched()
    sums.assert_written()
    assert torch.equal(sums.tensor, column_sums(partials, dtype))


def test_a_column_alone_equals_itself_among_others():
    """To the bit, in every run: nothing but its own numbers and their order goes into it."""
    partials = make(3, PROGRAMS, 50)
    sums = column_sums(partials)
    assert torch.equal(column_sums(partials), sums)
    for k, c in ((0, 0), (1, 31), (2, 49)):
        alone = column_sums(partials[k : k + 1, :, c : c + 1].contiguous())
        assert alone.item() == sums[k, c].item()


def test_programs_that_had_no_rows_change_nothing():
    """To the bit: zeros after the others, as a batch of fewer rows leaves them."""
    partials = make(1, 60, 5)
    padded = torch.cat((partials, partials.new_zeros(1, 40, 5)), 1)
    assert torch.equal(column_sums(padded), column_sums(partials))


def test_the_input_is_only_read():
    partials = make(2, 9, 11)
    before, version = partials.clone(), partials._version
    column_sums(partials)
    assert torch.equal(partials, before)
    assert partials._version == version


def test_one_launch_and_one_binary_for_all_sizes():
    """Neither the rows of a batch nor the width of a layer compiles anything."""
    with recorded(run=False) as seen:
        for shape in [(1, 1, 1), (1, 16, 3072), (2, 264, 768), (3, 7, 97)]:
            column_sums(torch.zeros(shape, device=DEVICE))
    assert len(seen) == 4
    assert compilations(seen) == 1


def test_declared_launches_are_those_that_run():
    """What is compiled without a GPU is what a GPU runs."""
    with recorded(run=False) as seen:
        for dtype in (torch.float32, torch.bfloat16):
            column_sums(torch.zeros(1, 60, 768, device=DEVICE), dtype)
    assert launches_are_declared(seen, module) == {launch.name for launch in module.LAUNCHES}
