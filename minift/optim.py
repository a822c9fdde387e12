"""The optimizer over a table of parameter groups, and the schedule of its learning rates."""

import math

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .layers import Shadows
from .methods import ParamGroup
from .ops import Ops, clip_in_step


def schedule(step: int, total: int, config: TrainConfig) -> float:
    """The factor on every learning rate in the optimizer step that follows `step` finished ones.

    The same numbers as transformers' schedules: warm-up starts at 0 and the decay ends at 0.

    Args:
        step: finished steps, from 0.
        total: steps of the whole run.
        config: lr_scheduler_type and warmup_steps (below 1: a share of `total`).
    """
    warmup = config.warmup_steps
    warmup = math.ceil(warmup * total) if warmup < 1 else round(warmup)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "linear":
        return max(0.0, 1 - progress)
    if config.lr_scheduler_type == "cosine":
        return max(0.0, (1 + math.cos(math.pi * progress)) / 2)
    return 1.0


def make_optimizer(
    model: nn.Module,
    groups: list[ParamGroup],
    config: TrainConfig,
    ops: Ops,
    shadows: Shadows | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over the trained rows of the table; groups keep their peak rate as `peak_lr`.

    AdamW is that of `ops`; Adam and SGD, which add the decay to the gradient, are torch's. Their
    `step` clips; then `grad_norm` is the norm before clipping, a () tensor, and `skipped` the
    number of steps that were not taken because it was not finite. Where there are `shadows`, they
    stand in the groups, and their masters are stepped.
    """
    parameters = leaves_of(model, shadows)
    trained = [
        {
            "params": [parameters[name] for name in g.names],
            "lr": g.learning_rate,
            "peak_lr": g.learning_rate,
            "weight_decay": g.weight_decay,
        }
        for g in groups
        if g.learning_rate
    ]
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    max_norm = config.max_grad_norm or math.inf
    if config.optim == "adamw":
        if shadows is None:
            return ops.adamw(trained, betas, eps, max_norm)
        masters = {shadows.leaves[name]: p.detach() for name, p in shadows.masters.items()}
        return ops.adamw(trained, betas, eps, max_norm, masters)
    if config.optim == "sgd":
        optimizer = torch.optim.SGD(trained, momentum=config.momentum, fused=True)
    else:
        optimizer = torch.optim.Adam(trained, betas=betas, eps=eps, fused=True)
    return clip_in_step(optimizer, max_norm)


def leaves_of(model: nn.Module, shadows: Shadows | None) -> dict[str, Tensor]:
    """What a step differentiates and an optimizer holds, by the name of the parameter."""
    return dict(model.named_parameters()) | (shadows.leaves if shadows else {})


def kept(optimizer: torch.optim.Optimizer) -> set[str]:
    """What an optimizer keeps of a parameter from its first step on, by its names in `state`."""
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    return {"step", "exp_avg", "exp_avg_sq"}
