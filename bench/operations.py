"""What is timed of each operation: shapes, passes, contenders, and the bytes that must move.

An operation is one function below, which returns its cases (attention and AdamW have files of
their own); `bench.cases` lists the shapes.
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
from minift.kernels.dropout import dropout_keep
from minift.kernels.embed import embed_ref
from minift.kernels.embed_order import EmbedOrder
from minift.kernels.linear_cross_entropy import WORKSPACE_MIB
from minift.ops import TORCH, Draw, Norm

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
Targets = dict[str, dict[str, float]]  # pass -> part of a GPU's name -> milliseconds


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
    memory: bool = False  # what a contender takes beside inputs and results is reported
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
    target_ms: Targets | None = None, ways: dict[str, Way] | None = None, **facts,
) -> list[Case]:  # fmt: skip
    """A case for each pass that `bytes` names, with torch.compile of the definition.

    Args:
        op, shape, make: as in Case.
        functions: by contender, of the leaves; "definition" first.
        bytes, flops, target_ms: by pass.
        ways: contenders that do not go through autograd.
        facts: the other fields of Case.
    """
    functions = functions | {"torch.compile": compiled(functions["definition"])}
    cases = []
    for kind, moved in bytes.items():
        every = {name: PASSES[kind](fn) for name, fn in functions.items()} | (ways or {})
        every["ours"] = every.pop("ours")  # last in every table
        numbers = moved, (flops or {}).get(kind, 0), (target_ms or {}).get(kind, {})
        cases.append(Case(op, shape, kind, make, every, *numbers, **facts))
    return cases


# --------------------------------------------------------------- operations


def cross_entropy(
    N: int, V: int, stride: int, device: torch.device, target_ms: Targets | None = None
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
                        ways=in_place, target_ms=target_ms),
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


def linear_cross_entropy(
    N: int, C: int, V: int, device: torch.device, target_ms: Targets | None = None,
    workspace_mib: float = WORKSPACE_MIB,
) -> list[Case]:  # fmt: skip
    """The mean loss of a projection to V classes, with the gradients of rows and weights."""
    g = generator(device)
    target = torch.randint(V, (N,), generator=g, device=device)
    scale = torch.full((), 1 / N, device=device)

    def make() -> Inputs:
        leaves = normal(g, (N, C)), normal(g, (V, C), scale=2 / C**0.5)
        return Inputs(leaves, (torch.ones((), device=device),))

    def native(x, w):
        if not hasattr(F, "linear_cross_entropy"):
            raise Absent(f"torch {torch.__version__} has none")
        options = torch.nn.LinearCrossEntropyOptions()  # without them it is the same as "torch"
        return F.linear_cross_entropy(x, w, target, options=options)

    functions = {
        # of every row: of a list, torch.compile would have to know how many count
        "definition": lambda x, w: cross_entropy_ref(x @ w.T, target).mean(),
        "torch": lambda x, w: F.cross_entropy(F.linear(x, w), target),
        "torch chunked": native,
        "liger": only_on(device, lambda x, w: liger_linear(x, w, target)),
        "ours": lambda x, w: kernel("linear_cross_entropy")(
            x, w, target, row_scale=scale, workspace_mib=workspace_mib
        ),
    }
    limit = "" if workspace_mib == WORKSPACE_MIB else f", {workspace_mib:g} MiB"
    op, shape, kind = "linear_cross_entropy", f"{N} x {C} x {V} bf16{limit}", "forward+gradient"
    return differentiable(
        op, shape, make, functions, {kind: 2 * 2 * (N + V) * C}, flops={kind: 6 * N * C * V},
        target_ms=target_ms, memory=True,
    )  # fmt: skip


def liger_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's mean loss of a projection."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction,
        )
    except ImportError as error:
        raise Absent(f"liger_kernel is not installed: {error}") from None
    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


def add_norm(
    T: int, C: int, device: torch.device, p: float = 0.0, target_ms: Targets | None = None
) -> list[Case]:
    """As a pre-norm model has it: a sum and its norm, each with a gradient of its own. Dropout of
    `p` has the same bits for all."""
    step = torch.zeros((), dtype=torch.int64, device=device)
    key = torch.arange(T, device=device)
    dropout = TORCH.draw_dropout(Draw(step, step), key, C, 1, 4).at(0, p)
    keep = dropout and dropout_keep(dropout, C)[:, 0]

    def make() -> Inputs:
        g = generator(device)
        weight, norm_bias, bias = (normal(g, (C,)).float() for _ in range(3))
        leaves = normal(g, (T, C)), normal(g, (T, C)), weight + 1, norm_bias, bias
        return Inputs(leaves, (normal(g, (T, C)), normal(g, (T, C))))

    def of(fn: Callable, *drops) -> Callable:
        return lambda x, r, w, nb, b: fn(x, r, Norm(w, nb, 1e-12), b, *drops)

    def definition(x, r, *columns):
        return of(add_norm_ref, keep, p)(x, r, *(c.to(x.dtype) for c in columns))

    functions = {
        "definition": definition,
        "torch": of(TORCH.add_norm, dropout),
        "ours": of(kernel("add_norm"), dropout),
    }
    row = 2 * T * C  # nothing dropped: x and the residual have one gradient
    moved = {"forward": 4 * row, "backward": (5 if p else 4) * row}
    shape = f"{T} x {C} bf16, parameters fp32" + (f", dropout {p}" if p else "")
    return differentiable(
        "add_norm", shape, make, functions, moved, dtype=BF16, target_ms=target_ms
    )


def bias_gelu(
    T: int, width: int, device: torch.device, target_ms: Targets | None = None
) -> list[Case]:
    """With the bias in fp32, as models hold it. Liger has no such operation:
    its GELU is a gate, of the other kind and without a bias."""

    def make() -> Inputs:
        g = generator(device)
        return Inputs(
            (normal(g, (T, width)), normal(g, (width,)).float()), (normal(g, (T, width)),)
        )

    functions = {
        "definition": lambda x, b: bias_gelu_ref(x, b.to(x.dtype), "gelu_erf"),
        "torch": lambda x, b: TORCH.bias_gelu(x, b, "gelu_erf"),
        "ours": lambda x, b: kernel("bias_gelu")(x, b, "gelu_erf"),
    }
    shape, x = f"{T} x {width} bf16, bias fp32", 2 * T * width
    moved = {"forward": 2 * x, "backward": 3 * x}
    return differentiable(
        "bias_gelu", shape, make, functions, moved, dtype=BF16, target_ms=target_ms
    )


def ids_like_text(T: int, rows: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) words, positions and types of sequences of 4 to 256 tokens: word i as often as 1 / i,
    but the first of a sequence is always the same one, and so is the last; of a quarter of them
    the second half is a second text."""
    g, words, positions, types = torch.Generator().manual_seed(0), *(torch.zeros(3, T).long())
    often = 1 / torch.arange(1, rows[0] - 1)
    begin = 0
    while begin < T:
        n = min(int(torch.randint(4, min(257, rows[1] + 1), (), generator=g)), T - begin)
        part = slice(begin, begin + n)
        words[part] = 2 + torch.multinomial(often, n, replacement=True, generator=g)
        words[begin], words[begin + n - 1] = 0, 1
        positions[part] = torch.arange(n)
        types[begin + n // 2 : begin + n] = int(torch.rand((), generator=g) < 0.25)
        begin += n
    return words, positions, types


def embed(T: int, C: int, rows: tuple[int, int, int], device: torch.device) -> list[Case]:
    """By ids as text has them. At the least a row that occurs is read once; the gradient of a table
    is written whole."""
    ids = ids_like_text(T, rows)
    order = EmbedOrder.sort(ids).to(device)
    touched = sum(len(i.unique()) for i in ids)
    ids = tuple(i.to(device) for i in ids)

    def make() -> Inputs:
        g = generator(device)
        tables = tuple(normal(g, (n, C), FP32, 0.02) for n in rows)
        weight = normal(g, (C,), FP32, 0.1) + 1
        return Inputs((*tables, weight, normal(g, (C,), FP32)), (normal(g, (T, C)),))

    def of(fn: Callable, **options) -> Callable:
        def call(*leaves):
            *tables, weight, bias = leaves
            dtype = BF16 if weight.dtype == FP32 else weight.dtype
            return fn(ids, tuple(tables), Norm(weight, bias, 1e-12), dtype, **options)

        return call

    functions = {
        "definition": of(embed_ref),
        "torch": of(TORCH.embed),
        "ours": of(kernel("embed"), order=order),
    }
    once = 4 * touched * C + 2 * T * C
    moved = {"forward": once, "backward": once + 4 * sum(rows) * C}
    return differentiable("embed", f"{T} x {C}, tables {rows} fp32", make, functions, moved)
