"""The training loop, as a generator: the caller owns the loop, so there are no callbacks.

    for step in minift.train(model, examples, TrainConfig(learning_rate=2e-5)):
        if step.index % 50 == 0:
            print(step.index, step.loss)

One optimizer step: the loss is (sum of weighted target losses) / (sum of weights of valid targets)
over all its micro-batches, so a batch of 8 and 8 accumulated batches of 1 are the same step.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .batch import Batch, Batches, Example
from .config import TrainConfig
from .layers import Shadows
from .methods import ParamGroup, apply_rules, rules_of
from .ops import Draw, Ops, TableGradients, TargetReport, ops_for
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
    shadows: Shadows | None = None  # the weights in 16 bits, where the optimizer keeps masters
    tables: TableGradients = field(default_factory=TableGradients)

    @staticmethod
    def new(model: nn.Module, config: TrainConfig, ops: Ops | None = None) -> "TrainState":
        """Freezes what the configuration freezes and makes an optimizer for the rest.

        Raises:
            InputError: the rules do not fit the model.
        """
        rules = rules_of(config, model.config.n_layer, model.head_groups)
        groups = apply_rules(model, rules, config.weight_decay)
        device = next(model.parameters()).device
        ops, dtype = ops or ops_for(device), compute_dtype(config, device)
        half = dtype != torch.float32 and ops.masters and config.optim == "adamw"
        shadows = Shadows(model, dtype) if half else None
        optimizer = make_optimizer(model, groups, config, ops, shadows)
        return TrainState(groups, optimizer, shadows=shadows)


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step that is done. Reading `loss`, `grad_norm` or `skipped` waits for the
    device; the first two raise Diverged where they are not finite."""

    index: int  # steps done, from 1
    total: int  # steps of the whole run
    epoch: float  # passes over the data done
    learning_rate: float  # of the fastest group, in this step
    tokens: int  # real tokens, all of them: nothing is padded
    rows: tuple[int, ...]  # of the training data
    loss_tensor: Tensor  # ()
    norm_tensor: Tensor  # () before clipping
    skipped_tensor: Tensor  # () int64
    report: TargetReport

    @property
    def examples(self) -> int:
        return len(self.rows)

    @property
    def loss(self) -> float:
        return self._finite(self.loss_tensor)

    @property
    def grad_norm(self) -> float:
        return self._finite(self.norm_tensor)

    @property
    def skipped(self) -> int:
        """Steps not taken until now, since the norm of their gradients was not finite."""
        return int(self.skipped_tensor)

    def _finite(self, number: Tensor) -> float:
        value = number.item()
        if math.isfinite(value):
            return value
        self.report.check()
        shown = ", ".join(map(str, self.rows[:8])) + (", ..." if len(self.rows) > 8 else "")
        raise Diverged(
            f"step {self.index}: loss {self.loss_tensor.item()}, gradient norm "
            f"{self.norm_tensor.item()}, training rows {shown}: lower learning_rate"
        )


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
        config: default `TrainConfig()`.
        task: the loss; default, classification by the model's labels.
        state: from an earlier run, to go on after its last step; it is updated with every step.
        ops: table of operations; default, the one for the device.

    Raises:
        Diverged: the loss or a gradient is not finite; the step is not taken. On a GPU, when one
            of them is read.
        ValueError: there is nothing to train on, or a target is no label.
    """
    config = config or TrainConfig()
    device = next(model.parameters()).device
    ops, dtype = ops or ops_for(device), compute_dtype(config, device)
    batches = _batches(batches, config)
    task = task or Classification(model.config.labels, None, config.label_smoothing_factor)
    state = state or TrainState.new(model, config, ops)
    total = total_steps(config, len(batches))
    optimizer, report = state.optimizer, TargetReport.on(device)
    draw = Draw(torch.tensor(config.seed, device=device), torch.tensor(0, device=device))
    while state.step < total:
        epoch, start = divmod(state.step, len(batches))
        for micro_batches in batches.epoch(epoch, start):
            draw.step.fill_(state.step)
            factor = schedule(state.step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            loss = _take_step(model, state, micro_batches, task, ops, dtype, draw, report)
            step = Step(
                index=state.step + 1,
                total=total,
                epoch=(state.step + 1) / len(batches),
                learning_rate=max(group["lr"] for group in optimizer.param_groups),
                tokens=sum(sum(batch.layout.lengths) for batch in micro_batches),
                rows=tuple(sorted(row for batch in micro_batches for row in batch.rows)),
                loss_tensor=loss,
                norm_tensor=optimizer.grad_norm.clone(),  # the next step writes to it again
                skipped_tensor=optimizer.skipped,
                report=report,
            )
            if device.type == "cpu":  # elsewhere looking would wait for the device
                step.loss, step.grad_norm  # noqa: B018
            state.step += 1
            yield step
            if state.step >= total:
                break


def _take_step(model, state, micro_batches, task, ops, dtype, draw, report):
    """() the loss; gradients are made, used and forgotten."""
    model, tables = state.shadows or model, state.tables
    loss = gradients(model, micro_batches, task, ops, dtype, draw, report, tables)
    state.optimizer.step()
    state.optimizer.zero_grad()
    tables.clear()
    return loss


def _batches(given: Batches | Sequence[Example], config: TrainConfig) -> Batches:
    """The batches, made by the configuration if need be; never none."""
    if not isinstance(given, Batches):
        size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        given = Batches(given, size, accumulation, config.seed)
    if not len(given):
        raise ValueError("expected examples to train on, got none")
    return given


def gradients(
    model: nn.Module | Shadows,
    micro_batches: Sequence[Batch],
    task: Classification,
    ops: Ops,
    dtype: torch.dtype,
    draw: Draw,
    report: TargetReport | None = None,
    tables: TableGradients | None = None,
) -> Tensor:
    """Adds the gradients of one optimizer step to the parameters' `grad`, or that of their leaves.

    Args:
        model: or its 16-bit leaves, whose `grad` is None before.
        report: sees the targets.
        tables: memory for the gradients of embeddings, to be cleared by the caller.

    Returns:
        () the loss of the step: one mean over all its targets, however they are cut into
        micro-batches. Those of 16-bit leaves are added up in fp32 and rounded once.
    """
    loss = torch.zeros((), device=draw.step.device)
    weight = sum(task.weight(batch) for batch in micro_batches) or 1.0
    several = len(micro_batches) > 1 and isinstance(model, Shadows)
    sums = {}
    for batch in micro_batches:
        batch = batch.to(loss.device)
        if tables is not None and batch.order is not None:
            batch = replace(batch, order=replace(batch.order, gradients=tables))
        part = task.loss(model(batch, ops, dtype, draw), batch, ops, report) / weight
        part.backward()
        loss += part.detach()
        if several:
            _take_gradients(model, sums)
    for leaf, total in sums.items():
        leaf.grad = total.to(leaf.dtype)
    if tables is not None:
        tables.settle()
    return loss


def _take_gradients(shadows: Shadows, sums: dict[Tensor, Tensor]) -> None:
    """Moves the gradients of the leaves into the fp32 sums."""
    for leaf in shadows.leaves.values():
        if leaf.grad is not None:
            total = sums.get(leaf)
            sums[leaf] = leaf.grad.float() if total is None else total.add_(leaf.grad)
            leaf.grad = None
