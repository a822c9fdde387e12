"""train, eval, predict and inspect on a tiny model: what they print and what they leave behind."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    VOCABULARY,
    WORDS,
    assert_one_line,
    call,
    contents,
    rows,
    settings_kept,
    tiny_model,
    words,
    write_rows,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minift import demo
from minift.cli import main
from minift.demo_data import DemoData
from minift.run import Progress, Run
from minift.tasks.classification import Classification

MINIFT = [sys.executable, "-m", "minift"]


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """train.csv of 80 rows, validation.jsonl of 24."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.csv", 80)
    write_rows(folder / "validation.jsonl", 24)
    return folder


@pytest.fixture(scope="session")
def trained(model, data, tmp_path_factory):
    """The output folder of a run of 3 epochs, which learns the task."""
    output = tmp_path_factory.mktemp("out") / "trained"
    with settings_kept():
        flags = ("--epochs", 5, "--metric_for_best_model", "loss", "--quiet")
        assert main(words(model, data, output, *flags)) == 0
    return output


@pytest.fixture
def train(capsys, model, data, tmp_path):
    """Runs `train` into tmp_path/out and returns the result; it must succeed."""

    def train(*more, output="out", data=data):
        result = call(capsys, *words(model, data, tmp_path / output, *more))
        assert result.status == 0, result.err
        return result

    return train


