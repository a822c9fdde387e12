"""What is timed of each operation: shapes, passes, contenders, and the bytes that must move.

An operation is one function below, which returns its cases (attention and AdamW have files of
their own); `bench.kernels` lists the shapes.
Inputs are random and made once a case; contenders share copies of them, and one that writes to its
inputs makes copies of its own.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import ROOT, Run
from minift.kernels.add_norm import add_norm_ref
from minift.kernels.bias_gelu import bias_gelu_ref
from minift.kernels.cross_entropy import IGNORE_INDEX, cross_entropy_ref
from minift.kernels.embed import embed_ref
from minift.ops import TORCH, Norm

BF16, FP32 = torch.bfloat16, torch.float32


class Absent(Exception):
    """A contender that cannot take part, and why."""


@dataclass(frozen=True)
class Inputs:
    """What a run works on."""

    leaves: tuple[Tensor, ...]  # differentiated; of an optimizer: the parameters
    upstream: tuple[Tensor, ...]  # gradients of the results; of an optimizer: of the parameters

    def copy(self) -> "Inputs":
        """With strides as they are, which `clone` would not keep of padded rows."""
        return Inputs(*(tuple(copied(x) for x in part) for part in (self.leaves, self.upstream)))

    def double(self) -> "Inputs":
        return Inputs(*(tuple(x.double() for x in part) for part in (self.leaves, self.upstream)))


Way = Callable[[Inputs], Run]  # the run's call returns a tuple of results


@dataclass(frozen=True)
class Ratio:
    """What ours may take at most, of the time of another contender in the same run."""

    contender: str
    most: float
    shape: str = ""  # of the case in which it was timed; default: of this one


@dataclass(frozen=True)
class Case:
    """One operation at one shape, one pass of it."""

    op: str
    shape: str
    kind: str  # "forward", "backward", "forward+gradient", "step"
    inputs: Callable[[], Inputs]
    ways: dict[str, Way]  # by contender; "definition" is one of them, "ours" another
    bytes: int  # that must be read or written at least
    flops: int = 0
    target_ms: dict[str, float] = field(default_factory=dict)  # by part of a GPU's name
    copies: int = 2
    calls: int = 1  # of a run, before its results are judged
    dtype: torch.dtype | None = None  # all results are judged as if in it; default: in their own
    ratios: tuple[Ratio, ...] = ()
    unjudged: dict[str, str] = field(default_factory=dict)  # contender -> why not by its values
    untimed: dict[str, str] = field(default_factory=dict)  # contender -> why only judged


def copied(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def normal(g: torch.Generator, shape, dtype=BF16, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=g.device).normal_(0, scale, generator=g)


# ------------------------------------------------------------------- passes


def as_tuple(results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def forward(fn: Callable) -> Way:
    def way(inputs: Inputs) -> Run:
        @torch.no_grad()
        def call():
            return as_tuple(fn(*inputs.leaves))

        return Run(call)

    return way


def backward(fn: Callable) -> Way:
    def way(inputs: Inputs) -> Run:
        leaves = [x.detach().requires_grad_() for x in inputs.leaves]
        results = as_tuple(fn(*leaves))
        upstream = cast(inputs.upstream, results)
        return Run(lambda: torch.autograd.grad(results, leaves, upstream, retain_graph=True))

    return way


def forward_and_gradient(fn: Callable) -> Way:
    def way(inputs: Inputs) -> Run:
        leaves = [x.detach().requires_grad_() for x in inputs.leaves]

        def call():
            results = as_tuple(fn(*leaves))
            grads = torch.autograd.grad(results, leaves, cast(inputs.upstream, results))
            return (*(y.detach() for y in results), *grads)

        return Run(call)

    return way


PASSES = {"forward": forward, "backward": backward, "forward+gradient": forward_and_gradient}


def cast(upstream, results) -> list[Tensor]:
    return [g.to(y.dtype) for g, y in zip(upstream, results, strict=True)]


def kernel(file: str, name: str | None = None) -> Callable:
    """Ours: a function of minift.kernels, looked up when it is first called. Its first argument
    is a tensor or a tuple of them; on a CPU it needs triton's interpreter."""

    @functools.cache
    def find():
        try:
            return getattr(importlib.import_module(f"minift.kernels.{file}"), name or file)
        except AttributeError:
            raise Absent(f"minift.kernels.{file} has no {name or file}") from None

    def call(*args, **kwargs):
        found = find()
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if not first.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise Absent("needs a GPU")
        return found(*args, **kwargs)

    return call


