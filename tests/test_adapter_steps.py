"""Steps of adapters on a GPU: the kernels learn as torch's operations do, in 16 bits over fp32
masters, and a captured step, which reads where virtual tokens stand from memory, has the bits of a
launched one."""

import sys

import pytest
import torch
from accuracy import DEVICE
from launches import launches_are_declared, recorded
from tape import Tape

from minift import Example, TrainConfig, train
from minift.adapters import Adapter, adapt, begin
from minift.batch import Batches
from minift.config import ModelConfig
from minift.kernels import attention, attention_backward
from minift.kernels.attention_prefix import attention_prefix
from minift.layers import Shadows
from minift.ops import TORCH, TRITON, Layout, Ops
from minift.scratch import random_model
from minift.tasks.classification import Classification
from minift.train import TrainState

METHODS = {
    "lora": dict(method="lora", lora_r=3, lora_dropout=0.3, lora_targets="q,v,down"),
    "prompt": dict(method="prompt", num_virtual_tokens=3, prompt_init="random"),
    "prefix": dict(method="prefix", num_virtual_tokens=3, prefix_projection=True)
    | dict(prompt_init="random"),
}
methods = pytest.mark.parametrize("method", METHODS)
LENGTHS = 5, 7, 6, 6  # two batches of a shape


@pytest.fixture
def tapes(monkeypatch):
    """Without a GPU, tapes are made for graphs."""
    if DEVICE == "cpu":
        trainer = sys.modules["minift.train"]
        monkeypatch.setattr(trainer, "why_eager", lambda config, *_: config.graph.strip("auto"))
        monkeypatch.setattr(trainer, "CudaGraphs", Tape)


def trained(method: str, ops: Ops, steps: int, **flags):
    """(losses, what is trained, last step) of a small BERT, all dropouts on."""
    raw = dict(model_type="bert", vocab_size=40, hidden_size=32, num_hidden_layers=1,
               num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
               type_vocab_size=2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
               initializer_range=0.3)  # fmt: skip
    model = random_model(ModelConfig.from_hf(raw), ("a", "b"), 0)
    config = TrainConfig(max_steps=steps, learning_rate=3e-2, **METHODS[method], **flags)
    adapt(model, Adapter.of(config, model.config))
    begin(model, config, None)
    model.to(DEVICE)
    state = TrainState.new(model, config, ops)
    task, rows = Classification(("a", "b")), [
        Example([2 + (7 * i + j) % 38 for j in range(n)], (), i % 2) for i, n in enumerate(LENGTHS)
    ]  # fmt: skip
    done = list(train(model, Batches(rows, 2), config, task, state, ops))
    numbers = [p.detach() for p in model.parameters() if p.requires_grad]
    return [(step.loss, step.grad_norm) for step in done], numbers, done[-1]


@methods
def test_captured_steps_have_the_bits_of_launched_ones(method, tapes):
    """Other rows, masks and rates in each; weights and losses to the bit."""
    captured = trained(method, TRITON, 4, dtype="bf16", graph="auto")
    launched = trained(method, TRITON, 4, dtype="bf16", graph="off")
    assert (captured[2].graphs, captured[2].eager) == (1, "")
    assert launched[2].graphs == 0
    assert captured[0] == launched[0]
    assert all(map(torch.equal, captured[1], launched[1]))
    assert len({loss for loss, _ in captured[0]}) == 4


@methods
def test_the_kernels_learn_as_torchs_operations_do(method):
    """The same masks, so the same losses and weights, to rounding in fp32."""
    found, wanted = (trained(method, ops, 3, dtype="fp32") for ops in (TRITON, TORCH))
    assert found[0] == [pytest.approx(pair, rel=1e-4) for pair in wanted[0]]
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_multiplied_in_16_bits_has_masters():
    """Weights of LoRA are cast once a step; prompts and prefixes, and what makes those, are fp32
    until they join the others."""
    for method, parts in (("lora", {"a", "b"}), ("prefix", set()), ("prompt", set())):
        model = random_model(ModelConfig.from_hf(dict(
            model_type="bert", vocab_size=40, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
        )), ("a", "b"), 0)  # fmt: skip
        adapt(model, Adapter.of(TrainConfig(**METHODS[method]), model.config))
        names = Shadows(model, torch.bfloat16).masters
        added = {n for n in names if ".lora." in n or ".prefix." in n or ".prompt." in n}
        assert {n.split(".lora.")[-1].split(".prefix.")[-1].split(".")[0] for n in added} == parts


@pytest.mark.parametrize("lengths", [(5, 7), (70, 3, 1, 130)], ids=str)
def test_a_prefix_needs_no_binary_that_attention_does_not(lengths):
    """Its kernels are attention's, at launches that its files declare and that are compiled."""
    layout = Layout.pack(lengths, sum(lengths) + 2).to(DEVICE)
    qkv = torch.zeros(layout.rows, 36, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    prefix = torch.zeros(20, 24, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with recorded(run=False) as seen:
        out = attention_prefix(qkv, prefix, layout, 12)
        torch.autograd.grad(out, (qkv, prefix), torch.zeros_like(out))
    names = set()
    for module in (attention, attention_backward):
        names |= launches_are_declared(seen, module)
    assert names
