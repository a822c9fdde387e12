"""Language modelling: documents to blocks, what is predicted, what is measured."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_one_line, call, settings_kept

from minift.batch import Batches, Example, collate
from minift.config import ModelConfig, TrainConfig
from minift.gpt import GPTLanguageModel
from minift.layers import init_weights
from minift.ops import TORCH
from minift.tasks.language import Blocks, LanguageModel
from minift.train import train as train_model


def stream_of(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end, 0 before each and at the end; and where they begin."""
    parts = [[0, *ids] for ids in documents]
    begins = np.cumsum([0] + [len(part) for part in parts])[:-1]
    return np.array([*(i for part in parts for i in part), 0]), begins


documents = st.lists(st.lists(st.integers(1, 50), max_size=9), min_size=1, max_size=6)


@given(documents, st.integers(1, 12), st.integers(0, 11))
def test_every_token_is_predicted_once_from_its_own_document(documents, size, shift):
    """Whatever the size and the shift: the targets are all tokens but the first end, blocks are as
    many as unshifted ones, and a sequence never goes on into another document."""
    stream, begins = stream_of(documents)
    blocks = Blocks.cut(stream, begins, size, shift % size)
    assert len(blocks) == math.ceil((len(stream) - 1) / size)
    assert sorted(t for b in blocks for t in b.target) == sorted(stream[1:])
    for block in blocks:
        assert sum(block.lengths) == len(block.tokens) == len(block.target) <= size
        assert all(block.lengths)
        end = 0
        for length in block.lengths:
            tokens, target = (x[end : end + length].tolist() for x in (block.tokens, block.target))
            assert tokens[1:] == target[:-1]
            assert 0 not in tokens[1:]  # a document begins a sequence
            end += length


def model_of(size: int, **changes) -> GPTLanguageModel:
    facts = dict(vocab_size=51, max_len=size, n_types=0, dim=16, n_layer=2, n_head=2, ffn_dim=32)
    facts |= dict(activation="gelu_tanh", norm_eps=1e-5, embedding_dropout=0.1, hidden_dropout=0.1)
    facts |= dict(attention_dropout=0.1, classifier_dropout=0.1, init_std=0.3, head="lm")
    model = GPTLanguageModel(ModelConfig(**facts | {"family": "gpt2"} | changes))
    init_weights(model, 0.3, seed=1)
    return model


DOCUMENTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]


def loss_of(model, blocks) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    batch = collate(blocks, range(len(blocks)), train=True)
    loss = LanguageModel().loss(model(batch), batch, TORCH)
    loss.backward()
    return loss.item(), model.gpt.embeddings.word.weight.grad.clone()


def test_no_document_sees_another():
    """The loss and its gradient of packed documents are those of the documents one by one."""
    stream, begins = stream_of(DOCUMENTS)
    model = model_of(32)
    packed, grad = loss_of(model, Blocks.cut(stream, begins, 32))
    alone = [loss_of(model, Blocks.cut(*stream_of([ids]), 32)) for ids in DOCUMENTS]
    assert packed == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    torch.testing.assert_close(grad, sum(g for _, g in alone), rtol=1e-4, atol=1e-5)


def test_documents_of_a_block_draw_masks_of_their_own():
    """No two tokens of a step have the same key, though positions begin anew in each document."""
    blocks = Blocks.cut(*stream_of(DOCUMENTS), 12)
    batch = collate(blocks, range(len(blocks)), first=3, train=True)
    keys = batch.key[: sum(batch.layout.lengths)].tolist()
    assert len(set(keys)) == len(keys)
    assert (batch.positions == 0).sum() > len(blocks)


def test_the_gradient_is_that_of_the_mean():
    """Of the loss of all tokens, whatever their number: the scale of a step is applied once."""
    blocks = Blocks.cut(*stream_of(DOCUMENTS), 32)
    model = model_of(32, embedding_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0)
    total, _ = loss_of(model, blocks)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    count = sum(len(block.target) for block in blocks)
    (step,) = train_model(model, blocks, TrainConfig(max_steps=1), LanguageModel())
    assert step.loss == pytest.approx(total / count, rel=1e-5)
    assert step.grad_norm == pytest.approx(norm / count, rel=1e-4)


