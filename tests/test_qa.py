"""Extractive question answering: targets, the loss of spans, answers, and runs of the command."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import assert_one_line, call, settings_kept, tiny_model

from minift.answer_spans import NOWHERE
from minift.batch import collate
from minift.config import RunConfig
from minift.errors import InputError
from minift.ops import TORCH, TRITON, Layout
from minift.saving import load
from minift.squad import BESIDE, Question
from minift.tasks.qa import QuestionAnswering, by_sequence
from minift.weights import save_model


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


def question(context, answer, text="what was good ?", name="q"):
    """A row whose answer is found in its context; None: nobody says; "": there is none."""
    start = context.index(answer) if answer else -1
    answers = None if answer is None else (answer,) if answer else ()
    return Question(
        name, text, context, answers, start, start + len(answer or ""), where=f"f:{name}"
    )


LENGTHS = (0, 3, 7, 0, 64, 70, 0)


@pytest.mark.parametrize("slack", [0, 500])
def test_by_sequence_and_its_gradient(slack):
    """Every row at its place, slack rows nowhere, however many; gradients are exact gathers."""
    layout = Layout.pack(LENGTHS, sum(LENGTHS) + slack)
    logits = torch.randn(layout.rows, 2, dtype=torch.float64, requires_grad=True)
    table = by_sequence(logits, layout)
    at, seeds = 0, torch.randn_like(table)
    (grad,) = torch.autograd.grad(table, logits, seeds)
    for i, n in enumerate(LENGTHS):
        for half in (0, 1):
            line = i + half * len(LENGTHS)
            assert torch.equal(table[line, :n], logits[at : at + n, half])
            assert (table[line, n:] == NOWHERE).all()
            assert torch.equal(grad[at : at + n, half], seeds[line, :n])
        at += n
    assert (grad[at:] == 0).all()


@pytest.fixture
def loaded(tmp_path):
    return load(tiny_model(tmp_path / "m"), head="span")


CONTEXT = "the meal was bad and the book was good and the day was fine and we saw a film"


def examples_of(tokenizer, *rows, stride=4):
    return [
        window
        for windows in QuestionAnswering(stride).encode(rows, tokenizer)
        for window in windows
    ]


def test_targets_are_the_answer(loaded):
    """The tokens of a target spell the answer; windows without the whole of it have none; all
    have the question, and together they hold the context."""
    _, tokenizer = loaded
    tokenizer.max_length = 20
    row = question(CONTEXT, "book was good")
    windows = examples_of(tokenizer, row)
    assert len(windows) > 1
    held = [w for w in windows if w.target]
    assert held
    for window in held:
        b, e = window.target >> 16, window.target & 0xFFFF
        assert tokenizer.decode(window.tokens[b : e + 1]) == "book was good"
        places = window.offsets[[b - window.first, e - window.first]]
        assert CONTEXT[places[0, 0] : places[1, 1]] == "book was good"
    whole, pair = tokenizer.backend.encode(row.question, CONTEXT), windows[0]
    n = len(pair.tokens) - 1
    assert list(pair.tokens[:n]) == whole.ids[:n]  # as the tokenizer makes a pair
    assert list(pair.types) == whole.type_ids[: n + 1]
    assert all(len(w.tokens) <= 20 and w.tokens[-1] == whole.ids[-1] for w in windows)


def test_an_answer_inside_a_token_widens_to_it(loaded):
    """Of "boo" in "book" the token is learned."""
    _, tokenizer = loaded
    row = replace(question(CONTEXT, "book"), stop=CONTEXT.index("book") + 3, answers=("boo",))
    (window,) = [w for w in examples_of(tokenizer, row) if w.target]
    b, e = window.target >> 16, window.target & 0xFFFF
    assert tokenizer.decode(window.tokens[b : e + 1]) == "book"


def test_long_questions_are_cut_and_small_limits_refused(loaded):
    """To half of the limit; where no context fits beside it, one line says so."""
    _, tokenizer = loaded
    row = question(CONTEXT, "", "what " * 30)
    windows = examples_of(tokenizer, row)
    assert all(w.cut and w.first == 1 + tokenizer.max_length // 2 + 1 for w in windows)
    tokenizer.max_length = 5
    with pytest.raises(InputError, match="raise --max_seq_length"):
        examples_of(tokenizer, row)


@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
def test_the_loss_is_that_of_each_sequence(loaded, ops):
    """Value and gradient against fp64, sequence by sequence, with empty ones and one that nobody
    labelled; micro-batches add up to the whole."""
    if torch.cuda.is_available():
        pytest.skip("CPU tensors and the interpreter")
    _, tokenizer = loaded
    rows = question(CONTEXT, "good"), question(CONTEXT, ""), question("a film", None)
    examples = examples_of(tokenizer, *rows)
    batch = collate(examples, range(len(examples)), train=True, sequences=8)
    logits = torch.randn(len(batch.tokens), 2, requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    want, ends = 0.0, batch.layout.cu_seqlens.tolist()
    for b, e, t in zip(ends, ends[1:], batch.targets.tolist(), strict=False):
        if t >= 0:
            logp = wide[b:e].log_softmax(0)
            want = want - (logp[t >> 16, 0] + logp[t & 0xFFFF, 1]) / 2
    want.backward()
    task = QuestionAnswering()
    loss = task.loss(logits, batch, ops)
    loss.backward()
    assert task.weight(batch) == sum(e.target >= 0 for e in examples) == len(examples) - 1
    torch.testing.assert_close(loss.double(), want)
    torch.testing.assert_close(logits.grad.double(), wide.grad)


def test_measured_and_predicted_answers_agree(loaded):
    """What is measured of a question is the score of what is predicted for it; loss too."""
    model, tokenizer = loaded
    rows = [question(CONTEXT, a, name=str(i)) for i, a in enumerate(("good", "", "saw a film"))]
    task = QuestionAnswering(4, 5, null=True)
    model.config = task.noted(model.config)
    examples = examples_of(tokenizer, *rows)
    outputs = task.outputs(model, examples, torch.float32, None)
    task = task.tuned(outputs)
    model.config = task.noted(model.config)
    answers = list(task.predict(model, tokenizer, rows))
    exact = [a["answer"] == (r.answers[0] if r.answers else "") for a, r in zip(answers, rows)]  # noqa: B905
    measured = task.metrics(outputs)
    assert measured["exact_match"] == pytest.approx(np.mean(exact))
    for answer in answers:
        assert CONTEXT[max(answer["start"], 0) : max(answer["end"], 0)] == answer["answer"]
        assert 0 < answer["score"] <= 1
    batch = collate(examples, range(len(examples)))
    loss = task.loss(model(batch), batch, TORCH) / task.weight(batch)
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_only_choices_are_answered(loaded):
    """Short and long, in whichever window they stand; what is measured is what is predicted."""
    model, tokenizer = loaded
    tokenizer.max_length = 20  # several windows
    task = QuestionAnswering(4, 1)  # tokens of a free span: choices may have more
    places = [CONTEXT.index(text) for text in ("meal", "saw a film")]
    choices = (places[0], places[0] + 4), (places[1], places[1] + 10)
    row = replace(question(CONTEXT, "saw a film"), choices=choices)
    (answer,) = task.predict(model, tokenizer, [row])
    assert (answer["start"], answer["end"]) in choices
    assert answer["answer"] == CONTEXT[answer["start"] : answer["end"]]
    outputs = task.outputs(model, examples_of(tokenizer, row), torch.float32, None)
    assert task.metrics(outputs)["exact_match"] == (answer["answer"] == "saw a film")
    each = [next(task.predict(model, tokenizer, [replace(row, choices=(c,))])) for c in choices]
    assert [(a["start"], a["end"], a["score"]) for a in each] == [(*c, 1.0) for c in choices]
    whole = replace(row, choices=((0, len(CONTEXT)),))  # no window holds it: any span then
    free = replace(row, choices=())
    assert next(task.predict(model, tokenizer, [whole])) == next(
        task.predict(model, tokenizer, [free])
    )


def test_no_answer_by_hand():
    """Of three questions the threshold takes the one that gains most: two have an answer."""
    # loss windows has exact f1 empty difference
    outputs = np.array(
        [[1, 1, 1, 1, 1, 0, -3], [2, 1, 0, 0, 0, 1, 1], [3, 2, 1, 0, 0.5, 0, 0.0]], np.float64
    )
    task = QuestionAnswering(null=True).tuned(outputs)
    assert task.null_threshold == 0.5
    metrics = task.metrics(outputs)
    assert metrics == pytest.approx(
        dict(loss=1.5, exact_match=2 / 3, f1=2.5 / 3, has_answer_exact_match=0.5,
             has_answer_f1=0.75, no_answer_exact_match=1, no_answer_f1=1)
    )  # fmt: skip
    assert QuestionAnswering().metrics(outputs)["f1"] == pytest.approx(0.5)


def write(path, n):
    """Questions whose answer is the word after "was"; every fourth has none."""
    words, things = ("good", "bad", "fine", "poor"), ("film", "book", "meal", "day")
    lines = []
    for i in range(n):
        thing, word, other = things[i % 4], words[i // 4 % 4], things[(i + 1) % 4]
        context = f"we saw the {thing} {i} and it was {word} today"
        asked = other if i % 4 == 3 else thing
        answer = [] if i % 4 == 3 else [{"text": word, "answer_start": context.index(word)}]
        row = {"id": f"q{i}", "question": f"what was the {asked}", "context": context}
        lines.append(json.dumps({**row, "answers": answer}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_split_is_by_context():
    rows = [question(f"book {i % 5}", "book", name=str(i)) for i in range(20)]
    train, validation, _ = QuestionAnswering.split(rows, RunConfig(validation_split=0.3), 0)
    assert not {r.context for r in train} & {r.context for r in validation}
    assert (len(train), len(validation)) == (12, 8)


def test_train_eval_predict(tmp_path, capsys):
    """A run learns, eval measures what the run did, predict answers each row in order; a run that
    resumes in the middle of an epoch has the same bits."""
    model, data = (
        tiny_model(tmp_path / "m", max_position_embeddings=64),
        write(tmp_path / "a.jsonl", 64),
    )
    words = ["train", "--task", "qa", "--model", model, "--train", data, "--validation", data]
    words += ["--threads", 1, "--batch_size", 8, "--lr", 5e-3, "--epochs", 2, "--save_steps", 3]
    words += ["--save_total_limit", 0]
    done = call(capsys, *words, "--output", tmp_path / "one")
    assert done.status == 0, done.err
    assert done.summary["eval_f1"] > 0.5
    other = tmp_path / "two"
    done_in = call(capsys, *words, "--output", other)
    assert done_in.status == 0
    for old in other.glob("checkpoint-*"):
        if int(old.name.split("-")[1]) > 11:
            shutil.rmtree(old)
    again = call(capsys, *words, "--output", other, "--resume_from_checkpoint", "auto")
    assert again.status == 0, again.err
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two")]
    assert weights[0] == weights[1]
    measured = call(capsys, "eval", "--model", tmp_path / "one", "--data", data)
    assert measured.summary["eval_f1"] == pytest.approx(done.summary["eval_f1"])


def test_what_is_left_out_is_told(tmp_path, capsys):
    """Too many useless rows stop the run in one line, with their places."""
    data = write(tmp_path / "a.jsonl", 8)
    bad = {"question": "what", "context": "we saw", "answer": "queen"}
    data.write_text(data.read_text() + json.dumps(bad) + "\n")
    words = ["train", "--task", "qa", "--model", tiny_model(tmp_path / "m"), "--train", data]
    result = call(capsys, *words, "--output", tmp_path / "out")
    assert_one_line(result, "a.jsonl:9", "1 have an answer that is not in the context")


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_an_empty_file_is_one_line(tmp_path, capsys, command):
    """Of a language of questions or of another, trained on, measured or answered."""
    model, data = tiny_model(tmp_path / "m"), tmp_path / "a.jsonl"
    data.write_text("\n")
    if command == "train":
        words = ["--task", "qa", "--train", data, "--validation", data, "--output", tmp_path / "o"]
    else:
        trained, _ = load(model, head="span")
        trained.config = QuestionAnswering().noted(replace(trained.config, task="qa"))
        save_model(trained, model)
        words = ["--data", data]
    for more in ([], ["--task_name", "record"]):
        result = call(capsys, command, "--model", model, *words, *more)
        assert_one_line(result, "a.jsonl: expected rows")


def write_record(path, n, answers=True):
    """ReCoRD as SuperGLUE publishes it: the film that was good is asked for, by a query whose
    answer stands twice."""
    lines = []
    for i in range(n):
        names = ("film", "book", "meal", "day")
        good, bad = names[i % 4], names[(i + 1) % 4]
        text = f"we saw the {good} {i} , it was good . the {bad} was bad\n@highlight\nthe {good}"
        found = [(text.index(good), good), (text.rindex(good), good), (text.index(bad), bad)]
        places = [{"start": at, "end": at + len(name) - 1} for at, name in found]
        right = [{**place, "text": good} for place in places[:2]]
        query = {"idx": 100 + i, "query": "the @placeholder was good"}
        query |= {"answers": right} if answers else {}
        passage = {"text": text, "entities": places}
        record = {"source": "Daily mail", "passage": passage, "qas": [query], "idx": i}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_record_by_its_name(tmp_path, capsys):
    """Its published files train, are measured, and a test is answered: ids and entities are the
    file's; f1 chooses the best model. A row whose answer stands elsewhere is left out and told."""
    model = tiny_model(tmp_path / "m", max_position_embeddings=64)
    data = write_record(tmp_path / "train.jsonl", 64)
    first = json.loads(data.read_text().splitlines()[0])
    first["qas"][0]["answers"][0]["start"] += 1
    data.write_text(data.read_text() + json.dumps(first) + "\n")
    test = write_record(tmp_path / "test.jsonl", 8, answers=False)
    words = ["train", "--task_name", "ReCoRD", "--model", model, "--output", tmp_path / "out"]
    words += ["--train", data, "--validation", data, "--threads", 1, "--batch_size", 8]
    done = call(capsys, *words, "--lr", 5e-3, "--epochs", 2, "--max_dropped", 0.02)
    assert done.status == 0, done.err
    (left_out, *_) = (tmp_path / "out/dropped.jsonl").read_text().splitlines()
    assert "train.jsonl:65" in left_out
    assert BESIDE in left_out
    assert json.loads((tmp_path / "out/run.json").read_text())["run"]["task"] == "qa"
    assert done.summary["eval_f1"] > 0.8
    named = ["--model", tmp_path / "out", "--task_name", "record"]
    measured = call(capsys, "eval", *named, "--data", data, "--max_dropped", 0.02)
    assert measured.summary["eval_f1"] == pytest.approx(done.summary["eval_f1"])
    answers = call(capsys, "predict", *named, "--data", test).answers
    assert [a["id"] for a in answers] == [str(100 + i) for i in range(8)]
    assert all(a["answer"] in ("film", "book", "meal", "day") for a in answers)
    refused = call(capsys, "eval", *named[:3], "rte", "--data", data)
    assert_one_line(refused, "--task_name rte is classification")
