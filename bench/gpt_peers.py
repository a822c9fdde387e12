"""Who trains a GPT side by side: minift, transformers in several ways, plain torch compiled.

As in `bench.peers`; blocks of tokens in place of texts, no padding, and micro-batches in a step,
whose losses are means of as many targets each: the step's loss is the mean of them. A peer that
runs out of memory in its first steps is made again with micro-batches of half the size.
"""

import numpy as np
import torch
from torch import Tensor, nn

import minift
from bench.peers import (
    Minift,
    MiniftEager,
    Transformers,
    TransformersCompiled,
    TransformersLiger,
    import_transformers,
    taken,
)
from bench.plain_gpt import PlainGPT
from bench.unpadded import pinned
from minift.names import hf_names, in_file, is_transposed
from minift.ops import Draw, ops_for
from minift.step import Gradients
from minift.tasks.language import LanguageModel
from minift.weights import read_config


class MiniftGPT(Minift):
    """As a user has it; all tokens in one call of `minift.train`."""

    def gradients(self, k: int) -> dict[str, Tensor]:
        job, device = self.job, self.job.device
        batches, task = next(job.data.batches.epoch(0, k)), LanguageModel()
        draw = Draw(torch.tensor(0, device=device), torch.tensor(0, device=device))
        gradients = Gradients(self.model, task, ops_for(device), job.dtype, draw, several=True)
        gradients.start(sum(map(task.weight, batches)))
        for batch in batches:
            gradients.add(batch.to(device))
        gradients.finish()
        found, config = taken(self.model), self.model.config
        return {name: in_file(p, name, config) for name, p in found.items()}


class GPTTransformers(Transformers):
    """As a careful user writes it: without the cache that only generation needs."""

    def load(self) -> nn.Module:
        transformers = import_transformers()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.job.folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        return model.to(self.job.device).train()

    def micro_batches(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Ids and targets (B, L) of each, on the device."""
        job = self.job

        def make(examples):
            columns = zip(*((e.tokens, e.target) for e in examples), strict=True)
            return [pinned(torch.from_numpy(np.stack(x)).long(), job.device) for x in columns]

        ids, targets = job.batches("blocks", make)[k]
        ids, targets = (x.to(job.device, non_blocking=True) for x in (ids, targets))
        size = job.data.batches.batch_size
        return list(zip(ids.split(size), targets.split(size), strict=True))

    def loss_of(self, ids: Tensor, targets: Tensor) -> Tensor:
        """() of a micro-batch. The model itself leaves out the last target, which is none."""
        return self.forward(input_ids=ids, labels=ids, use_cache=False).loss

    def backward(self, k: int) -> Tensor:
        batches = self.micro_batches(k)
        half = self.job.dtype != torch.float32
        losses = []
        for ids, targets in batches:
            with torch.autocast(self.job.device.type, torch.bfloat16, enabled=half):
                loss = self.loss_of(ids, targets)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def gradients(self, k: int) -> dict[str, Tensor]:
        self.backward(k)
        named, config = taken(self.model), read_config(self.job.folder)
        found = {ours: named[name] for ours, (name,) in hf_names(config).items()}
        return {n: p.T if is_transposed(n, p, config) else p for n, p in found.items()}


class GPTCompiled(TransformersCompiled, GPTTransformers):
    """The model compiled, for blocks of the only length there is."""


class GPTLiger(TransformersLiger, GPTTransformers):
    """With the kernels of Liger that fit a GPT-2: its LayerNorm."""


class Plain(GPTTransformers):
    """`bench.plain_gpt`, launched operation by operation."""

    name = "plain torch"

    def load(self) -> nn.Module:
        model, _ = minift.load_model(self.job.folder, head="lm")
        plain = PlainGPT(model.config)
        plain.load_state_dict(model.gpt.state_dict())
        return plain.to(self.job.device)

    def loss_of(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.forward(ids, targets)

    def gradients(self, k: int) -> dict[str, Tensor]:
        self.backward(k)
        config = read_config(self.job.folder)
        found = {f"gpt.{name}": p for name, p in taken(self.model).items()}
        return {name: in_file(p, name, config) for name, p in found.items()}


class PlainCompiled(TransformersCompiled, Plain):
    """Compiled as a whole."""

    name = "plain torch, compiled"
    seconds_a_layer = 2.0


GPT_PEERS = (  # in the order of their weight: where time or memory is short, the last are left out
    *(MiniftGPT, PlainCompiled, GPTTransformers, GPTCompiled, MiniftEager, GPTLiger, Plain),
)
