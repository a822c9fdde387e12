"""The shapes of every operation: those that are trained, and small ones."""

import torch

from bench import attention_cases, operations, optimizers
from bench.operations import BF16, FP32, Case, Targets


def whole(ms: float) -> Targets:
    """Of a loss with its gradient, on an H200."""
    return {"forward+gradient": {"H200": ms}}


def passes(forward: float, backward: float) -> Targets:
    """Of each pass, on an H200."""
    return {"forward": {"H200": forward}, "backward": {"H200": backward}}


def all_cases(device: torch.device, quick: bool) -> list[Case]:
    """Shapes that are trained; on a CPU with a share of the rows; the smallest for --quick."""
    if quick:
        return quick_cases(device)
    cuda = device.type == "cuda"
    share = 1 if cuda else 32
    ce, tokens = operations.cross_entropy, 4096 if cuda else 1024
    return [  # in the order of their weight: --minutes leaves out the last
        *ce(8192 // share, 30522, 30528, device, whole(0.245)),
        *ce(8192 // share, 50257, 50304, device, whole(0.404)),
        *optimizer_cases(device),
        *projection_cases(device),
        *ce(8192 // share, 50257, 50257, device),
        *ce(4096 // share, 128256, 128256, device),
        *ce(32, 2, 2, device),
        *ce(32, 150, 150, device),
        *attention_cases.attention_cases(device),
        *add_norm_cases(device),
        *operations.bias_gelu(4 * tokens, 3072, device, passes(0.048, 0.079)),
        *operations.bias_gelu(tokens, 3072, device),
        *operations.embed(tokens, 768, (30522, 512, 2), device),
        *operations.embed(4 * tokens, 768, (30522, 512, 2), device),
    ]


def add_norm_cases(device: torch.device) -> list[Case]:
    """Two sizes of batches; without dropout, where its floor lies, and with BERT's."""
    targets = {16384: passes(0.026, 0.030), 4096: passes(0.008, 0.015)}
    cases = []
    for T, target_ms in targets.items():
        rows = T if device.type == "cuda" else T // 16
        cases += operations.add_norm(rows, 768, device, target_ms=target_ms)
        cases += operations.add_norm(rows, 768, device, p=0.1)
    return cases


def optimizer_cases(device: torch.device) -> list[Case]:
    """The larger models take more memory and time than a CPU has."""
    models = {"MiniLM": {}, "GPT-2 124M": {"H200": 0.91}, "BERT-large": {"H200": 2.5}}
    return [
        optimizers.adamw(model, dtype, device, target if dtype == BF16 else None)
        for model, target in models.items()
        for dtype in (BF16, FP32)
        if device.type == "cuda" or model == "MiniLM"
    ]


def projection_cases(device: torch.device) -> list[Case]:
    """The last one of a language model, with its loss."""
    projection = operations.linear_cross_entropy
    if device.type != "cuda":
        return [*projection(512, 768, 50257, device), *projection(2048, 384, 8192, device)]
    return [
        *projection(16384, 768, 50257, device, whole(6.0)),
        *projection(4096, 4096, 128256, device, whole(18.5), workspace_mib=1024),
        *projection(4096, 4096, 128256, device),
    ]


def quick_cases(device: torch.device) -> list[Case]:
    """One or two small shapes an operation: whether it runs and is right."""
    return [
        *operations.cross_entropy(32, 150, 150, device),
        *operations.cross_entropy(16, 1001, 1008, device),
        optimizers.adamw("a tiny BERT", BF16, device),
        optimizers.adamw("a tiny BERT", FP32, device),
        *operations.linear_cross_entropy(40, 32, 301, device),
        *operations.linear_cross_entropy(40, 32, 301, device, workspace_mib=0.01),
        *attention_cases.quick_cases(device),
        *operations.add_norm(24, 96, device),
        *operations.add_norm(24, 96, device, p=0.1),
        *operations.bias_gelu(50, 96, device),
        *operations.embed(50, 96, (300, 64, 2), device),
    ]