def test_an_epoch_cuts_elsewhere_and_again_the_same():
    """Batches vary with the epoch alone, and a step in the middle is what it was."""
    stream, begins = stream_of(DOCUMENTS * 8)
    task = LanguageModel(size=8)
    blocks = Blocks.cut(stream, begins, 8)
    batches = Batches(blocks, 4, seed=5, vary=task.vary(blocks, 5))
    first = [task.vary(blocks, 5)(epoch)[0].tokens.tolist() for epoch in range(4)]
    assert len({tuple(tokens) for tokens in first}) > 1
    epochs = [[b.tokens.tolist() for (b,) in batches.epoch(e)] for e in (0, 1, 1)]
    assert epochs[0] != epochs[1] == epochs[2]
    assert [b.tokens.tolist() for (b,) in batches.epoch(1, start=3)] == epochs[1][3:]


def test_metrics_are_of_the_text():
    """Bits a byte and nats a character count what the tokens stand for; the ends of documents are
    no text."""
    sizes = np.array([[0, 0], [3, 1], [2, 2]])
    examples = [Example(np.array([0, 1]), (), np.array([1, 2])), Example([0], (), np.array([0]))]
    counts = [LanguageModel(sizes).size_of(collate(examples, [i])) for i in range(2)]
    assert counts == [(5, 3), (0, 0)]
    found = LanguageModel(sizes).metrics(np.array([[4.0, 2, *counts[0]], [1.0, 1, *counts[1]]]))
    assert found["loss"] == pytest.approx(5 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(5 / 3))
    assert found["bits_per_byte"] == pytest.approx(5 / math.log(2) / 5)
    assert found["loss_per_character"] == pytest.approx(5 / 3)
    assert LanguageModel(sizes).metrics(np.array([[math.nan, 2, 0, 0]]))["loss"] is None


def test_evaluation_is_the_mean_over_all_tokens():
    """Whatever the batches: the sum over the tokens of the loss of each."""
    stream, begins = stream_of(DOCUMENTS)
    model, task = model_of(32), LanguageModel()
    blocks = Blocks.cut(stream, begins, 5)
    outputs = task.outputs(model, blocks, torch.float32, None)
    batch = collate(blocks, range(len(blocks)))
    logits = model(batch).logits()
    want = torch.nn.functional.cross_entropy(logits, batch.targets)
    assert task.metrics(outputs)["loss"] == pytest.approx(want.item(), rel=1e-5)


SMALL = ('model_type = "gpt2"\nn_embd = 16\nn_layer = 1\nn_head = 2\nn_positions = 16\n'
         "vocab_size = 300\n")  # fmt: skip
TEXT = "".join(f"the {word} cat sat on mat {i}\n" for i in range(30) for word in ("big", "old"))


