"""The training loop, as a generator: the caller owns the loop, so there are no callbacks.

    for step in minift.train(model, examples, TrainConfig(learning_rate=2e-5)):
        if step.index % 50 == 0:
            print(step.index, step.loss)

One optimizer step: the loss is (sum of weighted target losses) / (sum of weights of valid targets)
over all its micro-batches, so a batch of 8 and 8 accumulated batches of 1 are the same step.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .adapters import adapter_of
from .batch import Batch, Batches, Example, check_length
from .config import TrainConfig
from .layers import Shadows, body_of
from .methods import ParamGroup, apply_rules, group_of, rules_of
from .ops import Draw, Ops, TableGradients, TargetReport, ops_for
from .optim import make_optimizer, schedule
from .prefetch import prefetched
from .step import CudaGraphs, Gradients, Numbers, OptimizerStep
from .tasks.classification import Classification
from .tasks.language import LanguageModel
from .tasks.task import Task


class Diverged(RuntimeError):
    """The loss or a gradient is not a finite number. Such a step is not taken. On a GPU, where that
    is known when somebody looks, later steps may have been."""


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
        whole = (group_of(name) for name in getattr(adapter_of(model), "whole", ()))
        heads = tuple(dict.fromkeys((*model.head_groups, *whole)))
        rules = rules_of(config, model.config.n_layer, heads)
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
    numbers: Numbers
    skipped_tensor: Tensor  # () int64
    report: TargetReport
    graphs: int  # captured so far in this run
    eager: str  # why its kernels were launched one by one; "": they need not be

    @property
    def examples(self) -> int:
        return len(self.rows)

    @property
    def loss(self) -> float:
        return self._finite(self.numbers.loss)

    @property
    def grad_norm(self) -> float:
        return self._finite(self.numbers.norm)

    @property
    def skipped(self) -> int:
        """Steps not taken until now, since the norm of their gradients was not finite."""
        return int(self.skipped_tensor)

    def _finite(self, value: float) -> float:
        if math.isfinite(value):
            return value
        self.report.check()
        shown = ", ".join(map(str, self.rows[:8])) + (", ..." if len(self.rows) > 8 else "")
        raise Diverged(
            f"step {self.index}: loss {self.numbers.loss}, gradient norm {self.numbers.norm}, "
            f"training rows {shown}: lower learning_rate"
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
    task: Task | None = None,
    state: TrainState | None = None,
    ops: Ops | None = None,
) -> Iterator[Step]:
    """Trains `model` in place; every optimizer step is yielded when it is done.

    On a GPU a step is yielded when it is launched, most of them as one captured graph; batches are
    put together beside it, by a thread of their own. A replay of a graph calls no hooks of modules
    or tensors: who has some turns `config.graph` off.

    Args:
        model: with fp32 parameters, on the device to train on.
        batches: examples, or the batches made from them.
        config: default `TrainConfig()`.
        task: the loss; default, by the model's head: labels, or tokens.
        state: from an earlier run, to go on after its last step; it is updated with every step.
        ops: table of operations; default, the one for the device.

    Raises:
        Diverged: the loss or a gradient is not finite; the step is not taken. On a GPU, when one
            of them is read.
        ValueError: there is nothing to train on, a target is no label, or a sequence is too long.
    """
    config = config or TrainConfig()
    device = next(model.parameters()).device
    ops = ops or ops_for(device)
    batches, body = _batches(batches, config, model), body_of(model)
    task = task or _task_of(model, config)
    state = state or TrainState.new(model, config, ops)
    total, optimizer = total_steps(config, len(batches)), state.optimizer
    take = _make_step(model, state, config, task, ops, batches.accumulation > 1)
    with closing(prefetched(_from(batches, state.step, total), device)) as coming:
        for micro_batches in coming:
            for batch in micro_batches:
                check_length(batch.layout, body.room)
            factor = schedule(state.step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            numbers, done = take(state.step, micro_batches), state.step + 1
            step = Step(
                index=done,
                total=total,
                epoch=done / len(batches),
                learning_rate=max(group["lr"] for group in optimizer.param_groups),
                tokens=sum(sum(batch.layout.lengths) for batch in micro_batches),
                rows=tuple(sorted({row for batch in micro_batches for row in batch.rows})),
                numbers=numbers,
                skipped_tensor=optimizer.skipped,
                report=take.gradients.report,
                graphs=take.captured,
                eager=take.eager,
            )
            if device.type == "cpu":  # elsewhere looking would wait for the device
                step.loss, step.grad_norm  # noqa: B018
            state.step = done
            yield step


def _task_of(model: nn.Module, config: TrainConfig) -> Task:
    if model.config.head == "lm":
        return LanguageModel()
    return Classification(model.config.labels, None, config.label_smoothing_factor)


def _make_step(model, state, config, task, ops, several):
    """What takes the steps of a run, and whether it captures them."""
    device = next(model.parameters()).device
    draw = Draw(torch.tensor(config.seed, device=device), torch.tensor(0, device=device))
    dtype, shadows = compute_dtype(config, device), state.shadows
    if shadows is None and dtype != torch.float32:
        # What is trained is cast in every step, all else once.
        frozen = Shadows(model, dtype, frozen=True)
        shadows = frozen if frozen.leaves else None
    gradients = Gradients(
        model, task, ops, dtype, draw, shadows, state.tables, several,
        config.gradient_checkpointing,
    )  # fmt: skip
    eager = why_eager(config, ops, state.optimizer, device)
    return OptimizerStep(gradients, state.optimizer, None if eager else CudaGraphs(device), eager)


def why_eager(
    config: TrainConfig, ops: Ops, optimizer: torch.optim.Optimizer, device: torch.device
) -> str:
    """Why steps are not captured but launched kernel by kernel; "" where they are captured."""
    if device.type != "cuda":
        return f"there are no graphs on {device.type}"
    if config.graph == "off":
        return "graph is off"
    if not ops.captured:
        return "torch's operations take their shapes from the batch: use ops triton"
    if not hasattr(optimizer, "sync_groups"):
        return f"torch's {type(optimizer).__name__} keeps its rates on the host: use optim adamw"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks, which a replay would not call"
    return ""


def _from(batches: Batches, step: int, total: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step after `step` others."""
    while step < total:
        for micro_batches in batches.epoch(*divmod(step, len(batches))):
            yield micro_batches
            step += 1
            if step == total:
                return


def _batches(given: Batches | Sequence[Example], config: TrainConfig, model: nn.Module) -> Batches:
    """The batches, made by the configuration if need be; never none."""
    if not isinstance(given, Batches):
        size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        given = Batches(given, size, accumulation, config.seed)
    if given.virtual != body_of(model).virtual:
        given = replace(given, virtual=body_of(model).virtual)
    if not len(given):
        raise ValueError("expected examples to train on, got none")
    return given
