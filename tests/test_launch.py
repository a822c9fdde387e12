"""kernels/launch.py and the recorder: both speak of a launch in the same words."""

import torch
import triton
import triton.language as tl
from accuracy import DEVICE
from launches import compilations, recorded

from minift.kernels.launch import Launch


@triton.jit(do_not_specialize=["n"])
def copy_kernel(x_ptr, y_ptr, scale, n, stride, bias_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride, mask=i < n) * scale, mask=i < n)


def launch(x, y, n, stride, block=16):
    grid = lambda meta: (triton.cdiv(n, meta["BLOCK"]),)  # noqa: E731
    copy_kernel[grid](x, y, 2.0, n, stride, None, BLOCK=block, num_warps=4, enable_fp_fusion=True)


def test_a_launch_is_described_as_the_compiler_sees_it():
    """Alignment, integers that are 1, None and constexprs; the count of rows is not specialised."""
    x, y = torch.arange(40.0, device=DEVICE), torch.zeros(40, device=DEVICE)
    with recorded() as seen:
        launch(x, y, 20, 1)
        launch(x[1:], y, 16, 2)
    assert seen[0].types == "*fp32:16 *fp32:16 fp32 i32"
    assert dict(seen[0].constexprs) == {"stride": 1, "bias_ptr": None, "BLOCK": 16}
    assert dict(seen[0].options) == {"num_warps": 4, "enable_fp_fusion": True}
    assert seen[0].grid == (2,)
    assert seen[1].types == "*fp32 *fp32:16 fp32 i32 i32"
    assert torch.equal(y[:16], x[1::2][:16] * 2)


def test_compilations_are_counted_not_launches():
    """Another row count is no compilation, another block is."""
    x, y = torch.zeros(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    with recorded(run=False) as seen:
        for n in (5, 16, 17, 32):
            launch(x, y, n, 1)
        assert (len(seen), compilations(seen)) == (4, 1)
        launch(x, y, 5, 1, block=32)
    assert compilations(seen) == 2


def test_name_of_a_launch():
    declared = Launch("fp32", copy_kernel, "*fp32:16 *fp32:16 fp32 i32 i32", {"BLOCK": 16})
    assert declared.name == "test_launch.copy_kernel fp32"
