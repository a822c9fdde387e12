"""The training loop, as a generator: the caller owns the loop, so there are no callbacks.

    for step in minift.train(model, examples, TrainConfig(learning_rate=2e-5)):
        if step.index % 50 == 0:
            print(step.index, step.loss)

One optimizer step: the loss is (sum of weighted target losses) / (sum of weights of valid targets)
over all its micro-batches, so a batch of 8 and 8 accumulated batches of 1 are the same step.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batch import Batch, Batches, Example
from .config import TrainConfig
from .methods import ParamGroup, apply_rules, rules_of
from .ops import Draw, Ops, ops_for
from .optim import make_optimizer, schedule
from .tasks.classification import Classification


class Diverged(RuntimeError):
    """The loss or a gradient is not a finite number. The weights are those before the step."""


@dataclass
class TrainState:
    """What a run is besides its weights: steps done, and the optimizer with its moments."""

    groups: list[ParamGroup]
    optimizer: torch.optim.Optimizer
    step: int = 0

    @staticmethod
    def new(model: nn.Module, config: TrainConfig, ops: Ops | None = None) -> "TrainState":
        """Freezes what the configuration freezes and makes an optimizer for the rest.

        Raises:
            InputError: the rules do not fit the model.
        """
        rules = rules_of(config, model.config.n_layer, model.head_groups)
        groups = apply_rules(model, rules, config.weight_decay)
        ops = ops or ops_for(next(model.parameters()).device)
        return TrainState(groups, make_optimizer(model, groups, config, ops))


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step that is done. Reading `loss` or `grad_norm` waits for the device."""

    index: int  # steps done, from 1
    total: int  # steps of the whole run
    epoch: float  # passes over the data done
    learning_rate: float  # of the fastest group, in this step
    tokens: int  # real tokens, all of them: nothing is padded
    examples: int
    loss_tensor: Tensor  # ()
    norm_tensor: Tensor  # () before clipping

    @property
    def loss(self) -> float:
        return self.loss_tensor.item()

    @property
    def grad_norm(self) -> float:
        return self.norm_tensor.item()


def total_steps(config: TrainConfig, steps_in_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps or math.ceil(config.num_train_epochs * steps_in_epoch)


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of activations and products; weights are fp32 masters on every device."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    name = auto if config.dtype == "auto" else config.dtype
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def train(
    model: nn.Module,
    batches: Batches | Sequence[Example],
    config: TrainConfig | None = None,
    task: Classification | None = None,
    state: TrainState | None = None,
    ops: Ops | None = None,
) -> Iterator[Step]:
    """Trains `model` in place; every optimizer step is yielded when it is done.

    Args:
        model: with fp32 parameters, on the device to train on.
        batches: examples, or the batches made from them.
        config: how; default `TrainConfig()`.
        task: the loss; default, classification by the model's labels.
        state: from an earlier run, to go on after its last step; it is updated with every step.
        ops: table of operations; default, the one for the device.

    Raises:
        Diverged: the loss or a gradient is not finite; the step is not taken.
        ValueError: there is nothing to train on.
    """
    config = config or TrainConfig()
    device = next(model.parameters()).device
    ops, dtype = ops or ops_for(device), compute_dtype(config, device)
    if not isinstance(batches, Batches):
        size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        batches = Batches(batches, size, accumulation, config.seed)
    if not len(batches):
        raise ValueError("expected examples to train on, got none")
    task = task or Classification(model.config.labels, None, config.label_smoothing_factor)
    state = state or TrainState.new(model, config, ops)
    total = total_steps(config, len(batches))
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    draw = Draw(torch.tensor(config.seed, device=device), torch.tensor(0, device=device))
    while state.step < total:
        epoch, start = divmod(state.step, len(batches))
        for micro_batches in batches.epoch(epoch, start):
            draw.step.fill_(state.step)
            factor = schedule(state.step, total, config)
            for group in state.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            loss = gradients(model, micro_batches, task, ops, dtype, draw)
            norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
            _check_finite(loss, norm, state.step + 1, micro_batches)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step += 1
            yield Step(
                index=state.step,
                total=total,
                epoch=state.step / len(batches),
                learning_rate=max(group["lr"] for group in state.optimizer.param_groups),
                tokens=sum(sum(batch.layout.lengths) for batch in micro_batches),
                examples=sum(len(batch.rows) for batch in micro_batches),
                loss_tensor=loss,
                norm_tensor=norm,
            )
            if state.step >= total:
                break


def gradients(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    task: Classification,
    ops: Ops,
    dtype: torch.dtype,
    draw: Draw,
) -> Tensor:
    """Adds the gradients of one optimizer step to the parameters' `grad`.

    Returns:
        () the loss of the step: one mean over all its targets, however they are cut into
        micro-batches.
    """
    loss = torch.zeros((), device=draw.step.device)
    weight = sum(task.weight(batch) for batch in micro_batches) or 1.0
    for batch in micro_batches:
        batch = batch.to(loss.device)
        part = task.loss(model(batch, ops, dtype, draw), batch, ops) / weight
        part.backward()
        loss += part.detach()
    return loss


def _check_finite(loss: Tensor, norm: Tensor, step: int, micro_batches: list[Batch]) -> None:
    """Raises Diverged. On a CPU only: elsewhere looking would wait for the device."""
    if loss.device.type != "cpu" or math.isfinite(loss.item() + norm.item()):
        return
    rows = sorted(row for batch in micro_batches for row in batch.rows)
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    raise Diverged(
        f"step {step}: loss {loss.item()}, gradient norm {norm.item()}, training rows {shown}: "
        "lower learning_rate"
    )
