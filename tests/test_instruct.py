"""Responses to prompts: what is read, what is learned, what is left out."""

import json

import numpy as np
import pytest
import torch
from tiny import assert_one_line, call, settings_kept

from minift.batch import collate
from minift.config import RunConfig
from minift.errors import InputError
from minift.ops import IGNORE_INDEX, TORCH
from minift.scratch import make_tokenizer, random_model
from minift.tasks.instruct import Instruct, dialogues, split_by_prompt
from minift.tasks.task import File

SMALL = 'model_type = "gpt2"\nn_embd = 16\nn_layer = 2\nn_head = 2\nn_positions = 64\n'
PROMPT, RESPONSE = "English: {en}\nChinese: ", "{zh}"
PAIRS = [("hello", "你好"), ("good morning", "早上好"), ("hello", "您好"), ("bye", "再见")]


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture
def table(tmp_path):
    """Four records as CSV."""
    lines = ["en,zh", *(f"{en},{zh}" for en, zh in PAIRS * 5)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "pairs.csv"


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL + "vocab_size = 300\n")
    return tmp_path / "small.toml"


def tokenizer_of(small, texts, length=64):
    return make_tokenizer(small, None, texts, False, length, "lm")


def test_only_the_response_and_its_end_are_learned(table, small):
    """Targets of a prompt are ignored; those of a response are its tokens and the end of a text,
    each at the row of the token before it."""
    rows, blank = dialogues(str(table), PROMPT, RESPONSE)
    tokenizer, _ = tokenizer_of(small, Instruct.texts(rows))
    example = Instruct().encode(rows, tokenizer)[0]
    prompt, response = (tokenizer.ids([text])[0] for text in (rows[0].text, rows[0].response))
    assert (blank, rows[0].text, rows[0].response) == (0, "English: hello\nChinese: ", "你好")
    assert list(example.tokens) == [*prompt, *response]
    assert list(example.target) == [IGNORE_INDEX] * (len(prompt) - 1) + [*response, tokenizer.eos]


def test_the_loss_is_that_of_the_listed_rows(table, small):
    """The last layer computes rows with a target alone: the loss and every gradient are those of
    all rows under a mask."""
    rows, _ = dialogues(str(table), PROMPT, RESPONSE)
    tokenizer, config = tokenizer_of(small, Instruct.texts(rows))
    model = random_model(config, (), seed=1)
    examples = Instruct().encode(rows[:4], tokenizer)
    batch = collate(examples, range(4), train=True)
    assert len(batch.at) < 0.8 * batch.layout.rows
    Instruct().loss(model(batch), batch, TORCH).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for e in examples:
        one = collate([e], [0])
        x = model.gpt(one)[: len(e.tokens)]
        logits = x @ model.gpt.embeddings.word.weight[: config.vocab_size].T
        target = torch.tensor(list(e.target))
        total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    total.backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)


def test_chat_learns_every_answer(tmp_path, small):
    """All turns of the assistant, and nothing that others say; what follows the last is dropped."""
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
        {"role": "user", "content": "?"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (row,), _ = dialogues(str(path), "{prompt}", "{response}")
    before = "system: be kind\nuser: hi\nassistant: hello"
    assert row.prompt() == before + "<|endoftext|>user: bye\nassistant:"
    assert row.response == " see you"
    tokenizer, _ = tokenizer_of(small, ["".join(t for t, _ in row.parts)])
    (example,) = Instruct().encode([row], tokenizer)
    learned = [t for t in example.target if t != IGNORE_INDEX]
    assert tokenizer.decode(learned) == " hello see you"
    assert learned.count(tokenizer.eos) == 2


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"messages": [{"role": "user", "content": "hi"}]}', "the assistant"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": ["hi"]}', "role and content"),
        ('{"prompt": "", "response": "x"}', "expected a prompt"),
        ('{"prompt": "x", "response": " "}', "expected a response in some record"),
        ('{"promt": "x", "response": "y"}', "did you mean 'promt'"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, content, part):
    """One line each, with the file and its line."""
    path = tmp_path / "bad.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(InputError, match="bad") as caught:
        dialogues(str(path), "{prompt}\n", "{response}")
    assert part in str(caught.value)