def mend_interpreter() -> None:
    """Triton's interpreter adds and multiplies the bits of bf16; the tests know what helps."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("interpreter_bf16").install()


def compiled(fn: Callable) -> Callable:
    """torch.compile of a function, for exactly these shapes."""

    @functools.cache
    def make():
        import torch._functorch.config as config

        config.donated_buffer = False  # backward runs many times over what one forward saved
        return torch.compile(fn, fullgraph=True, dynamic=False)

    return lambda *args: make()(*args)


def only_on(device: torch.device, fn: Callable) -> Callable:
    """A function that needs a GPU."""

    def call(*args):
        if device.type != "cuda":
            raise Absent("needs a GPU")
        return fn(*args)

    return call


def differentiable(
    op: str, shape: str, make: Callable[[], Inputs], functions: dict[str, Callable],
    bytes: dict[str, int], *, flops: dict[str, int] | None = None,
    ways: dict[str, Way] | None = None, **facts,
) -> list[Case]:  # fmt: skip
    """A case for each pass that `bytes` names, with torch.compile of the definition.

    Args:
        op, shape, make: as in Case.
        functions: by contender, of the leaves; "definition" first.
        bytes, flops: by pass.
        ways: contenders that do not go through autograd.
        facts: the other fields of Case.
    """
    functions = functions | {"torch.compile": compiled(functions["definition"])}
    cases = []
    for kind, moved in bytes.items():
        every = {name: PASSES[kind](fn) for name, fn in functions.items()} | (ways or {})
        every["ours"] = every.pop("ours")  # last in every table
        cases.append(Case(op, shape, kind, make, every, moved, (flops or {}).get(kind, 0), **facts))
    return cases


# --------------------------------------------------------------- operations


def cross_entropy(
    N: int, V: int, stride: int, device: torch.device, target_ms: dict[str, float] | None = None
) -> list[Case]:
    """Forward and backward row by row; and the mean loss with its gradient, in place if need be."""
    g = generator(device)
    target = torch.randint(V, (N,), generator=g, device=device)
    shape = f"{N} x {V} bf16" + (f", stride {stride}" if stride != V else "")

    def make(upstream: Tensor) -> Inputs:
        logits = torch.empty(N, stride, dtype=BF16, device=device)[:, :V]
        return Inputs((logits.normal_(0, 4, generator=g),), (upstream,))

    def ours_in_place(inputs: Inputs) -> Run:
        logits, scale = copied(inputs.leaves[0]), torch.full((N,), 1 / N, device=device)
        in_place = kernel("cross_entropy", "cross_entropy_")
        return Run(
            lambda: (in_place(logits, target, row_scale=scale).mean(), logits),
            reset=lambda: logits.copy_(inputs.leaves[0]),
        )

    functions = {
        "definition": lambda x: cross_entropy_ref(x, target),
        "torch": lambda x: TORCH.cross_entropy(x, target),
        "torch bf16": lambda x: F.cross_entropy(x, target, reduction="none"),
        "liger": only_on(device, lambda x: liger(x, target, "none")),
        "ours": lambda x: kernel("cross_entropy")(x, target),
    }
    forward_only = {"liger": forward(functions.pop("liger"))}
    means = {
        "definition": lambda x: cross_entropy_ref(x, target).mean(),
        "torch": lambda x: TORCH.cross_entropy(x, target).mean(),
        "torch bf16": lambda x: F.cross_entropy(x, target),
    }
    logits = 2 * N * V
    by_row = functools.partial(make, torch.linspace(-1, 2, N, device=device))
    whole = functools.partial(make, torch.ones((), device=device))
    in_place = {"liger": only_on(device, liger_in_place(target)), "ours": ours_in_place}
    op = "cross_entropy"
    return [
        *differentiable(op, shape, by_row, functions, {"forward": logits}, ways=forward_only),
        *differentiable(op, shape, by_row, functions, {"backward": 2 * logits}),
        *differentiable(op, shape, whole, means, {"forward+gradient": 2 * logits},
                        ways=in_place, target_ms=target_ms or {}),
    ]  # fmt: skip


def liger(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Liger's loss. Its forward writes the gradient over logits that require one."""
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    except ImportError as error:
        raise Absent(f"liger_kernel is not installed: {error}") from None
    arguments = (logits, target, None, IGNORE_INDEX, 0.0, 0.0, reduction)
    return LigerCrossEntropyFunction.apply(*arguments)[0]


