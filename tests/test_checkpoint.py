"""minift/checkpoint.py: a run that is killed and resumed has the bits of one that is not."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model, write_rows

from minift.batch import Batches, Example, collate
from minift.checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint
from minift.config import TrainConfig
from minift.data import read_rows
from minift.errors import InputError
from minift.ops import TRITON, Ops
from minift.saving import load
from minift.scratch import make_tokenizer, random_model
from minift.tasks.classification import Classification
from minift.train import TrainState, train

# Dies like kill -9 does, in the middle of an optimizer step: after some micro-batches of it.
VICTIM = """
import os, signal, sys
from minift.cli import main
from minift.tasks.classification import Classification
last, loss, seen = int(sys.argv.pop(1)), Classification.loss, 0
def counted(*args):
    global seen
    seen += 1
    if seen == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*args)
Classification.loss = counted
sys.exit(main())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_model(folder / "model", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    write_rows(folder / "train.csv", 50)
    write_rows(folder / "dev.csv", 20)
    return folder


def flags(files: Path, output: Path, *more: str) -> list[str]:
    """5 epochs of 4 steps: 50 rows in micro-batches of 5, 3 to a step, the last step short."""
    return [
        "train", "--quiet", "--model", str(files / "model"), "--train", str(files / "train.csv"),
        "--validation", str(files / "dev.csv"), "--output", str(output), "--batch_size", "5",
        "--gradient_accumulation_steps", "3", "--epochs", "5", "--save_steps", "3",
        "--eval_steps", "5", "--lr", "1e-3", "--save_total_limit", "0", "--threads", "1", *more,
    ]  # fmt: skip


def run(arguments: list[str], die_at: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", VICTIM, str(die_at), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    out = load_file(folder / "model.safetensors")
    moments = folder / "optimizer.safetensors"
    return {**out, **(load_file(moments) if moments.exists() else {})}


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The run that nobody kills."""
    output = tmp_path_factory.mktemp("whole") / "out"
    done = run(flags(files, output))
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout.split("\n")[-2])


@pytest.fixture(scope="module")
def resumed(files, tmp_path_factory):
    """The same run, killed twice. Micro-batches: 10 an epoch, in steps of 3, 3, 3, 1. The first
    kill is in the second of step 6 (middle of an epoch), the next, after the resume from step 3,
    in the first of step 11."""
    output = tmp_path_factory.mktemp("resumed") / "out"
    assert run(flags(files, output), die_at=15).returncode == -signal.SIGKILL
    assert [p.name for p in checkpoints(output)] == ["checkpoint-3"]
    resume = flags(files, output, "--resume_from_checkpoint", "auto")
    assert run(resume, die_at=18).returncode == -signal.SIGKILL
    assert checkpoints(output)[-1].name == "checkpoint-9"
    done = run(resume)
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout.split("\n")[-2])


def test_killed_twice_and_resumed_is_bitwise_the_run_that_was_not(whole, resumed):
    for name in ("", "checkpoint-9", "checkpoint-12", "checkpoint-20"):
        assert_same_bits(resumed[0] / name, whole[0] / name)
    timed = ("runtime", "per_second", "peak", "output")
    mine, theirs = (
        {k: v for k, v in summary.items() if not any(t in k for t in timed)}
        for _, summary in (resumed, whole)
    )
    assert mine == theirs


def test_log_of_a_resumed_run_has_every_step_once(resumed):
    lines = (resumed[0] / "metrics.jsonl").read_text().split("\n")
    found = [json.loads(line) for line in lines if line]
    assert [line["step"] for line in found if "grad_norm" in line] == list(range(1, 21))


def test_kill_at_any_moment_leaves_a_loadable_checkpoint(files, tmp_path):
    """A real SIGKILL from outside, wherever the process happens to be."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "minift", *flags(files, output, "--save_steps", "1")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(checkpoints(output)) < 4:
        time.sleep(0.001)  # the run needs the core that this would wait on
    process.send_signal(signal.SIGKILL)
    process.wait()
    model, _ = load(files / "model", ("neg", "pos"))
    load_checkpoint(checkpoints(output)[-1], model, TrainState.new(model, TrainConfig()))


def test_dropout_is_on_in_these_runs(files, whole, tmp_path):
    """Otherwise the tests above would not see a mask that depends on a stream."""
    again = run(flags(files, tmp_path / "out", "--seed", "1"))
    assert again.returncode == 0
    a, b = tensors(whole[0]), tensors(tmp_path / "out")
    assert not all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def trained(files):
    """A model, its state after two steps, and the way to go on."""
    model, tokenizer = load(files / "model", ("neg", "pos"))
    examples = Classification(("neg", "pos")).encode(read_rows(files / "train.csv"), tokenizer)
    config, batches = TrainConfig(max_steps=4, learning_rate=1e-3), Batches(examples, 8)
    state = TrainState.new(model, config)
    steps = train(model, batches, config, state=state)
    next(steps), next(steps)
    return model, tokenizer, state, lambda m, s: list(train(m, batches, config, state=s))


def test_moments_come_back_bit_for_bit(trained, files, tmp_path):
    model, tokenizer, state, finish = trained
    path = save_checkpoint(tmp_path, model, tokenizer, state, {"kept": [1, 2.5]})
    other, _ = load(files / "model", ("neg", "pos"))
    fresh = TrainState.new(other, TrainConfig(max_steps=4, learning_rate=1e-3))
    assert load_checkpoint(path, other, fresh)["run"] == {"kept": [1, 2.5]}
    assert fresh.step == 2
    finish(model, state), finish(other, fresh)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


ADAM = {"step", "exp_avg", "exp_avg_sq"}
OPTIMIZERS = {  # flags, and what is kept of each parameter
    "adamw": ({"optim": "adamw"}, ADAM),
    "adam": ({"optim": "adam"}, ADAM),
    "sgd": ({"optim": "sgd"}, {"momentum_buffer"}),
    "plain sgd": ({"optim": "sgd", "momentum": 0.0}, set()),
}


def two_steps(
    files: Path, output: Path, flags: dict, ops: Ops | None = None, size: int = 8
) -> tuple:
    """A run that stops after two steps of five or so; its configuration, data, and checkpoint."""
    model, tokenizer = load(files / "model", ("neg", "pos"))
    examples = Classification(("neg", "pos")).encode(read_rows(files / "train.csv"), tokenizer)
    config = TrainConfig(**{"max_steps": 5, "learning_rate": 1e-2} | flags)
    batches = Batches(examples, size)
    state = TrainState.new(model, config, ops)
    steps = train(model, batches, config, state=state, ops=ops)
    next(steps), next(steps)
    return config, batches, save_checkpoint(output, model, tokenizer, state, {})


@pytest.mark.parametrize(("flags", "kept"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_resumes_to_the_bits_of_the_run_that_went_on(files, tmp_path, flags, kept):
    config, batches, path = two_steps(files, tmp_path, flags)
    whole, resumed = (load(files / "model", ("neg", "pos"))[0] for _ in range(2))
    names = {f"{kind}.{name}" for kind in kept for name, _ in whole.named_parameters()}
    assert load_file(path / "optimizer.safetensors").keys() == names
    list(train(whole, batches, config))
    state = TrainState.new(resumed, config)
    load_checkpoint(path, resumed, state)
    assert len(list(train(resumed, batches, config, state=state))) == 3
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_kernels_resume_to_the_same_bits_in_bf16(files, tmp_path):
    """16-bit leaves are made of the loaded masters; these are in the file once, as the model."""
    config, batches, path = two_steps(files, tmp_path, {"dtype": "bf16", "max_steps": 3}, TRITON, 1)
    whole, resumed = (load(files / "model", ("neg", "pos"))[0] for _ in range(2))
    names = {f"{kind}.{name}" for kind in ADAM for name, _ in whole.named_parameters()}
    assert load_file(path / "optimizer.safetensors").keys() == names
    losses = [step.loss for step in train(whole, batches, config, ops=TRITON)]
    state = TrainState.new(resumed, config, TRITON)
    load_checkpoint(path, resumed, state)
    rest = [step.loss for step in train(resumed, batches, config, state=state, ops=TRITON)]
    assert rest == losses[2:]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def a_step(model, state: TrainState) -> None:
    """One step of any model, on numbers that its weights alone decide."""
    examples = [Example([5, 6, 7, 8], (), 1), Example([9, 5], (), 0)]
    if model.config.head == "lm":
        examples = [replace(e, target=[*e.tokens[1:], 3]) for e in examples]
    out = model(collate(examples, [0, 1]))
    loss = (out.logits() if model.config.head == "lm" else out).square().sum()
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1


@pytest.mark.parametrize("kind", ["gpt2 lm", "gpt2 classifier", "bert lm"])
def test_models_of_every_head_resume_to_the_same_bits(tmp_path, kind):
    """Weights that a file holds the other way round and in fewer rows, moments as they are here."""
    family, head = kind.split()
    raw = {"bert": tiny_config(type_vocab_size=1), "gpt2": dict(model_type="gpt2", n_embd=8)}[
        family
    ]
    raw |= dict(n_layer=2, n_head=2, n_positions=16) if family == "gpt2" else {}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw | {"vocab_size": 300}))
    tokenizer, config = make_tokenizer(path, None, ["some text"] * 3, False, 0, head)
    models = [random_model(config, ("a", "b"), seed) for seed in (0, 1)]
    whole, resumed = (TrainState.new(m, TrainConfig(learning_rate=1e-2)) for m in models)
    a_step(models[0], whole)
    saved = save_checkpoint(tmp_path, models[0], tokenizer, whole, {})
    load_checkpoint(saved, models[1], resumed)
    for _ in range(2):
        a_step(models[0], whole), a_step(models[1], resumed)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    table = models[0].get_parameter(config.kind.body + "embeddings.word.weight")
    assert not table[config.vocab_size :].any()
    again, _ = load(saved, head=head)
    assert again.config == replace(models[0].config, raw={})


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [("adamw", "sgd"), ("sgd", "adamw"), ("plain sgd", "sgd"), ("adamw", "plain sgd")],
)
def test_a_checkpoint_of_another_optimizer_is_refused(files, tmp_path, saved, wanted):
    """SGD without momentum keeps nothing, which is no licence to begin another one afresh."""
    _, _, path = two_steps(files, tmp_path, OPTIMIZERS[saved][0])
    model, _ = load(files / "model", ("neg", "pos"))
    with pytest.raises(InputError, match="the optimizer's parameters are others"):
        load_checkpoint(path, model, TrainState.new(model, TrainConfig(**OPTIMIZERS[wanted][0])))


def test_frozen_parameters_have_no_moments(files, tmp_path):
    model, tokenizer = load(files / "model", ("neg", "pos"))
    config = TrainConfig(freeze="embeddings,layers:0-0", max_steps=1)
    state = TrainState.new(model, config)
    examples = Classification(("neg", "pos")).encode(read_rows(files / "train.csv"), tokenizer)
    list(train(model, examples, config, state=state))
    names = load_file(
        save_checkpoint(tmp_path, model, tokenizer, state, {}) / "optimizer.safetensors"
    )
    assert names
    assert not any("embeddings" in name or "layers.0." in name for name in names)


def test_a_checkpoint_of_other_parameters_is_refused(trained, files, tmp_path):
    model, tokenizer, state, _ = trained
    path = save_checkpoint(tmp_path, model, tokenizer, state, {})
    other = TrainState.new(model, TrainConfig(freeze="embeddings"))
    with pytest.raises(InputError, match="the optimizer's parameters are others"):
        load_checkpoint(path, model, other)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(trained, tmp_path, file):
    model, tokenizer, state, _ = trained
    path = save_checkpoint(tmp_path, model, tokenizer, state, {})
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=file):
        load_checkpoint(path, model, state)


def test_prune_keeps_the_newest(trained, tmp_path):
    model, tokenizer, state, _ = trained
    for step in (2, 10, 9):
        state.step = step
        save_checkpoint(tmp_path, model, tokenizer, state, {})
    (tmp_path / "checkpoint-99").mkdir()  # incomplete: counts for nothing
    prune(tmp_path, 0)
    assert [p.name for p in checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-10",
    ]
    prune(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
