"""minift/step.py: a captured step is the launched one, whatever changes from step to step."""

import importlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import DEVICE
from launches import recorded
from tape import Tape
from tiny import tiny_model, write_rows

from minift.adapters import ADAPTERS, Adapter, adapt
from minift.batch import Batches, Example
from minift.config import ModelConfig, TrainConfig
from minift.data import read_rows
from minift.ops import IGNORE_INDEX, TORCH, TRITON, Draw
from minift.saving import load
from minift.scratch import random_model
from minift.step import PAGE, Gradients, OptimizerStep, Page
from minift.tasks.classification import Classification
from minift.tasks.language import LanguageModel
from minift.train import TrainState, train, why_eager

LABELS = ("neg", "pos")
TASK = Classification(LABELS, (0.5, 2.0), 0.1)
trainer = importlib.import_module("minift.train")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_model(
        folder / "model", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
        num_hidden_layers=1, intermediate_size=16,
    )  # fmt: skip
    write_rows(folder / "train.csv", 64)
    return folder


@pytest.fixture
def tapes(monkeypatch):
    """Without a GPU, tapes are made for graphs."""
    if DEVICE == "cpu":
        monkeypatch.setattr(trainer, "why_eager", lambda config, *_: config.graph.strip("auto"))
        monkeypatch.setattr(trainer, "CudaGraphs", Tape)


def fresh(files, n):
    """A model, and n examples of 5 tokens and more."""
    model, tokenizer = load(files / "model", LABELS)
    rows = read_rows(files / "train.csv")[:n]
    examples = Classification(LABELS).encode(rows, tokenizer)
    cut = [Example(e.tokens[: 5 + i], e.types[: 5 + i], e.target) for i, e in enumerate(examples)]
    return model.to(DEVICE), cut


def trained(
    files,
    graph,
    steps=4,
    task=TASK,
    ops=TRITON,
    accumulation=1,
    batches=None,
    between=None,
    **flags,
):
    """(losses and norms, weights and moments, last step) of a few steps, dropout on."""
    model, examples = fresh(files, 4)
    config = TrainConfig(
        max_steps=steps, learning_rate=1e-2, warmup_steps=2, max_grad_norm=0.5, dtype="bf16",
        graph=graph, **flags,
    )  # fmt: skip
    if config.method in ADAPTERS:
        with_adapter(model, config)
    state = TrainState.new(model, config, ops)
    batches = batches or Batches(examples, 2, accumulation)
    done = []
    for step in train(model, batches, config, task, state, ops):
        done.append(step)  # they are read when all is over
        if between:
            between(step, model)
    numbers = [(step.loss, step.grad_norm) for step in done]
    kept = [state.optimizer.state[p] for group in state.optimizer.param_groups
            for p in group["params"]]  # fmt: skip
    tensors = [*model.parameters(), *(x for s in kept for _, x in sorted(s.items()))]
    return numbers, tensors, done[-1]


def with_adapter(model, config):
    """An adapter of random numbers."""
    adapt(model, Adapter.of(config, model.config))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if re.search(r"\.(lora|prompt|prefix)\.", name):
            p.data.copy_(torch.empty(p.shape).normal_(0, 0.5, generator=generator))
    model.to(DEVICE)


def same_bits(a, b):
    (numbers, tensors, _), (others, other_tensors, _) = a, b
    assert numbers == others
    assert all(map(torch.equal, tensors, other_tensors))


# ---------------------------------------------------------------- captured, and not


@pytest.fixture(scope="module")
def launched(files):
    return trained(files, "off")


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
def test_captured_steps_have_the_bits_of_launched_ones(files, launched, tapes, flags):
    """Steps of three epochs, launched, captured and replayed: rates that rise and fall, other rows,
    other masks. Losses, norms, weights and moments are equal bit for bit; also when layers are
    computed again in the backward pass."""
    captured = trained(files, "auto", **flags)
    assert captured[2].graphs == 1
    assert captured[2].eager == ""
    assert launched[2].graphs == 0
    assert launched[2].eager
    same_bits(captured, launched)