def test_what_is_too_long_is_counted(table, small):
    """Cut responses, records without a response left, and an error when none has one."""
    rows, _ = dialogues(str(table), PROMPT, RESPONSE)
    full, _ = tokenizer_of(small, Instruct.texts(rows))
    lengths = [len(e.tokens) for e in Instruct().encode(rows, full)]
    prompts = [len(ids) for ids in full.ids([row.text for row in rows])]

    def encoded(limit, how="cut"):
        full.max_length = limit
        said = Instruct().encode_file(File(RunConfig(overflow=how), "train", "f"), rows, full)
        notices = []
        while True:
            try:
                notices.append(next(said).text)
            except StopIteration as done:
                return done.value, notices

    limit = sorted(prompts)[len(prompts) // 2] + 1
    examples, notices = encoded(limit)
    empty = sum(p > limit for p in prompts)
    cut = sum(n > limit for n in lengths) - empty
    assert len(examples) == len(rows) - empty
    assert max(len(e.tokens) for e in examples) <= limit
    assert f"{cut} of {len(rows)} records" in notices[0]
    assert (f"{empty} of {len(rows)} records" in notices[-1]) == (empty > 0)
    with pytest.raises(InputError, match="no response is left"):
        encoded(min(prompts) - 1)
    with pytest.raises(InputError, match="csv:2: longer than"):
        encoded(min(lengths) - 1, "error")


def test_a_prompt_is_on_one_side_only(table):
    """Records with the same prompt stay together; a function of the seed."""
    rows, _ = dialogues(str(table), PROMPT, RESPONSE)
    splits = [split_by_prompt(rows, 0.34, seed) for seed in range(8)]
    for train, validation in splits:
        assert len(train) + len(validation) == len(rows)
        assert not {r.text for r in train} & {r.text for r in validation}
        assert train
        assert validation
    assert len({v[0].text for _, v in splits}) > 1
    assert split_by_prompt(rows, 0.34, 3) == splits[3]


def train(capsys, tmp_path, table, small, *more):
    return call(
        capsys, "train", "--task", "instruct", "--config_name", small, "--train", table,
        "--prompt_template", PROMPT, "--response_template", RESPONSE, "--output", tmp_path / "out",
        "--batch_size", 4, "--lr", 1e-2, "--threads", 1, *more,
    )  # fmt: skip


def test_the_command_line_learns_and_resumes(capsys, tmp_path, table, small):
    """Loss falls; a run that goes on has the bits of one that was never interrupted; the folder
    remembers task and templates, and eval uses them."""
    whole = train(capsys, tmp_path, table, small, "--epochs", 8, "--save_steps", 3)
    assert whole.status == 0, whole.err
    assert "first prompt" in whole.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["task"] == "instruct"
    assert config["template"] == [PROMPT, RESPONSE]
    losses = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    losses = [event["eval_loss"] for event in losses if "eval_runtime" in event]
    assert losses[-1] < losses[0]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = train(capsys, tmp_path, table, small, "--epochs", 8, "--save_steps", 3,
                  "--resume_from_checkpoint", "auto")  # fmt: skip
    assert again.summary["eval_loss"] == whole.summary["eval_loss"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    found = call(capsys, "eval", "--model", tmp_path / "out", "--data", table)
    assert found.status == 0, found.err
    assert np.isfinite(found.summary["eval_perplexity"])


def test_bad_input_is_one_line(capsys, tmp_path, table, small):
    """Before anything is trained: a missing field, an encoder, a model that only labels."""
    result = train(capsys, tmp_path, table, small, "--prompt_template", "{english}")
    assert_one_line(result, "pairs.csv:2", "no field 'english'", "en, zh")
    small.write_text('model_type = "bert"\nhidden_size = 16\nnum_hidden_layers = 1\n'
                     "num_attention_heads = 2\nintermediate_size = 32\n"
                     "max_position_embeddings = 64\n")  # fmt: skip
    assert_one_line(train(capsys, tmp_path, table, small), "--task instruct", "gpt2")


@pytest.mark.parametrize(
    "flag", [("--class_weights", "balanced"), ("--label_smoothing_factor", 0.1),
             ("--label_column", "zh"), ("--mlm_probability", 0.2)]
)  # fmt: skip
def test_settings_of_other_tasks_are_refused(capsys, tmp_path, table, small, flag):
    """None is silently ignored."""
    assert_one_line(train(capsys, tmp_path, table, small, *flag), flag[0], "--task instruct")
