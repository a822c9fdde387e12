"""Who fine-tunes side by side: minift, transformers in several ways, and torch without padding.

A peer trains from its constructor on: `step(k)` is one optimizer step on the rows of step k, and
does not wait for its loss. One that cannot run here says why, as Unavailable. All have the same
weights, rows, dropout, schedule, clipping and decay; what one does not share is its `note`.
"""

import importlib.util
import shutil
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import minift
from bench.unpadded import Masters, Packed, Unpadded, flash, one_by_one, pack, pinned, varlen
from bench.workloads import Data
from minift.batch import collate
from minift.ops import Draw, ops_for
from minift.optim import schedule
from minift.step import Gradients
from minift.weights import hf_names, read_config

EAGER_STEPS = 3  # before a graph is captured: what is made once, is made then
RECOMPILES = 64  # torch.compile's own limit, 8, ends in eager without a word


class Unavailable(Exception):
    """A peer cannot run on this machine."""


@dataclass(frozen=True)
class Job:
    """What all peers of a workload train."""

    folder: Path  # of the model
    data: Data
    config: minift.TrainConfig
    device: torch.device
    made: dict = field(default_factory=dict)  # batches, by how they are put together

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products."""
        return torch.float32 if self.config.dtype == "fp32" else torch.bfloat16

    @property
    def layers(self) -> int:
        """Of the model."""
        return read_config(self.folder).n_layer

    @property
    def predicts(self) -> bool:
        """Whether tokens are predicted, of a GPT; nothing is dropped then."""
        return not isinstance(self.data.batches.examples[0].target, int)

    def rate(self, k: int) -> float:
        """The learning rate of step k."""
        config = self.config
        return config.learning_rate * schedule(k, config.max_steps, config)

    def batches(self, how: str, make) -> list:
        """The batch of every step, put together once: `make` takes a step's examples."""
        if how not in self.made:
            steps = range(self.config.max_steps)
            self.made[how] = [make(self.data.examples(k)) for k in steps]
        return self.made[how]


class Peer:
    """Trains a model, step by step."""

    name = ""
    states = "fp32"  # of the moments and masters
    note = ""  # what is not shared with the others
    comparable = True  # no lower precision, no dropout less
    seconds_a_layer = 0.0  # to make it, about
    last: Tensor  # () the loss of the last step

    def step(self, k: int) -> None:
        """One optimizer step."""
        raise NotImplementedError

    def loss(self) -> float:
        """Of the last step; waits."""
        return self.last.item()

    def gradients(self, k: int) -> dict[str, Tensor]:
        """Of the rows of step k before any step, by minift's names."""
        raise NotImplementedError


class Minift(Peer):
    """As a user has it: the public generator, which puts its batches together as it goes."""

    name = "minift"

    def __init__(self, job: Job, **others):
        self.job = job
        self.model, _ = minift.load_model(job.folder, head=read_config(job.folder).head)
        self.model.to(job.device)
        config = replace(job.config, **others)
        self.steps = minift.train(self.model, job.data.batches, config)

    def step(self, k: int) -> None:
        self.done = next(self.steps)
        if self.done.rows != tuple(sorted(self.job.data.rows(k))):
            raise RuntimeError(f"step {k} trained other rows than the peers'")
        if self.done.eager and self.job.device.type == "cuda":
            self.note = f"launched kernel by kernel: {self.done.eager}"

    def loss(self) -> float:
        return self.done.loss

    def gradients(self, k: int) -> dict[str, Tensor]:
        job, device = self.job, self.job.device
        batch = collate(job.data.batches.examples, job.data.rows(k), train=True)
        draw = Draw(torch.tensor(0, device=device), torch.tensor(0, device=device))
        task = minift.Classification(self.model.config.labels, None, 0.0)
        gradients = Gradients(self.model, task, ops_for(device), job.dtype, draw)
        gradients.start(task.weight(batch))
        gradients.add(batch.to(device))
        return taken(self.model)


class MiniftEager(Minift):
    """Without captured graphs, where there are any."""

    name = "minift, no graph"
    note = "graphs switched off"

    def __init__(self, job: Job):
        default = {f.name: f.default for f in fields(minift.TrainConfig)}.get("graph")
        if default is None:
            raise Unavailable("minift captures no graphs")
        super().__init__(job, graph=False if isinstance(default, bool) else "off")