@pytest.mark.parametrize("method", ADAPTERS)
def test_captured_steps_of_adapters_too(files, tapes, method):
    """Virtual tokens lie where the batch says, and that is in its memory: a graph is good for other
    rows of its shape."""
    flags = {"lora": {"lora_targets": "all", "lora_dropout": 0.2}}
    flags = {"method": method, **flags.get(method, {"num_virtual_tokens": 3})}
    captured, launched = (trained(files, graph, steps=3, **flags) for graph in ("auto", "off"))
    assert captured[2].graphs == 1
    same_bits(captured, launched)


def tokens_of(listed: bool) -> list[Example]:
    """Texts of equal length, with other targets in each; `listed`: of the second half alone."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(4):
        tokens = rng.integers(1, 30, 9).astype(np.int32)
        target = np.roll(tokens, -1)
        target[: 4 + i % 2 if listed else i % 2] = IGNORE_INDEX
        found.append(Example(tokens, (), target))
    return found


@pytest.mark.parametrize("listed", [False, True])
def test_captured_steps_of_a_language_model_too(tapes, monkeypatch, listed):
    """Targets of all rows, or of listed ones, whose number changes within a shape: the loss takes
    its scale from the device, and the tied table its gradient from both ends."""
    if not listed:
        monkeypatch.setattr("minift.batch.DENSE", 0.5)

    def run(graph):
        facts = dict(
            model_type="gpt2", vocab_size=30, n_embd=32, n_layer=1, n_head=2, n_positions=16
        )
        model = random_model(ModelConfig.from_hf(facts), (), seed=1, head="lm").to(DEVICE)
        config = TrainConfig(max_steps=3, learning_rate=1e-2, dtype="bf16", graph=graph)
        state = TrainState.new(model, config, TRITON)
        batches = Batches(tokens_of(listed), 2)
        done = list(train(model, batches, config, LanguageModel(), state, TRITON))
        return [(s.loss, s.grad_norm) for s in done], list(model.parameters()), done[-1]

    captured = run("auto")
    assert captured[2].graphs == 1
    assert captured[2].eager == ""
    same_bits(captured, run("off"))
    assert len({loss for loss, _ in captured[0]}) == 3


def test_captured_micro_steps_have_the_bits_of_launched_ones(files, tapes):
    """Two micro-batches in a step: a graph for them, and one for the update."""
    flags = {"accumulation": 2, "freeze": "embeddings", "steps": 3}
    captured = trained(files, "auto", **flags)
    assert captured[2].graphs == 2
    same_bits(captured, trained(files, "off", **flags))


def test_gradients_that_were_left_over_are_no_part_of_a_step(files, launched, tapes):
    """Somebody else's backward pass between two steps: a capture would add them in every replay."""

    def leave(step, model):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1000)

    same_bits(trained(files, "auto", between=leave), launched)


def test_replays_drop_anew(files, tapes):
    """The same rows in every step, at a rate of nothing: only masks change, and so do losses."""
    _, examples = fresh(files, 2)
    numbers, _, state = trained(files, "auto", 4, batches=Batches(examples, 2), lr_rules="*=1e-30")
    assert state.graphs == 1
    assert len({loss for loss, _ in numbers}) == 4


# ---------------------------------------------------------------- the plan of a step


def plans(files, ops=TRITON):
    """What two steps of one shape launch: other rows, other step, other rates."""
    model, examples = fresh(files, 4)
    config = TrainConfig(dtype="bf16")
    state = TrainState.new(model, config, ops)
    draw = Draw(torch.tensor(1, device=DEVICE), torch.tensor(0, device=DEVICE))
    gradients = Gradients(model, TASK, ops, torch.bfloat16, draw, state.shadows, state.tables)
    take, tape, found = OptimizerStep(gradients, state.optimizer), Tape(), []
    batches = list(Batches(examples, 2).epoch(0))
    assert len({batch.shape for (batch,) in batches}) == 1
    for i, micro_batches in enumerate(batches):
        with recorded(run=False):  # nothing need be computed to know what would run
            take(i, micro_batches)
        (batch,) = micro_batches
        tape.capture(lambda b=batch: take._whole(b))
        found.append(tape.plan)
    return found


