"""What an optimizer step runs: gradients of its micro-batches, then the update. On a GPU it is
captured in a CUDA graph, once for each shape of a batch, and replayed for all others of that shape.

A graph has the addresses and the Python numbers of its capture for good. So nothing here depends on
a Python number that changes from step to step: seed, step, learning rates, the clip coefficient,
the sum of the targets' weights and all of a batch lie in device memory, at the same place. What is
replayed is what was captured, kernel by kernel: the same bits as without a graph.

    one micro-batch in a step     a graph of all of it for each shape
    several                       a graph of a micro-batch for each shape, and one of the update
"""

import gc
from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .batch import Batch
from .layers import Shadows
from .ops import Draw, Ops, TableGradients, TargetReport
from .tasks.task import Task


@dataclass(eq=False)
class Gradients:
    """The loss of an optimizer step and its gradients, added up over micro-batches: one mean over
    all their targets, however they are cut. The gradients are in the `grad` of the parameters, or
    of their 16-bit leaves; those of several micro-batches are added up in fp32 and rounded once.

        start    with the sum of the weights of all targets
        add      a micro-batch, on the device
        finish   before the optimizer
        clear    after it
    """

    model: nn.Module
    task: Task
    ops: Ops
    dtype: torch.dtype  # of activations and products
    draw: Draw
    shadows: Shadows | None = None
    tables: TableGradients = field(default_factory=TableGradients)
    several: bool = False  # micro-batches in a step
    checkpointing: bool = False  # backward computes each block again

    def __post_init__(self):
        device = self.draw.step.device
        self.loss, self.scale = torch.zeros((), device=device), torch.ones((), device=device)
        self.report = TargetReport.on(device)
        leaves = self.shadows.leaves if self.shadows else {}
        named = dict(self.model.named_parameters()) | leaves
        self.leaves = [p for p in named.values() if p.requires_grad]
        self.sums: dict[Tensor, Tensor] = {}

    def start(self, weight: float) -> None:
        """Begins a step. Not in a graph, which would add to gradients that were left over."""
        self.clear()
        self.loss.zero_()
        self.scale.fill_(1 / (weight or 1.0))
        if self.shadows:
            self.shadows.refresh()

    def add(self, batch: Batch) -> None:
        """Adds the gradients of a micro-batch."""
        if batch.order is not None:
            batch = replace(batch, order=replace(batch.order, gradients=self.tables))
        with self.shadows.standing() if self.shadows else nullcontext():
            logits = self.model(batch, self.ops, self.dtype, self.draw, self.checkpointing)
            scale = (self.scale,) if self.task.scales else ()
            total = self.task.loss(logits, batch, self.ops, self.report, *scale)
            # No kernel multiplies: the scale is the gradient from above, if the loss has it not.
            total.backward(None if scale else self.scale)
        if scale:
            self.loss.add_(total.detach())
        else:
            self.loss.addcmul_(total.detach(), self.scale)
        self.tables.settle()
        if self.several:
            self._keep()

    def _keep(self):
        """Moves the gradients into the sums."""
        for p in self.leaves:
            if p.grad is not None:
                if p not in self.sums:
                    wide = torch.promote_types(p.dtype, torch.float32)
                    self.sums[p] = torch.zeros_like(p, dtype=wide, requires_grad=False)
                self.sums[p].add_(p.grad)
        self.clear()

    def finish(self) -> None:
        """Makes `grad` that of the step."""
        for p, total in self.sums.items():
            p.grad = total.to(p.dtype)

    def clear(self) -> None:
        """Forgets the gradients, all but the sums of several micro-batches."""
        for p in self.leaves:
            p.grad = None
        self.tables.clear()

    def clear_sums(self) -> None:
        if self.sums:
            torch._foreach_zero_(list(self.sums.values()))


