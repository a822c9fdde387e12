"""kernels/launch.py and the recorder: both speak of a launch in the same words."""

from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE
from launches import compilations, launches_are_declared, recorded, specialise
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature

from minift.kernels.launch import NVIDIA_ONLY, Launch, without_nvidia


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


def probe_kernel(a, b, c, d: tl.constexpr):
    pass


ALIGNED = torch.zeros(64)
VALUES = {
    "aligned": ALIGNED,
    "odd": ALIGNED[1:],
    "bf16": ALIGNED.bfloat16(),
    "bool": ALIGNED.bool(),
    "indices": ALIGNED.long(),
    **{str(n): n for n in (0, 1, 2, 16, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1)},
    **{str(value): value for value in (True, False, 1.5, None)},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("backend", ["nvidia", "amd"])
def test_the_recorder_specialises_as_tritons_launcher_does(backend, value):
    """Against the function that triton generates to find its own cache key: an argument as it
    comes, one that is not specialised, one whose alignment is not, and a constexpr."""
    kernel = JITFunction(
        probe_kernel, do_not_specialize=["b"], do_not_specialize_on_alignment=["c"]
    )
    target = GPUTarget("cuda", 90, 32) if backend == "nvidia" else GPUTarget("hip", "gfx942", 64)
    launcher = create_function_from_signature(
        kernel.signature, kernel.params, backends[backend].compiler(target)
    )
    arguments, found, _ = launcher(value, value, value, value)
    types, constexprs = specialise(kernel, list("abcd"), arguments)
    assert constexprs == {
        name: value for name, (kind, _) in zip("abcd", found, strict=True) if kind == "constexpr"
    }
    words = [
        kind.replace("u1", "i1") + ":16" * ("D" in (said or ""))
        for kind, said in found
        if kind != "constexpr"
    ]
    assert types == " ".join(words)


def test_kernels_of_one_name_in_two_files_are_two():
    """Otherwise a binary would be missed in the count."""
    x, y = torch.zeros(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    with recorded(run=False) as seen:
        launch(x, y, 5, 1)
        copy_kernel.fn.__module__, module = "another", copy_kernel.fn.__module__
        launch(x, y, 5, 1)
        copy_kernel.fn.__module__ = module
    assert compilations(seen) == 2


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
CONSTEXPRS = {"BLOCK": 16, "stride": 1, "bias_ptr": None}


def declaring(types="*fp32:16 *fp32:16 fp32 i32", constexprs=CONSTEXPRS, options=OPTIONS):
    """A kernel file that declares one launch."""
    module = ModuleType(copy_kernel.fn.__module__)
    module.LAUNCHES = (Launch("fp32", copy_kernel, types, constexprs, options),)
    return module


def test_what_was_launched_is_declared():
    x, y = torch.zeros(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    with recorded(run=False) as seen:
        launch(x, y, 5, 1)
    names = launches_are_declared(seen, declaring())
    assert names == {"test_launch.copy_kernel fp32"}


@pytest.mark.parametrize(
    "other",
    [
        {"types": "*fp32:16 *fp32 fp32 i32"},
        {"types": "*fp32:16 *fp32:16 fp32 i32:16"},
        {"constexprs": CONSTEXPRS | {"BLOCK": 32}},
        {"constexprs": {"BLOCK": 16, "bias_ptr": None}},
        {"options": {"num_warps": 4}},
        {"options": OPTIONS | {"num_stages": 2}},
    ],
    ids=str,
)
def test_what_differs_from_its_declaration_is_named(other):
    """Alignment, a constexpr or an option: other code would be compiled than runs."""
    x, y = torch.zeros(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    with recorded(run=False) as seen:
        launch(x, y, 5, 1)
    with pytest.raises(AssertionError, match=r"copy_kernel.* is not declared; there are:\n  \("):
        launches_are_declared(seen, declaring(**other))


def test_a_module_that_launched_nothing_proves_nothing():
    with pytest.raises(AssertionError, match="nothing of test_launch was launched"):
        launches_are_declared([], declaring())


# What each of these options is set to somewhere.
NVIDIA_OPTIONS = {"maxnreg": 128, "default_dot_input_precision": "tf32x3"}


def options_of(backend: str, arch: str | int) -> object:
    """What a compiler makes of these options."""
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    name = {"cuda": "nvidia", "hip": "amd"}[backend]
    return backends[name].compiler(target).parse_options(OPTIONS | NVIDIA_OPTIONS)


def test_what_is_called_nvidias_is_refused_by_amd():
    """Each is known to one compiler, as an option and with its value, and not to the other."""
    assert set(NVIDIA_ONLY) == set(NVIDIA_OPTIONS)
    nvidia, amd = options_of("cuda", 90), options_of("hip", "gfx942")
    assert {name: getattr(nvidia, name) for name in NVIDIA_ONLY} == NVIDIA_OPTIONS
    assert "tf32x3" in nvidia.allowed_dot_input_precisions
    assert not hasattr(amd, "maxnreg")
    assert "tf32x3" not in amd.allowed_dot_input_precisions


def test_options_without_nvidias():
    """The others stay, in a dict of their own."""
    options = {"num_warps": 4, **NVIDIA_OPTIONS, "enable_fp_fusion": True}
    assert without_nvidia(options) == {"num_warps": 4, "enable_fp_fusion": True}
    assert set(NVIDIA_ONLY) < set(options)


def test_the_interpreter_takes_them():
    """It drops what is not a parameter of the kernel."""
    x, y = torch.arange(16.0, device=DEVICE), torch.zeros(16, device=DEVICE)
    copy_kernel[(1,)](x, y, 2.0, 16, 1, None, BLOCK=16, enable_fp_fusion=True, **NVIDIA_OPTIONS)
    assert torch.equal(y, 2 * x)