@pytest.mark.skipif(DEVICE == "cuda", reason="the graph itself is there")
def test_two_steps_of_a_shape_have_one_plan(files):
    """The same kernels in the same order, grids, options and Python numbers."""
    first, second = plans(files)
    assert first == second
    kernels = {entry[1] for entry in first if entry[0].startswith("minift.kernels.")}
    assert {"_short_kernel", "_add_norm_kernel", "update_kernel", "_draw_kernel"} <= kernels


@pytest.mark.skipif(DEVICE == "cuda", reason="the graph itself is there")
@pytest.mark.parametrize("where", ["kernel", "torch"])
def test_a_python_number_that_changes_is_seen(files, tapes, where):
    """An operation that counts its calls, and lets the count into a launch: plans differ, and a
    captured run is not the launched one."""
    calls = []

    def drop(x, dropout):
        calls.append(1)
        if where == "torch":
            return TRITON.drop(x, dropout) * (1 + len(calls) / 100)
        return TRITON.drop(x, replace(dropout, p=0.3 + len(calls) / 100))

    ops = replace(TRITON, drop=drop)
    first, second = plans(files, ops)
    assert first != second
    if where == "torch":
        return
    calls.clear()
    captured = trained(files, "auto", 3, ops=ops)
    calls.clear()
    assert captured[0] != trained(files, "off", 3, ops=ops)[0]


def test_a_tape_runs_nothing_while_it_records():
    """As a capture: what a block writes is written by the replay, every time."""
    if DEVICE == "cuda":
        pytest.skip("tapes are for CPUs")
    x = torch.zeros(3)
    replay = Tape().capture(lambda: x.add_(torch.ones(3) * 2))
    assert x.tolist() == [0, 0, 0]
    replay(), replay()
    assert x.tolist() == [4, 4, 4]


# ---------------------------------------------------------------- where it cannot be


def test_what_cannot_be_captured_is_launched_and_says_why(files, launched, tapes):
    """A loss that looks at its value waits for the device: the run goes on without graphs, to the
    same bits."""

    class Curious(Classification):
        def loss(self, logits, batch, ops, report=None):
            total = super().loss(logits, batch, ops, report)
            return total * (2.0 if total.item() > 1e9 else 1.0)

    curious = Curious(LABELS, TASK.class_weights, TASK.label_smoothing)
    captured = trained(files, "auto", task=curious)
    assert captured[2].graphs == 0
    assert captured[2].eager
    same_bits(captured, launched)


def test_why_eager(files):
    """What is known beforehand, in words for a person."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    model, _ = fresh(files, 1)

    def why(device=cuda, ops=TRITON, **flags):
        optimizer = TrainState.new(model, TrainConfig(**flags), ops).optimizer
        return why_eager(TrainConfig(**flags), ops, optimizer, device)

    assert why() == ""
    assert "off" in why(graph="off")
    assert "triton" in why(ops=TORCH)
    assert "SGD" in why(optim="sgd")
    assert "cpu" in why(cpu)
    hooked = TrainState.new(model, TrainConfig(), TRITON).optimizer
    hooked.register_step_post_hook(lambda *_: None)
    assert "hooks" in why_eager(TrainConfig(), TRITON, hooked, cuda)


# ---------------------------------------------------------------- gradients and numbers


def test_accumulated_gradients_are_rounded_once(files):
    """The leaf's gradient is the rounded fp32 sum of those of four micro-batches."""
    model, examples = fresh(files, 4)
    state = TrainState.new(model, TrainConfig(dtype="bf16"), TRITON)
    draw = Draw(torch.tensor(1, device=DEVICE), torch.tensor(0, device=DEVICE))
    task, leaves = Classification(LABELS), state.shadows.leaves
    (micro_batches,) = Batches(examples, 1, 4).epoch(0)
    micro_batches = [batch.to(DEVICE) for batch in micro_batches]

    def added(several, batches):
        gradients = Gradients(
            model, task, TRITON, torch.bfloat16, draw, state.shadows, state.tables, several
        )
        gradients.start(4.0)
        for batch in batches:
            gradients.add(batch)
        gradients.finish()
        grads = {name: leaf.grad.clone() for name, leaf in leaves.items()}
        gradients.clear()
        return grads

    whole = added(True, micro_batches)
    parts = [added(False, [batch]) for batch in micro_batches]
    for name, grad in whole.items():
        total = sum(part[name].float() for part in parts)
        assert torch.equal(grad, total.bfloat16()), name