def liger_in_place(target: Tensor) -> Way:
    def way(inputs: Inputs) -> Run:
        logits = copied(inputs.leaves[0])

        def call():
            leaf = logits.detach().requires_grad_()
            loss = liger(leaf, target, "mean")
            return loss.detach(), *torch.autograd.grad(loss, leaf)

        return Run(call, reset=lambda: logits.copy_(inputs.leaves[0]))

    return way


def add_norm(T: int, C: int, device: torch.device) -> list[Case]:
    def make() -> Inputs:
        g = generator(device)
        weight, norm_bias, bias = (normal(g, (C,)).float() for _ in range(3))
        leaves = normal(g, (T, C)), normal(g, (T, C)), weight + 1, norm_bias, bias
        return Inputs(leaves, (normal(g, (T, C)), normal(g, (T, C))))

    def of(fn: Callable) -> Callable:
        return lambda x, r, w, nb, b: fn(x, r, Norm(w, nb, 1e-12), b)

    def definition(x, r, *columns):
        return of(add_norm_ref)(x, r, *(c.to(x.dtype) for c in columns))

    functions = {
        "definition": definition,
        "torch": of(TORCH.add_norm),
        "ours": of(kernel("add_norm")),
    }
    row = 2 * T * C
    moved = {"forward": 4 * row, "backward": 5 * row}
    shape = f"{T} x {C} bf16, parameters fp32"
    return differentiable("add_norm", shape, make, functions, moved, dtype=BF16)


def bias_gelu(T: int, width: int, device: torch.device) -> list[Case]:
    def make() -> Inputs:
        g = generator(device)
        return Inputs((normal(g, (T, width)), normal(g, (width,))), (normal(g, (T, width)),))

    functions = {
        "definition": lambda x, b: bias_gelu_ref(x, b, "gelu_erf"),
        "torch": lambda x, b: TORCH.bias_gelu(x, b, "gelu_erf"),
        "ours": lambda x, b: kernel("bias_gelu")(x, b, "gelu_erf"),
    }
    moved = {"forward": 2 * 2 * T * width, "backward": 3 * 2 * T * width}
    return differentiable("bias_gelu", f"{T} x {width} bf16", make, functions, moved)


def embed(T: int, C: int, rows: tuple[int, ...], device: torch.device) -> list[Case]:
    g = generator(device)
    ids = tuple(torch.randint(n, (T,), generator=g, device=device) for n in rows)

    def make() -> Inputs:
        g = generator(device)
        tables = tuple(normal(g, (n, C), FP32, 0.02) for n in rows)
        weight = normal(g, (C,), FP32, 0.1) + 1
        return Inputs((*tables, weight, normal(g, (C,), FP32)), (normal(g, (T, C)),))

    def of(fn: Callable) -> Callable:
        def call(*leaves):
            *tables, weight, bias = leaves
            dtype = BF16 if weight.dtype == FP32 else weight.dtype
            return fn(ids, tuple(tables), Norm(weight, bias, 1e-12), dtype)

        return call

    functions = {
        "definition": of(embed_ref),
        "torch": of(TORCH.embed),
        "ours": of(kernel("embed")),
    }
    read = 4 * T * C * len(rows)
    moved = {"forward": read + 2 * T * C, "backward": read + 2 * T * C + 4 * sum(rows) * C}
    return differentiable("embed", f"{T} x {C}, tables {rows} fp32", make, functions, moved)
