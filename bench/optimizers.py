"""What is timed of AdamW: a step with clipping over all tensors of a model, in fp32, and in bf16
over fp32 masters. The learning rate is large so that bf16 shows a step, gradients have a norm of 2
and are clipped to 1, and eps is as large as a gradient: then the result tells whether there was
clipping, to which AdamW is otherwise blind."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import Run
from bench.operations import BF16, FP32, Absent, Case, Inputs, copied, generator, kernel, normal
from minift.kernels.adamw import adamw_ref

MAX_NORM = 1.0


def bert(layers: int, C: int, V: int, positions: int = 512, labels: int = 2) -> list[tuple]:
    """Shapes of BERT's parameters, with the pooler and a head for `labels`."""
    norm = [(C,), (C,)]
    square, up, down = [(C, C), (C,)], [(4 * C, C), (4 * C,)], [(C, 4 * C), (C,)]
    layer = [*square * 4, *norm, *up, *down, *norm]
    embeddings = [(V, C), (positions, C), (2, C), *norm]
    return [*embeddings, *layer * layers, *square, (labels, C), (labels,)]


def gpt2(layers: int, C: int, V: int, positions: int = 1024) -> list[tuple]:
    """Shapes of GPT-2's parameters; its head is the token table."""
    norm = [(C,), (C,)]
    attention = [(C, 3 * C), (3 * C,), (C, C), (C,)]
    mlp = [(C, 4 * C), (4 * C,), (4 * C, C), (C,)]
    return [(V, C), (positions, C), *[*norm, *attention, *norm, *mlp] * layers, *norm]


MODELS = {
    "MiniLM": bert(6, 384, 30522),
    "GPT-2 124M": gpt2(12, 768, 50257),
    "BERT-large": bert(24, 1024, 30522),
    "a tiny BERT": bert(2, 32, 100),
}


def adamw(
    model: str, dtype: torch.dtype, device: torch.device, target_ms: dict | None = None
) -> Case:
    """A step over the parameters of a model."""
    shapes = MODELS[model]
    n = sum(map(math.prod, shapes))

    def make() -> Inputs:
        g = generator(device)
        parameters = tuple(normal(g, shape, dtype, 0.02) for shape in shapes)
        scale = 2 / math.sqrt(n)
        return Inputs(parameters, tuple(normal(g, shape, dtype, scale) for shape in shapes))

    ways = {
        "definition": by_definition,
        "torch fused": by_torch(fused=True),
        "torch foreach": by_torch(foreach=True),
        "torch.compile": by_compiled,
        "ours": ours,
    }
    name = "fp32" if dtype == FP32 else "bf16 over fp32"
    shape = f"{model}, {n / 1e6:.3g}M in {len(shapes)} tensors, {name}"
    # 28 bytes a parameter, and the gradients once more for their norm, before any can be used.
    moved = (28 + (4 if dtype == FP32 else 2)) * n
    return Case("adamw", shape, "step", make, ways, moved, target_ms=target_ms or {}, calls=2)


def options(inputs: Inputs) -> dict:
    """Of the optimizer, for these parameters."""
    eps = 1 / math.sqrt(sum(p.numel() for p in inputs.leaves))
    return {"lr": 1e-2, "betas": (0.9, 0.999), "eps": eps, "weight_decay": 0.1}


def by_definition(inputs: Inputs) -> Run:
    """`adamw_ref` of each tensor, in fp32 or wider."""
    parameters, grads = (tuple(map(copied, part)) for part in (inputs.leaves, inputs.upstream))
    masters = [wide(p) for p in parameters]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in masters]
    steps = 0

    def call():
        nonlocal steps
        steps += 1
        total = sum(wide(g).square().sum() for g in grads).sqrt()
        factor = (MAX_NORM / (total + 1e-6)).clamp(max=1.0)
        for p, w, g, (m, v) in zip(parameters, masters, grads, moments, strict=True):
            new = adamw_ref(w, wide(g) * factor, m, v, steps, **options(inputs))
            for old, value in zip((w, m, v), new, strict=True):
                old.copy_(value)
            p.copy_(w)
        return parameters

    return Run(call)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, FP32))


def by_torch(compile: bool = False, **kind: bool) -> Callable[[Inputs], Run]:
    """torch's optimizer and clipping. With bf16 parameters it works on fp32 masters, whose
    gradients are cast to fp32 before a step and whose values are cast back after it."""

    def way(inputs: Inputs) -> Run:
        parameters = tuple(map(copied, inputs.leaves))
        mixed = parameters[0].dtype == BF16
        masters = [copied(p).float() if mixed else p for p in parameters]
        for w in masters:
            w.grad = torch.empty_like(w)
        capturable = parameters[0].is_cuda
        optimizer = torch.optim.AdamW(masters, **options(inputs), **kind, capturable=capturable)
        step = torch.compile(optimizer.step, fullgraph=False) if compile else optimizer.step
        grads = [w.grad for w in masters]

        def reset():  # clipping writes to them
            torch._foreach_copy_(grads, list(inputs.upstream))

        @torch.no_grad()
        def call():
            if mixed:
                reset()
            torch.nn.utils.clip_grad_norm_(masters, MAX_NORM, foreach=True)
            step()
            if mixed:
                torch._foreach_copy_(list(parameters), masters)
            return parameters

        return Run(call, reset=None if mixed else reset)

    return way


def by_compiled(inputs: Inputs) -> Run:
    """torch.compile of torch's step, where that takes less than minutes."""
    if not inputs.leaves[0].is_cuda or len(inputs.leaves) > 110:
        raise Absent("left out: compiling a step of so many tensors takes minutes")
    return by_torch(compile=True, foreach=True)(inputs)


def ours(inputs: Inputs) -> Run:
    """Clipping is part of the step."""
    parameters = tuple(copied(p).requires_grad_() for p in inputs.leaves)
    for p, g in zip(parameters, inputs.upstream, strict=True):
        p.grad = g.clone()
    optimizer = kernel("adamw", "AdamW")(parameters, **options(inputs), max_grad_norm=MAX_NORM)

    def call():
        optimizer.step()
        return tuple(p.detach() for p in parameters)

    return Run(call)