class Transformers(Peer):
    """As a careful user writes it: scaled_dot_product_attention, autocast, fused AdamW, padding to
    the longest of a batch, and no look at a loss. (The model itself looks at its mask.)"""

    name = "transformers"
    autocast = True

    def __init__(self, job: Job):
        self.job, self.bucketed = job, False
        self.model = self.load()
        self.forward = self.model
        groups = [
            {"params": [p for p in self.model.parameters() if (p.ndim > 1) == decayed],
             "weight_decay": job.config.weight_decay * decayed}
            for decayed in (True, False)
        ]  # fmt: skip
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(groups, lr=job.config.learning_rate, fused=True)

    def load(self) -> nn.Module:
        """The model, on the device, in training."""
        transformers = import_transformers()
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            self.job.folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        return model.to(self.job.device).train()

    def batch(self, k: int) -> list[Tensor | None]:
        """Ids, mask and labels of step k, on the device."""
        job, longest = self.job, self.job.data.longest

        def make(examples):
            width = max(len(example.tokens) for example in examples)
            return padded(examples, bucket(width, longest) if self.bucketed else width, job.device)

        made = job.batches("bucketed" if self.bucketed else "longest", make)[k]
        return [x if x is None else x.to(job.device, non_blocking=True) for x in made]

    def backward(self, k: int) -> Tensor:
        """() the loss of step k; gradients are added."""
        ids, mask, labels = self.batch(k)
        half = self.autocast and self.job.dtype != torch.float32
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=half):
            loss = self.forward(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.detach()

    def step(self, k: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.rate(k)
        self.last = self.backward(k)
        clip = self.job.config.max_grad_norm
        torch.nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, k: int) -> dict[str, Tensor]:
        self.backward(k)
        named = taken(self.model)
        config = read_config(self.job.folder)
        return {
            ours: torch.cat([named[name] for name in theirs])
            for ours, theirs in hf_names(config).items()
        }


class TransformersCompiled(Transformers):
    """The model compiled, on a few widths, each by itself."""

    name = "transformers, compiled"
    mode: str | None = None
    seconds_a_layer = 3.0

    def __init__(self, job: Job):
        if not compiles():
            raise Unavailable("no C compiler for torch.compile")
        super().__init__(job)
        torch._dynamo.config.recompile_limit = RECOMPILES
        self.bucketed = True
        self.forward = torch.compile(self.model, dynamic=False, mode=self.mode)


class TransformersGraphed(TransformersCompiled):
    """Likewise, forward and backward replayed as CUDA graphs."""

    name = "transformers, reduce-overhead"
    mode = "reduce-overhead"

    def __init__(self, job: Job):
        if job.device.type != "cuda":
            raise Unavailable("CUDA graphs need a GPU")
        super().__init__(job)

    def backward(self, k: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return super().backward(k).clone()  # the next replay writes over it


class TransformersLiger(Transformers):
    """With the kernels of Liger that fit a BERT: its LayerNorm."""

    name = "transformers, Liger"

    def load(self) -> nn.Module:
        if self.job.device.type != "cuda":
            raise Unavailable("Liger needs a GPU")
        if not importlib.util.find_spec("liger_kernel"):
            raise Unavailable("liger_kernel is not installed")
        from liger_kernel.transformers.layer_norm import LigerLayerNorm

        model = super().load()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.LayerNorm):
                    norm = LigerLayerNorm(child.weight.numel(), eps=child.eps, bias=True)
                    norm.load_state_dict(child.state_dict())
                    setattr(module, name, norm.to(self.job.device))
        return model


class TransformersHalf(Transformers):
    """All in bf16, moments too: no master holds what a small step changes."""

    name = "transformers, bf16 states"
    states = "bf16"
    note = "weights and moments in bf16"
    comparable = False
    autocast = False

    def load(self) -> nn.Module:
        return super().load().to(self.job.dtype)


class TorchUnpadded(Peer):
    """Plain torch without padding, bf16 weights over fp32 masters."""

    name = "torch unpadded"
    multiple = 1  # of rows
    capturable = False
    attention = staticmethod(flash)

    def __init__(self, job: Job):
        self.job = job
        cpu = job.device.type == "cpu"
        if not cpu and job.dtype == torch.float32:
            raise Unavailable("the flash kernel takes 16 bits")
        model, _ = minift.load_model(job.folder)
        model.to(job.device)
        self.module = Unpadded(model, one_by_one if cpu else self.attention)
        self.masters = Masters(model, job.dtype, job.config, self.capturable)
        self.forward = self.module

    def packed(self, k: int) -> Packed:
        """The batch of step k, in pinned memory."""
        data, device = self.job.data, self.job.device

        def make(examples):
            batch = pack(examples, data.longest, self.multiple)
            return batch._replace(**{n: pinned(x, device) for n, x in batch.tensors().items()})

        return self.job.batches(f"packed {self.multiple}", make)[k]

    def backward(self, batch: Packed) -> Tensor:
        """() the loss; the leaves have gradients."""
        loss = self.forward(batch)
        loss.backward()
        return loss.detach()

    def step(self, k: int) -> None:
        self.masters.set_rate(self.job.rate(k))
        self.last = self.backward(moved(self.packed(k), self.job.device))
        self.masters.step()
        self.masters.zero_grad()

    def gradients(self, k: int) -> dict[str, Tensor]:
        self.backward(moved(self.packed(k), self.job.device))
        return taken(self.module.model)


class TorchVarlen(TorchUnpadded):
    """Through torch's public function, which has no dropout."""

    name = "torch unpadded, varlen_attn"
    note = "no dropout of attention"
    comparable = False
    attention = staticmethod(varlen)

    def __init__(self, job: Job):
        if job.device.type != "cuda":
            raise Unavailable("varlen_attn needs a GPU")
        if not importlib.util.find_spec("torch.nn.attention.varlen"):
            raise Unavailable("torch has no varlen_attn")
        super().__init__(job)


class TorchCompiled(TorchUnpadded):
    """Compiled once, for any number of rows."""

    name = "torch unpadded, compiled"
    seconds_a_layer = 3.0

    def __init__(self, job: Job):
        if not compiles():
            raise Unavailable("no C compiler for torch.compile")
        if job.device.type != "cuda":
            raise Unavailable("on a CPU its attention is a loop over sequences")
        super().__init__(job)
        torch._dynamo.config.recompile_limit = RECOMPILES
        self.forward = torch.compile(self.module, dynamic=True)


class TorchGraphs(TorchUnpadded):
    """Each number of rows captured as a CUDA graph: forward, backward, clipping and update."""

    name = "torch unpadded, graphs"
    capturable = True

    def __init__(self, job: Job):
        if job.device.type != "cuda":
            raise Unavailable("CUDA graphs need a GPU")
        self.start(job)

    def start(self, job: Job) -> None:
        """On any device: what a GPU is needed for comes with the steps."""
        super().__init__(job)
        self.multiple = 64 if job.data.longest >= 64 else 16
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Packed, Tensor]] = {}
        self.stream, self.pool = torch.cuda.Stream(job.device), torch.cuda.graph_pool_handle()

    def step(self, k: int) -> None:
        if k < EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                super().step(k)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        batch = self.packed(k)
        self.masters.set_rate(self.job.rate(k))
        if len(batch.tokens) not in self.graphs:
            self.graphs[len(batch.tokens)] = self.capture(moved(batch, self.job.device))
        graph, inputs, self.last = self.graphs[len(batch.tokens)]
        for name, x in batch.tensors().items():
            getattr(inputs, name).copy_(x, non_blocking=True)
        graph.replay()

    def capture(self, inputs: Packed) -> tuple[torch.cuda.CUDAGraph, Packed, Tensor]:
        """A step that has its inputs and its loss in memory of its own; nothing runs."""
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
            loss = self.backward(inputs)
            self.masters.step()
        self.masters.zero_grad()
        return graph, inputs, loss