@pytest.fixture
def train(capsys, tmp_path):
    """Runs `train --task lm` from nothing on a file."""
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*more, data=tmp_path / "text.txt", output="out"):
        with settings_kept():
            return call(
                capsys, "train", "--task", "lm", "--config_name", tmp_path / "small.toml",
                "--train", data, "--output", tmp_path / output, "--lr", 1e-2, "--threads", 1,
                "--batch_size", 4, *more,
            )  # fmt: skip

    return run


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_has_the_same_bits(train, tmp_path):
    """Where the blocks of an epoch begin is a function of seed and epoch: no state is lost."""
    flags = ("--max_steps", 10, "--save_steps", 3, "--gradient_accumulation_steps", 2)
    whole = train(*flags)
    assert whole.status == 0, whole.err
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-10")
    again = train(*flags, "--resume_from_checkpoint", "auto")
    assert "checkpoint-9" in again.err
    assert again.summary["eval_loss"] == whole.summary["eval_loss"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_perplexity_falls_and_the_best_model_is_of_the_least_loss(train, tmp_path):
    """Of a run that learns, then goes astray at a rate that is too high."""
    result = train("--epochs", 12, "--save_total_limit", 1)
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    losses = [event["eval_loss"] for event in lines if "eval_runtime" in event]
    assert result.summary["eval_loss"] == min(losses) < losses[0]
    assert result.summary["eval_perplexity"] == pytest.approx(math.exp(min(losses)))
    assert "perplexity" in result.err


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.csv", "folder", "marked.txt"])
def test_documents_of_all_kinds_of_files(train, tmp_path, name):
    """A row, a file or a text between marks is a document; some of them validate."""
    texts = [TEXT[i * 180 : (i + 1) * 180] for i in range(8)]
    path = tmp_path / name
    if name == "docs.jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    elif name == "docs.csv":
        rows = "".join(f'"{t}"\n' for t in texts)
        path.write_text("body\n" + rows)
    elif name == "folder":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i}.txt").write_text(text)
    else:
        path.write_text("<|endoftext|>".join(texts))
    column = ("--text_column", "body") if name == "docs.csv" else ()
    result = train("--max_steps", 1, *column, data=path, output=name + "-out")
    assert result.status == 0, result.err
    assert "train 7 of 1,260 characters, validation 1 of 180 characters" in result.err


def test_what_cannot_be_a_language_model(train, tmp_path):
    """Nothing to read, too little, an encoder."""
    (tmp_path / "empty.txt").write_text(" \n")
    assert_one_line(train(data=tmp_path / "empty.txt"), "empty.txt")
    assert_one_line(train(data=tmp_path / "none.txt"), "none.txt")
    (tmp_path / "small.toml").write_text('model_type = "bert"\nhidden_size = 16\n'
        "num_hidden_layers = 1\nnum_attention_heads = 2\nintermediate_size = 32\n"
        "max_position_embeddings = 64\n")  # fmt: skip
    assert_one_line(train(), "--task lm", "--task mlm")


def test_a_table_of_unusual_columns_is_not_guessed_at(train, tmp_path):
    """The text could be any of them: one line says how to name it."""
    (tmp_path / "two.csv").write_text("".join(f"{i},the cat sat {i}\n" for i in range(9)))
    assert_one_line(train(data=tmp_path / "two.csv"), "two.csv", "--text_column")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text(TEXT)
    assert_one_line(train(data=tmp_path / "notes"), "notes", ".txt", "none")


def test_texts_on_both_sides_are_told(train, tmp_path):
    """They make results look better than they are."""
    result = train("--max_steps", 1, "--validation", tmp_path / "text.txt")
    assert "WARNING: 1 of 1 validation rows stand in the training rows too" in result.err


def test_another_model_configuration_is_another_run(train, tmp_path):
    """A resume is refused when the file that describes the model has changed."""
    assert train("--max_steps", 4, "--save_steps", 2).status == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "small.toml").write_text(SMALL + "resid_pdrop = 0.5\n")
    again = train("--max_steps", 4, "--save_steps", 2, "--resume_from_checkpoint", "auto")
    assert again.status == 2
    assert "small.toml has changed" in again.err


def test_a_loss_that_is_not_finite_has_a_line():
    """And no number of 300 digits stands for a perplexity."""
    task = LanguageModel()
    assert task.metrics(np.zeros((1, 4)))["loss"] is None
    assert task.headline({"loss": None, "perplexity": None}) == "loss not finite"
    assert len(task.headline({"loss": 600.0, "perplexity": math.exp(600)})) < 60


def test_a_wanted_length_wins_over_the_folders(capsys, train, tmp_path):
    """A model trained in short blocks can be trained in longer ones."""
    assert train("--max_steps", 1, "--max_seq_length", 8).status == 0
    words = ("--model", tmp_path / "out", "--train", tmp_path / "text.txt", "--output",
             tmp_path / "next", "--max_seq_length", 16, "--max_steps", 1)  # fmt: skip
    with settings_kept():
        again = call(capsys, "train", "--task", "lm", *words)
    assert "in blocks of 16" in again.err
