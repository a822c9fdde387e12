"""What a kernel file declares of its launches, so that they are compiled and judged without a GPU.

Every file with kernels ends in a tuple LAUNCHES: the launches that matter, each as its real call
specialises it. A kernel is a jitted function whose name ends in `_kernel`; other jitted functions
are called by kernels. Arguments are words, in the order of the signature without its constexprs:

    *bf16:16    a pointer to bf16 at a multiple of 16 bytes
    *i64        a pointer of which nothing is promised
    i32:16      an integer that is a multiple of 16
    i32 fp32    an integer, a float

An argument that is None, or an integer that is 1, is a constexpr to the compiler: it stands there.

Options are those of NVIDIA's compiler. AMD's has no such register limit and no such precision of
products, and a launch that asks for them fails: they are left out there.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton

# maxnreg: registers a thread may have; default_dot_input_precision: "tf32x3", fp32 products as
# three of tf32, which AMD's GPUs compute in fp32.
NVIDIA_ONLY = ("maxnreg", "default_dot_input_precision")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the compiler sees it."""

    label: str  # of the case, such as "bf16": with the kernel's name it is unique
    kernel: Any  # the jitted function
    types: str  # of its run-time arguments, as above
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, ...
    streams: bool = True  # it moves whole tensors: its loads and stores must be 128 bits wide
    fp64: bool = False  # it computes in fp64 on purpose
    before_hopper: dict[str, Any] = field(default_factory=dict)  # options that are others there

    @property
    def name(self) -> str:
        """ "cross_entropy.loss_kernel bf16", say."""
        function = self.kernel.fn
        return f"{function.__module__.rpartition('.')[2]}.{function.__name__} {self.label}"


def without_nvidia(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch, without those that only NVIDIA's compiler takes."""
    return {name: value for name, value in options.items() if name not in NVIDIA_ONLY}


def can_launch(device: torch.device) -> bool:
    """Whether kernels run on tensors there: on a GPU, and in triton's interpreter on a CPU."""
    return device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret)