def events(output: Path, key: str) -> list[dict]:
    """The lines of metrics.jsonl that have `key`, but for the summary, which is the last."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines[:-1] if key in line]


def checkpoints(output: Path) -> set[str]:
    return {path.name for path in output.glob("checkpoint-*")}


# ---------------------------------------------------------- the whole way


def test_train_learns_and_says_so(train, tmp_path):
    result = train("--epochs", 5)
    summary = result.summary
    assert len(result.out.splitlines()) == 1
    assert summary["eval_accuracy"] == 1
    assert {
        *("eval_loss", "eval_n", "eval_accuracy", "eval_majority_accuracy", "eval_mcc", "eval_f1"),
        *("eval_precision", "eval_recall", "eval_f1_macro", "eval_f1_micro", "eval_f1/pos"),
        *("train_loss", "train_runtime", "train_tokens_per_second", "train_samples_per_second"),
        *("epoch", "steps", "best_metric", "best_step", "early_stopped", "peak_rss_mib"),
        "output_dir",
    } <= set(summary)
    assert (summary["steps"], summary["epoch"]) == (50, 5)
    assert summary["output_dir"] == str(tmp_path / "out")
    assert summary["early_stopped"] is False
    assert 0 < summary["train_loss"] < math.log(2) + 0.3
    assert re.search("^rows: train 80, validation 24; .*labels", result.err, re.M)
    assert "\n  labels     pos 40, neg 40\n  first row  'the film was good" in result.err
    for part in ("loaded", "head.weight", "trained"):
        assert part in result.err
    assert "epoch 1.00  step 10  validation: loss" in result.err
    assert "step 50/50" in result.err
    assert "true \\ predicted" in result.err
    assert "WARNING" not in result.err


def test_the_files_of_a_run(trained):
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(trained)) == files | {
        *("run.json", "metrics.jsonl", "checkpoint-40", "checkpoint-50"),
    }
    for name in checkpoints(trained):
        assert set(os.listdir(trained / name)) == files | {"optimizer.safetensors", "state.json"}
    facts = json.loads((trained / "run.json").read_text())
    assert facts["config"]["learning_rate"] == 5e-3
    assert facts["labels"] == ["neg", "pos"]
    assert (facts["threads"], facts["device"]) == (1, "cpu")
    assert [len(sha) for sha in facts["files"].values()] == [64, 64]
    assert set(facts["versions"]) == {"minift", "torch", "tokenizers", "numpy"}


def test_the_log_is_one_object_a_line(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    steps = [line for line in parsed if "grad_norm" in line]
    assert [line["step"] for line in steps] == list(range(1, 51))
    assert set(steps[0]) == {
        *("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"),
    }
    assert [line["learning_rate"] for line in steps] == pytest.approx(
        [5e-3 * (1 - i / 50) for i in range(50)]
    )
    evaluations = [line for line in parsed if "eval_runtime" in line]
    assert [line["step"] for line in evaluations] == [10, 20, 30, 40, 50]
    assert parsed[-1]["best_step"] in (10, 20, 30, 40, 50)
    assert sum(line["loss"] for line in steps) / 50 == pytest.approx(parsed[-1]["train_loss"])
    tokens = sum(line["tokens"] for line in steps)
    rate = parsed[-1]["train_tokens_per_second"]
    assert rate * parsed[-1]["train_runtime"] == pytest.approx(tokens)


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    """NaN is not JSON; a reader of the log would stop there."""
    run = SimpleNamespace(output=tmp_path, progress=Progress())
    Run.log(run, {"a": math.nan, "b": -math.inf, "c": 1.5, "d": None})
    line = (tmp_path / "metrics.jsonl").read_bytes()
    assert line == b'{"a": null, "b": null, "c": 1.5, "d": null}\n'
    assert run.progress.log_bytes == len(line)


def test_eval_measures_what_train_measured(capsys, trained, data):
    result = call(capsys, "eval", "--model", trained, "--data", data / "validation.jsonl")
    assert (result.status, len(result.out.splitlines())) == (0, 1)
    summary = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {k: v for k, v in summary.items() if k.startswith("eval_")}
    measured = result.summary
    assert measured.pop("eval_runtime") > 0
    assert measured == pytest.approx(expected, abs=1e-6)
    assert "true \\ predicted" in result.err


def test_the_output_is_a_model_of_transformers(capsys, trained):
    texts = [text for text, _ in rows(12)] + ["the DAY was Great!", "unknown words, too"]
    answers = call(capsys, "predict", "--model", trained, "--quiet", *texts).answers
    peer = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    with torch.no_grad():
        logits = peer(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert [peer.config.id2label[i] for i in logits.argmax(-1).tolist()] == [
        answer["label"] for answer in answers
    ]
    for answer, scores in zip(answers, logits.softmax(-1).tolist(), strict=True):
        assert list(answer["scores"].values()) == pytest.approx(scores, abs=2e-6)


def test_inspect_accounts_for_every_parameter(capsys, trained):
    result = call(capsys, "inspect", trained)
    assert (result.status, result.err) == (0, "")
    size = sum(t.numel() for t in load_file(trained / "model.safetensors").values())
    out = " ".join(result.out.split())
    assert "bert, 2 layers, width 32, 2 heads of 16, MLP 64 (gelu_erf)" in out
    assert f"vocabulary WordPiece, {len(VOCABULARY)} tokens of 200 rows" in out
    assert "texts are cut at 32 tokens of 32 positions" in out
    assert "labels 2: neg, pos" in out
    assert f"loaded {size:,} 33 tensors" in out
    assert f"trained {size:,} of {size:,}" in out
    groups = result.out[result.out.index("group  ") :].splitlines()[1:6]
    assert [line.split()[0] for line in groups] == [
        *("embeddings", "layers:0", "layers:1", "pooler", "head"),
    ]
    assert sum(int(line.split()[1].replace(",", "")) for line in groups) == size


def test_inspect_of_a_model_without_a_head(capsys, model):
    result = call(capsys, "inspect", model)
    assert result.status == 0
    assert "none: not a classifier yet" in result.out
    assert "head.weight, head.bias" in result.out


# ---------------------------------------------------------------- predict


def test_predict_keeps_the_order_and_answers_each_text(capsys, trained):
    """Texts are answered by length inside; 300 of them are more than one block."""
    made = [text for text, _ in rows(300)]
    result = call(capsys, "predict", "--model", trained, *made)
    assert [answer["text"] for answer in result.answers] == made
    assert [answer["label"] for answer in result.answers] == [label for _, label in rows(300)]
    assert result.err.startswith("300 texts in ")
    for answer in result.answers[:5]:
        assert list(answer) == ["text", "label", "score", "scores"]
        assert answer["score"] == max(answer["scores"].values())
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "the film was good\n\nthe film was bad\r\n"),
        ("a", "the film was good\nthe film was bad"),
        ("a.csv", "id,text\n1,the film was good\n2,the film was bad\n"),
        ("a.tsv", "the film was good\npos\tx\n".replace("\npos\tx", "\nthe film was bad")),
        ("a.jsonl", '{"text": "the film was good", "label": 3}\n{"text": "the film was bad"}\n'),
    ],
)
def test_predict_reads_files(capsys, trained, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    result = call(capsys, "predict", "--model", trained, "--data", tmp_path / name)
    assert [(a["text"], a["label"]) for a in result.answers] == [
        ("the film was good", "pos"),
        ("the film was bad", "neg"),
    ]


def test_predict_takes_a_column(capsys, trained, tmp_path):
    (tmp_path / "a.csv").write_text("text,other\nthe film was bad,the film was good\n")
    flags = ("--data", tmp_path / "a.csv", "--text-column", "other")
    assert call(capsys, "predict", "--model", trained, *flags).answers[0]["label"] == "pos"


def test_unicode_goes_through(capsys, trained):
    texts = ["電影 was good ☃", "über, naïve 👩‍👩‍👧", "a\u2028b\u0085c", 'a "quote"\\']
    answers = call(capsys, "predict", "--model", trained, *texts).answers
    assert [a["text"] for a in answers] == texts


def test_text_is_not_escaped(capsys, trained):
    """So that grep finds it."""
    assert '"text": "café"' in call(capsys, "predict", "--model", trained, "café").out


def test_texts_and_a_file_are_too_much(capsys, trained, tmp_path):
    result = call(capsys, "predict", "--model", trained, "--data", tmp_path / "a.txt", "text")
    assert_one_line(result, "expected texts or --data, got both")


def test_bytes_that_are_no_utf8_as_an_argument(capsys, trained):
    """The shell hands over Latin-1; Python holds such bytes as surrogates."""
    result = call(capsys, "predict", "--model", trained, "good", os.fsdecode(b"caf\xe9"))
    assert_one_line(result, "text:2: expected UTF-8, got 'caf\\udce9'")


@pytest.mark.parametrize("command", ["predict", "eval"])
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (-1, "expected max_seq_length >= 0, got -1"),
        (4, "expected max_seq_length 5 or more, got 4"),
        (33, "max_seq_length 33 is more than the model's 32 positions"),
    ],
)
def test_a_length_limit_that_cannot_be(capsys, trained, data, command, limit, message):
    flags = ("--data", data / "validation.jsonl", "--max_seq_length", limit)
    assert_one_line(call(capsys, command, "--model", trained, *flags), message)


def test_a_length_limit_cuts(capsys, trained):
    flags = ("predict", "--model", trained, "--max_seq_length", 5)
    answers = call(capsys, *flags, "the film was bad", "the film was good", "the film was").answers
    assert len({answer["score"] for answer in answers}) == 1


@pytest.fixture
def stdin(monkeypatch, tmp_path):
    """Puts bytes into stdin."""

    def put(content: bytes):
        (tmp_path / "stdin").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", open(tmp_path / "stdin"))  # noqa: SIM115

    yield put
    if sys.stdin is not None:
        sys.stdin.close()


def test_predict_reads_stdin(capsys, trained, stdin):
    stdin("the film was good\n\nthe film was bad ☃\r\n  \nthe film was fine".encode())
    result = call(capsys, "predict", "--model", trained)
    assert [a["text"] for a in result.answers] == [
        "the film was good",
        "the film was bad ☃",
        "the film was fine",
    ]


def test_a_long_stdin_comes_in_chunks(capsys, trained, stdin):
    """Chunks of 64 KiB end in the middle of lines and of characters."""
    texts = [f"☃ good {'é' * (1000 + i)} {i}" for i in range(90)]
    content = "\n".join(texts).encode()
    assert len(content) > 2 << 16
    stdin(content)
    result = call(capsys, "predict", "--model", trained, "--quiet")
    assert [a["text"] for a in result.answers] == texts
    assert result.err == ""


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n"])
def test_nothing_to_label_is_no_error(capsys, trained, stdin, content):
    stdin(content)
    result = call(capsys, "predict", "--model", trained, "--quiet")
    assert (result.status, result.out, result.err) == (0, "", "")


def test_stdin_that_is_no_utf8(capsys, trained, stdin):
    stdin(b"good\n\ncaf\xe9\n")
    result = call(capsys, "predict", "--model", trained)
    assert_one_line(result, "stdin:3: expected UTF-8, got byte 0xe9", "iconv")


def test_a_line_number_counts_all_chunks(capsys, trained, stdin):
    stdin(b"\n" * 100_000 + b"\xff\n")
    assert_one_line(call(capsys, "predict", "--model", trained), "stdin:100001: expected UTF-8")


def test_no_stdin_at_all(capsys, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_line(call(capsys, "predict", "--model", trained), "got a closed stdin")


def test_a_person_sees_an_answer_before_the_next_line(trained):
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # hides it
    command = [*MINIFT, "predict", "--model", trained]
    process = subprocess.Popen(command, **pipe, text=True, env=environment)
    stuck = threading.Timer(90, process.kill)
    stuck.start()
    try:
        for text, label in (("the film was good", "pos"), ("the film was bad", "neg")):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())  # fails when it was killed
            assert (answer["text"], answer["label"]) == (text, label)
        out, err = process.communicate()
    finally:
        stuck.cancel()
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "")
    assert err.startswith("2 texts in")


def test_a_reader_may_leave_early(trained, tmp_path):
    """As `head` does: no traceback and no message."""
    (tmp_path / "a.txt").write_text("the film was good\n" * 20000)
    shell = (
        f"{sys.executable} -m minift predict --model {trained} --data {tmp_path}/a.txt | head -2"
    )
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


# ------------------------------------------------------------- warnings


def test_quiet_says_nothing(train, tmp_path):
    result = train("--quiet", "--epochs", 5)
    assert result.err == ""
    assert result.summary["eval_accuracy"] == 1


def test_quiet_eval(capsys, trained, data):
    flags = ("--data", data / "validation.jsonl", "--quiet")
    assert call(capsys, "eval", "--model", trained, *flags).err == ""


def test_a_model_that_learned_nothing_is_loud(train, capsys, tmp_path, data):
    """Also when quiet: this is not progress. Eval says it too."""
    result = train("--quiet", "--max_steps", 1, "--lr", 1e-9, "--lr_scheduler_type", "constant")
    line = "does not beat always answering the commonest label (0.5000)"
    assert line in result.err
    flags = ("--data", data / "validation.jsonl", "--quiet")
    again = call(capsys, "eval", "--model", tmp_path / "out", *flags)
    assert line in again.err
    assert again.summary["eval_accuracy"] <= 0.5


@pytest.mark.parametrize(("accuracy", "loud"), [(0.4, True), (0.5, True), (0.51, False)])
def test_as_good_as_the_commonest_label_is_not_good(accuracy, loud):
    """To beat it is the least."""
    metrics = {"accuracy": accuracy, "majority_accuracy": 0.5}
    assert bool(Classification(("a", "b")).verdict(metrics)) == loud


def test_texts_that_are_cut_are_counted(train, data, tmp_path):
    """Loud, even when quiet, when more than one in twenty is."""
    result = train("--max_steps", 1, "--max_seq_length", 7, "--quiet")
    # "the film was good and it is" and two specials: 9 tokens; without the end: 6
    assert re.search("WARNING: train: 16 of 80 texts .* 7 tokens.* cut", result.err)
    assert "cut" not in train("--max_steps", 1, output="long").err
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 7


def test_a_few_that_are_cut_are_told_too(train, data, tmp_path):
    lines = (data / "train.csv").read_text().replace("and it is", "")
    (tmp_path / "train.csv").write_text(lines + "the film was very very very good,pos\n")
    write_rows(tmp_path / "validation.jsonl", 2)
    result = train("--max_steps", 1, "--max_seq_length", 7, data=tmp_path)
    assert re.search("^WARNING: train: 1 of 81 texts .* 7 tokens.* cut", result.err, re.M)


def test_rows_kept_for_validation_are_announced(capsys, model, data, tmp_path):
    flags = ("--train", data / "train.csv", "--output", tmp_path / "out", "--max_steps", 1)
    result = call(capsys, "train", "--model", model, *flags, "--validation_split", 0.2)
    assert "no --validation_file: 16 of the training rows" in result.err
    assert "rows: train 64, validation 16; " in result.err
    assert result.summary["eval_n"] == 16


# ---------------------------------------------------------------- flags


def test_a_test_file_is_measured_with_the_best_model(train, capsys, tmp_path, data):
    path = write_rows(tmp_path / "test.csv", 30)
    summary = train("--epochs", 3, "--test", path, "--quiet").summary
    assert summary["test_n"] == 30
    measured = call(capsys, "eval", "--model", tmp_path / "out", "--data", path).summary
    assert measured["eval_loss"] == pytest.approx(summary["test_loss"], abs=1e-6)


def test_the_best_model_is_kept_by_any_metric(train, tmp_path):
    """Of equally accurate ones the one with the smallest loss, which goes on falling."""
    by_accuracy = train("--epochs", 5, output="a").summary
    by_loss = train("--epochs", 5, "--metric_for_best_model", "loss", output="b").summary
    by_f1 = train("--epochs", 5, "--metric_for_best_model", "eval_f1", output="c").summary
    losses = {e["step"]: e["eval_loss"] for e in events(tmp_path / "b", "eval_loss")}
    scores = {e["step"]: e["eval_f1"] for e in events(tmp_path / "c", "eval_f1")}
    hits = {e["step"]: e["eval_accuracy"] for e in events(tmp_path / "a", "eval_accuracy")}
    assert by_loss["best_step"] == min(losses, key=losses.get)
    assert by_loss["eval_loss"] == min(losses.values())
    assert by_f1["best_step"] == max(scores, key=lambda step: (scores[step], -losses[step]))
    assert by_accuracy["best_step"] == max(hits, key=lambda step: (hits[step], -losses[step]))
    kept = load_file(tmp_path / "b" / "model.safetensors")
    step = load_file(tmp_path / "b" / f"checkpoint-{by_loss['best_step']}" / "model.safetensors")
    assert all(torch.equal(kept[name], step[name]) for name in kept)


def test_early_stopping_stops(train, tmp_path):
    flags = ("--epochs", 20, "--early_stopping_patience", 2, "--quiet")
    summary = train(*flags).summary
    assert summary["early_stopped"] is True
    hits = {e["step"]: e["eval_accuracy"] for e in events(tmp_path / "out", "eval_accuracy")}
    # Two evaluations, 10 steps apart, after the last gain; a smaller loss alone is none.
    assert summary["steps"] == max(hits, key=hits.get) + 20 < 200
    assert f"checkpoint-{summary['steps']}" in checkpoints(tmp_path / "out")
    assert len(events(tmp_path / "out", "eval_loss")) == summary["steps"] / 10


def test_a_stopped_run_that_goes_on_stays_stopped(train, tmp_path):
    flags = ("--epochs", 20, "--early_stopping_patience", 1, "--quiet")
    summary = train(*flags).summary
    again = train(*flags, "--resume_from_checkpoint", "auto").summary
    for name in ("steps", "best_step", "eval_loss", "train_loss", "early_stopped"):
        assert again[name] == summary[name]


def test_max_steps_wins_over_epochs(train, tmp_path):
    summary = train("--max_steps", 3, "--epochs", 50).summary
    assert (summary["steps"], summary["epoch"]) == (3, 0.3)
    assert len(events(tmp_path / "out", "eval_loss")) == 1  # the last step is always measured


def test_part_of_an_epoch(train):
    assert train("--epochs", 0.25).summary["steps"] == 3  # ceil(0.25 * 10)


def test_evaluations_and_checkpoints_at_their_own_pace(train, tmp_path):
    flags = ("--eval_steps", 2, "--save_steps", 3, "--save_total_limit", 0, "--max_steps", 7)
    train(*flags)
    assert [e["step"] for e in events(tmp_path / "out", "eval_loss")] == [2, 4, 6, 7]
    assert checkpoints(tmp_path / "out") == {"checkpoint-3", "checkpoint-6", "checkpoint-7"}


def test_checkpoints_follow_evaluations_by_default(train, tmp_path):
    train("--eval_steps", 2, "--save_total_limit", 0, "--max_steps", 5)
    assert checkpoints(tmp_path / "out") == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}


def test_only_the_newest_checkpoints_are_kept(train, tmp_path):
    """By number: as text, 10 would come before 9."""
    train("--save_steps", 3, "--save_total_limit", 1, "--max_steps", 12, output="one")
    assert checkpoints(tmp_path / "one") == {"checkpoint-12"}
    train("--save_steps", 3, "--save_total_limit", 3, "--max_steps", 12, output="three")
    assert checkpoints(tmp_path / "three") == {"checkpoint-6", "checkpoint-9", "checkpoint-12"}
    assert not list((tmp_path / "three").glob(".*"))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedules(train, tmp_path, kind):
    train("--max_steps", 8, "--warmup_steps", 2, "--lr_scheduler_type", kind, "--lr", 1.0e-3)
    rates = [e["learning_rate"] for e in events(tmp_path / "out", "learning_rate")]
    after = {
        "linear": [1 - i / 6 for i in range(6)],
        "cosine": [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)],
        "constant": [1] * 6,
    }[kind]
    assert rates == pytest.approx([1e-3 * f for f in (0, 0.5, *after)])


def test_accumulation_is_the_same_step(train, tmp_path):
    """8 = 4 * 2 rows, in the same order with the same dropout: the losses agree."""
    train("--max_steps", 4, output="a")
    flags = ("--batch_size", 4, "--gradient_accumulation_steps", 2, "--max_steps", 4)
    train(*flags, output="b")
    one, two = ([e["loss"] for e in events(tmp_path / name, "grad_norm")] for name in ("a", "b"))
    assert one == pytest.approx(two, rel=1e-3)


def skewed(folder: Path) -> Path:
    """9 of 10 rows are positive; one text cannot be told from another."""
    lines = ["text,label", *(f"the film,{'neg' if i % 10 == 0 else 'pos'}" for i in range(80))]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    (folder / "validation.jsonl").write_text(
        '{"text": "the film", "label": "pos"}\n{"text": "the film", "label": "neg"}\n'
    )
    return folder


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("", 0.9), ("balanced", 0.5), ("pos=1,neg=9", 0.5), ("neg=1, pos=3", 0.96)],
)
def test_class_weights_move_the_probabilities(train, capsys, tmp_path, weights, expected):
    """Of texts that are alike, the best answer is the weighted share of the labels."""
    flags = ("--class_weights", weights, "--epochs", 15, "--batch_size", 80, "--lr", 1e-2)
    train(*flags, "--metric_for_best_model", "loss", "--eval_steps", 15, data=skewed(tmp_path))
    answer = call(capsys, "predict", "--model", tmp_path / "out", "the film").answers[0]
    assert answer["scores"]["pos"] == pytest.approx(expected, abs=0.08)


def test_label_smoothing_holds_the_probabilities_back(train, capsys, tmp_path):
    """With a share s spread over two labels the best answer is 1 - s / 2."""
    flags = ("--label_smoothing_factor", 0.4, "--epochs", 12, "--eval_steps", 120)
    train(*flags)
    answer = call(capsys, "predict", "--model", tmp_path / "out", "the film was good").answers[0]
    assert answer["score"] == pytest.approx(0.8, abs=0.05)


def test_pairs(train, capsys, tmp_path):
    """The answer is in the second text; swapped columns would not learn it."""
    made = [
        (f"{'good' if i % 3 else 'bad'} film", text, label)
        for i, (text, label) in enumerate(rows(80))
    ]
    lines = ["a,b,c", *(",".join(row) for row in made)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    keys = ("a", "b", "c")
    valid = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in made[:24])
    (tmp_path / "validation.jsonl").write_text(valid)
    columns = ("--text_column", "a", "--pair_column", "b", "--label_column", "c")
    summary = train(
        *columns, "--epochs", 6, "--metric_for_best_model", "loss", data=tmp_path
    ).summary
    assert summary["eval_accuracy"] == 1
    flags = ("--data", tmp_path / "validation.jsonl", *columns)
    measured = call(capsys, "eval", "--model", tmp_path / "out", *flags).summary
    assert measured["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-6)
    answers = call(capsys, "predict", "--model", tmp_path / "out", *flags).answers
    assert [(a["text"], a["pair"], a["label"]) for a in answers] == made[:24]


def test_frozen_parameters_are_saved_as_they_were(train, tmp_path, model):
    train("--freeze", "embeddings,layers:0", "--max_steps", 3)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in after:
        if not name.startswith("classifier"):
            same = torch.equal(before[name], after[name])
            assert same == ("embeddings" in name or "layer.0." in name), name


def test_the_seed_decides_the_run(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("--max_steps", 3, "--seed", seed, output=name)
    one, same, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert one == same != other


def test_bf16(train, capsys, tmp_path, data):
    """Trained in bf16, the file is fp32 all the same."""
    summary = train("--dtype", "bf16", "--epochs", 5).summary
    assert summary["eval_accuracy"] == 1
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    flags = ("--data", data / "validation.jsonl", "--dtype", "bf16")
    measured = call(capsys, "eval", "--model", tmp_path / "out", *flags).summary
    assert measured["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-6)


def test_a_trained_model_is_trained_on(train, trained, capsys, data, tmp_path):
    """The head of the same labels is kept, so it starts where it was."""
    flags = ("--max_steps", 1, "--lr", 1e-9)
    result = call(capsys, *words(trained, data, tmp_path / "more", *flags))
    assert "loaded" in result.err
    assert "new" not in result.err.split()
    assert result.summary["eval_accuracy"] == 1


def test_overwriting_is_asked_for(train, trained, capsys, model, data, tmp_path):
    train("--max_steps", 3, "--save_steps", 1, "--save_total_limit", 0)
    train("--max_steps", 2, "--overwrite_output_dir")
    assert checkpoints(tmp_path / "out") == {"checkpoint-2"}
    assert len(events(tmp_path / "out", "grad_norm")) == 2


def test_an_empty_folder_is_as_good_as_none(train, tmp_path):
    (tmp_path / "out").mkdir()
    train("--max_steps", 1)


def test_a_config_file_starts_a_run(capsys, model, data, tmp_path):
    toml = f'model = "{model}"\ntrain = "{data}/train.csv"\n[how]\nmax_steps = 2\nthreads = 1\n'
    (tmp_path / "c.toml").write_text(toml)
    flags = ("--config", tmp_path / "c.toml", "--output", tmp_path / "out", "--max-steps", 1)
    assert call(capsys, "train", *flags).summary["steps"] == 1


def test_nothing_of_the_input_is_changed(model, data, trained):
    """`trained` is one of the runs that have read it by now."""
    assert set(contents(data)) == {"train.csv", "validation.jsonl"}
    assert set(contents(model)) == {"config.json", "model.safetensors", "vocab.txt"}


def test_training_goes_on_past_old_files(train, tmp_path, model, data, capsys):
    """A head of other labels is dropped, and said to be."""
    other = tiny_model(tmp_path / "other", id2label={"0": "x", "1": "y", "2": "z"})
    tensors = load_file(other / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(3, 32)
    tensors["classifier.bias"] = torch.zeros(3)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    result = call(capsys, *words(other, data, tmp_path / "out", "--max_steps", 1))
    assert result.status == 0
    assert "classifier.bias, classifier.weight" in result.err


# ------------------------------------------------------------------ demo


def test_demo_leaves_foreign_folders_alone(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = call(capsys, "demo", "--output", tmp_path)
    assert result.status == 2
    assert f"{tmp_path}: is there already and not a demo's" in result.err
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_the_demo_runs_to_its_end(tmp_path):
    """On real weights and this Python's own docstrings; a twentieth of an epoch."""
    command = [*MINIFT, "demo", "--epochs", "0.05", "--quiet", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "open a TCP connection and read bytes" in done.stdout
    assert json.loads(done.stdout.strip().split("\n")[-1])["steps"] > 5
    assert (tmp_path / "demo" / "model" / "model.safetensors").is_file()


def test_the_demo_of_gpt_writes(capsys, tmp_path, monkeypatch):
    """From sources to text, at a small size: 40 modules, a model of one layer."""
    found = demo.stdlib_sources(0)
    few = DemoData(found.train[:40], found.validation[:2], 42)
    monkeypatch.setattr(demo, "stdlib_sources", lambda seed: few)
    small = demo.SMALL_GPT | {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 400}
    monkeypatch.setattr(demo, "SMALL_GPT", small | {"n_positions": 64})
    result = call(capsys, "demo", "--gpt", "--epochs", 0.05, "--output", tmp_path / "demo")
    assert result.status == 0, result.err
    assert "  class Stack:" in result.out
    assert result.summary["eval_bits_per_byte"] > 1
    assert (tmp_path / "demo" / "model" / "model.safetensors").is_file()
    again = call(capsys, "demo", "--gpt", "--epochs", 0.01, "--output", tmp_path / "demo")
    assert again.status == 0, again.err


# ---------------------------------------------------------------- lengths, and many labels

LONG = "the film was very very very very very good"


def test_texts_that_predict_cuts_are_marked_and_counted(capsys, trained):
    flags = ("--model", trained, "--max_seq_length", 7)
    result = call(capsys, "predict", *flags, "good film", LONG)
    assert ["cut" in answer for answer in result.answers] == [False, True]
    assert "WARNING: 1 of 2 texts are longer than 7 tokens and cut there" in result.err
    result = call(capsys, "predict", *flags, "--overflow", "error", LONG)
    assert_one_line(result, "text:1: longer than 7 tokens")


def test_eval_counts_what_it_cuts_and_leaves_out(capsys, trained, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n ,neg\n{LONG},pos\n" + "good film,pos\n" * 99)
    words = ("eval", "--model", trained, "--data", path, "--max_seq_length", 7)
    words += ("--max_dropped", 0.5)
    result = call(capsys, *words)
    assert f"WARNING: {path}: 1 of 100 texts are longer than 7 tokens" in result.err
    assert f"1 of 101 rows cannot be used: 1 no text ({path}:2); they are left out" in result.err
    assert result.summary["eval_n"] == 100
    result = call(capsys, *words, "--overflow", "error", "--quiet")
    assert (result.status, result.out) == (2, "")
    assert f"{path}:3: longer than 7 tokens, as 1 of 100 texts are" in result.err


def test_of_many_labels_the_likeliest_are_shown(capsys, model, tmp_path):
    """Twenty labels: the ten best, best first, or as many as asked."""
    lines = [f"the film was {word},label {i}" for i, word in enumerate(WORDS[:20]) for _ in "ab"]
    (tmp_path / "many.csv").write_text("\n".join(["text,label", *lines]))
    flags = ("--train", tmp_path / "many.csv", "--output", tmp_path / "out", "--max_steps", 1)
    with settings_kept():
        assert call(capsys, "train", "--model", model, *flags, "--threads", 1).status == 0
    for flag, shown in (((), 10), (("--top_k", 3), 3), (("--top_k", 0), 20)):
        (answer,) = call(capsys, "predict", "--model", tmp_path / "out", "good", *flag).answers
        scores = list(answer["scores"].values())
        assert len(scores) == shown
        assert answer["score"] == max(scores) == answer["scores"][answer["label"]]
        assert shown == 20 or scores == sorted(scores, reverse=True)


# ---------------------------------------------------------------- what a new user does


def test_blank_rows_have_an_answer_without_a_label(capsys, trained, tmp_path):
    """A line for each row: both files stay side by side."""
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,good\n2,\n3,bad\n")
    result = call(capsys, "predict", "--model", trained, "--data", path)
    assert [answer["label"] is None for answer in result.answers] == [False, True, False]
    assert [answer["text"] for answer in result.answers] == ["good", "", "bad"]
    result = call(capsys, "predict", "--model", trained, "good", " ")
    assert [answer["label"] is None for answer in result.answers] == [False, True]


def test_a_model_knows_whether_it_learned_pairs(capsys, trained, model, tmp_path):
    """The other kind would get an answer, and a wrong one."""
    pairs = tmp_path / "pairs.csv"
    lines = [f"the film,was {word},{label}" for word, label in (("good", "pos"), ("bad", "neg"))]
    pairs.write_text("\n".join(["text,text2,label", *lines * 20]))
    result = call(capsys, "predict", "--model", trained, "--data", pairs)
    assert_one_line(result, f"{pairs}:2: the model was trained on single texts, got others")
    out, flags = tmp_path / "out", ("--max_steps", 1, "--threads", 1)
    with settings_kept():
        words = ("train", "--model", model, "--train", pairs, "--output", out, *flags)
        assert call(capsys, *words).status == 0
    result = call(capsys, "predict", "--model", out, "the film was good")
    assert_one_line(result, "text:1: the model was trained on pairs of texts, got others")
    result = call(capsys, "eval", "--model", out, "--data", write_rows(tmp_path / "a.csv", 4))
    assert_one_line(result, "a.csv:2: the model was trained on pairs of texts")
    assert len(call(capsys, "predict", "--model", out, "--data", pairs).answers) == 40