PEERS = (  # in the order of their weight: where time is short, the last are left out
    *(Minift, Transformers, TorchUnpadded, TorchGraphs, TorchVarlen, MiniftEager),
    *(TransformersCompiled, TransformersGraphed, TransformersHalf, TorchCompiled),
    TransformersLiger,
)


def import_transformers():
    """transformers, offline, without this repository on the path: it would take our folder
    `kernels` for the package of that name."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != root]
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported: {error}") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def compiles() -> bool:
    """Whether torch.compile has what it needs: triton's launchers are compiled as well."""
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def bucket(width: int, longest: int) -> int:
    """The width that a compiled peer pads to: a multiple of 32 up to 128, then the longest."""
    return -(-width // 32) * 32 if width <= 128 else longest


def padded(examples, width: int, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids (B, width), mask or None where nothing is padded, labels (B,)."""
    sizes = torch.tensor([len(example.tokens) for example in examples])
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
    mask = torch.arange(width) < sizes[:, None]
    labels = torch.tensor([example.target for example in examples])
    needed = None if mask.all() else pinned(mask.long(), device)
    return pinned(ids, device), needed, pinned(labels, device)


def moved(batch: Packed, device: torch.device) -> Packed:
    """On the device; copies do not wait."""
    there = {n: x.to(device, non_blocking=True) for n, x in batch.tensors().items()}
    return batch._replace(**there)


def taken(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model, in fp32 on the CPU; it has none afterwards."""
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found