class CudaGraphs:
    """Graphs that share one pool of memory: only one of them runs at a time, and nothing that one
    leaves there is wanted after another has run.

    What is launched before runs on the stream of the captures too: where autograd has kept a part
    of a launched step, that part names the stream it ran on, and in a capture it must be this one.
    """

    def __init__(self, device: torch.device):
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def launch(self, run: Callable[[], None]) -> None:
        """Runs it, between what was launched before and what will be launched after."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            run()
        here.wait_stream(self.stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What replays it. Nothing runs yet.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # to unload a kernel that nobody uses any more would end the capture
        try:
            self._capture(graph, self.pool, run)
        except RuntimeError:
            self._recover()
            raise
        finally:
            if collects:
                gc.enable()
        return graph.replay

    def _capture(self, graph, pool, run):
        # Only this thread is watched: another one may make pinned memory meanwhile. The stream is
        # entered apart, since a capture that fails does not leave it.
        mode = "thread_local"
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, pool, self.stream, capture_error_mode=mode),
        ):
            run()

    def _recover(self):
        """A capture that fails leaves torch 2.11 giving out the pool's memory, and its random
        generator waiting for the end of a capture: it is given one."""
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(self.stream.device.index, self.pool)
        with suppress(RuntimeError):
            one = torch.zeros(1, device=self.stream.device)
            self._capture(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), one.zero_)


PAGE = 64  # steps


class Page:
    """Loss and gradient norm of PAGE steps, in device memory. Reading waits for the device, and
    then reads all that are there."""

    def __init__(self, device: torch.device):
        self.values, self.written = torch.empty(PAGE, 2, device=device), 0
        self._read: list[list[float]] = []

    def write(self, loss: Tensor, norm: Tensor) -> None:
        torch.stack((loss, norm), out=self.values[self.written])
        self.written += 1

    def read(self, line: int) -> list[float]:
        if line >= len(self._read):
            self._read = self.values[: self.written].tolist()
        return self._read[line]


@dataclass(frozen=True, eq=False)
class Numbers:
    """Loss and gradient norm of a step, to be read when they are wanted."""

    page: Page
    line: int

    @property
    def loss(self) -> float:
        return self.page.read(self.line)[0]

    @property
    def norm(self) -> float:
        return self.page.read(self.line)[1]


@dataclass(eq=False)
class _Slot:
    """Where all batches of a shape come to lie, and the graph that reads them there."""

    batch: Batch | None
    replay: Callable[[], None] | None = None


class OptimizerStep:
    """One optimizer step after another.

    The first step of a shape is launched kernel by kernel, so that kernels are compiled and all
    that is kept from step to step is made; the second is captured; all others are replayed.
    """

    def __init__(
        self,
        gradients: Gradients,
        optimizer: torch.optim.Optimizer,
        graphs: CudaGraphs | None = None,
        eager: str = "",
    ):
        """
        Args:
            optimizer: over the leaves of `gradients`; to be captured, `minift.kernels.adamw`'s.
            graphs: None launches everything.
            eager: why, if so.
        """
        self.gradients, self.optimizer = gradients, optimizer
        self.graphs, self.eager = graphs, eager
        self.captured = 0  # graphs so far
        self._page = Page(gradients.loss.device)
        self._slots: dict[Hashable, _Slot] = {}

    def __call__(self, index: int, micro_batches: list[Batch]) -> Numbers:
        """Takes the step after `index` others.

        Args:
            index: finished steps.
            micro_batches: on the host.
        """
        gradients = self.gradients
        gradients.draw.step.fill_(index)
        gradients.start(sum(gradients.task.weight(batch) for batch in micro_batches))
        if self.graphs is not None:
            self.optimizer.sync_groups()
        if gradients.several:
            for batch in micro_batches:
                self._run(gradients.add, batch)
            self._run(self._update)
        else:
            self._run(self._whole, *micro_batches)
        if self._page.written == PAGE:
            self._page = Page(gradients.loss.device)
        self._page.write(gradients.loss, self.optimizer.grad_norm)
        return Numbers(self._page, self._page.written - 1)

    def _whole(self, batch: Batch) -> None:
        self.gradients.add(batch)
        self._update()

    def _update(self, batch: None = None) -> None:
        self.gradients.finish()
        self.optimizer.step()
        self.gradients.clear()
        self.gradients.clear_sums()

    def _run(self, function: Callable[..., None], batch: Batch | None = None) -> None:
        """function(batch), or the graph of it."""
        if self.graphs is None:
            function(self._on_device(batch))
            return
        key = None if batch is None else batch.shape
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot(self._on_device(batch))
            self.graphs.launch(lambda: function(slot.batch))
            return
        if batch is not None:
            slot.batch.memory.copy_(batch.memory, non_blocking=True)
        if slot.replay is None:
            try:
                slot.replay = self.graphs.capture(lambda: function(slot.batch))
                self.captured += 1
            except RuntimeError as error:  # nothing of it has run
                self.graphs, self.eager = None, " ".join(str(error).split())
                self.gradients.clear()
                function(slot.batch)
                return
        slot.replay()

    def _on_device(self, batch):
        return None if batch is None else batch.to(self.gradients.loss.device)