def test_accumulation_keeps_no_gradient_for_the_next_step(files):
    """Twice the same step from the same weights: the same gradients."""
    model, examples = fresh(files, 4)
    draw = Draw(torch.tensor(1, device=DEVICE), torch.tensor(0, device=DEVICE))
    gradients = Gradients(model, TASK, TORCH, torch.float32, draw, several=True)
    grads = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.grad_norm = torch.zeros((), device=DEVICE)
    optimizer.register_step_pre_hook(
        lambda *_: grads.append([p.grad.clone() for p in model.parameters()])
    )
    take = OptimizerStep(gradients, optimizer)
    (micro_batches,) = Batches(examples, 1, 4).epoch(0)
    for _ in range(2):
        take(0, micro_batches)
    assert all(map(torch.equal, *grads))
    assert any(g.any() for g in grads[0])


def test_numbers_stay_readable():
    """Steps that are kept are read long after, each page at once."""
    device = torch.device(DEVICE)
    pages = [Page(device), Page(device)]
    for i, page in enumerate(pages):
        for k in range(PAGE):
            page.write(torch.tensor(float(k), device=device), torch.tensor(float(i), device=device))
    assert [pages[0].read(k) for k in (3, PAGE - 1)] == [[3, 0], [PAGE - 1, 0]]
    assert pages[1].read(0) == [0, 1]
    late = Page(device)
    late.write(*[torch.tensor(5.0, device=device)] * 2)
    assert late.read(0) == [5, 5]
    late.write(*[torch.tensor(6.0, device=device)] * 2)
    assert late.read(1) == [6, 6]


@pytest.mark.parametrize("layers", [1, 3])
def test_checkpointing_computes_layers_again(tmp_path, files, layers):
    """Their kernels run twice in a step, and of what they keep for backward nothing is left: only
    what stands before the first and after the last layer."""
    model, _ = load(tiny_model(tmp_path, num_hidden_layers=layers), LABELS)
    _, examples = fresh(files, 2)
    ((batch,),) = Batches(examples, 2).epoch(0)
    draw = Draw(torch.tensor(1, device=DEVICE), torch.tensor(0, device=DEVICE))
    launched, kept = [], []
    for checkpointing in (False, True):
        gradients = Gradients(
            model.to(DEVICE), TASK, TRITON, torch.bfloat16, draw, checkpointing=checkpointing
        )
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.shape) or x, lambda x: x
        )
        with recorded(run=False) as seen, hooks:
            gradients.add(batch.to(DEVICE))
        launched.append([launch.kernel for launch in seen].count("_gelu_kernel"))
        kept.append(len(saved))
        gradients.clear()
    assert launched == [layers, 2 * layers]
    assert kept[0] - kept[1] > 10 * layers


def test_a_sequence_too_long_for_the_model_is_met_before_the_step(files, tapes):
    """Where a replay would look at no length: after two steps of the same shape, of 20 and 20."""

    class InOrder(Batches):
        def order(self, epoch):
            return np.arange(len(self.examples))

    model, _ = fresh(files, 1)
    examples = [Example([5] * n, [0] * n, 1) for n in (20, 20, 20, 20, 5, 40)]
    steps = train(model, InOrder(examples, 2), TrainConfig(dtype="bf16"), ops=TRITON)
    assert [next(steps).graphs for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="expected at most 32 tokens, got 40"):
        next(steps)
