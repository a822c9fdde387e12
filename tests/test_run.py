"""What can go wrong in a run: bad files, bad models, bad flags, a full disk, a signal, a loss that
is no number. Each is one line, and nothing is lost or half-written."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    VOCABULARY,
    assert_one_line,
    call,
    contents,
    rows,
    settings_kept,
    tiny_config,
    tiny_model,
    words,
    write_rows,
)

from minift.checkpoint import checkpoints
from minift.cli import main
from minift.config import RunConfig, TrainConfig
from minift.errors import InputError
from minift.prepare import pick_device
from minift.run import LATE, fine_tune
from minift.saving import load

GOOD = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(20))
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """train.csv of 40 rows, 5 steps an epoch; validation.jsonl of 10."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.csv", 40)
    write_rows(folder / "validation.jsonl", 10)
    return folder


@pytest.fixture(scope="session")
def finished_run(model, data, tmp_path_factory):
    """A run of 6 steps with checkpoints at 2, 4 and 6: not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    with settings_kept():
        assert main(words(model, data, output, *SIX)) == 0
    return output


SIX = ("--max_steps", 6, "--save_steps", 2, "--eval_steps", 2, "--save_total_limit", 0, "--quiet")


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of that run, at tmp_path/out, to go on from or to damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "out"))


@pytest.fixture
def train(capsys, model, data, tmp_path):
    """Runs `train` into tmp_path/out, quietly, and returns the result."""

    def train(*more, model=model, data=data, output=None):
        output = output or tmp_path / "out"
        return call(capsys, *words(model, data, output, "--max_steps", 2, "--quiet", *more))

    return train


@pytest.fixture
def refused(train, tmp_path):
    """Runs `train`: it must fail with one line that holds `parts`, and leave no output folder."""

    def refused(*more, parts, **options):
        assert_one_line(train(*more, **options), *parts)
        assert not (tmp_path / "out").exists()

    return refused


# ---------------------------------------------------------------- bad files

BAD_FILES = {  # what is wrong: (name, content, parts of the line; FILE is the path)
    "empty": ("a.csv", b"", ("FILE: expected rows, got an empty file",)),
    "only a header": ("a.csv", b"text,label\n", ("FILE: expected rows",)),
    "blank lines": ("a.jsonl", b"\n \n", ("FILE: expected rows",)),
    "blank text": (
        "a.jsonl",
        b'{"text": " ", "label": 1}\n',
        ("FILE: 1 of 1 rows cannot be used: 1 no text (FILE:1)",),
    ),
    "empty label": (
        *("a.csv", GOOD.encode() + b"good,\n"),
        ("FILE: 1 of 21 rows cannot be used: 1 without a label in column 'label' (FILE:22)",),
    ),
    "one class": ("a.csv", b"text,label\na,x\nb,x\n", ("FILE: expected two labels or", "'x'")),
    "header as data": (
        *("a.csv", b"words,kind\ngood film,p\nbad film,n\ngood book,p\nbad day,n\ngood,p\nx,n\n"),
        ("FILE:1: line 1 looks like a header", "--text_column 'words' --label_column 'kind'"),
    ),
    "ragged": ("a.csv", b"text,label\na,x\nb,c,y\n", ("FILE:3: expected 2 fields", "got 3")),
    "ragged tsv": ("a.tsv", b"text\tlabel\na\tx\nb\n", ("FILE:3: expected 2 fields", "got 1")),
    "Latin-1": ("a.csv", GOOD.encode() + b"caf\xe9,pos\n", ("FILE:22: expected UTF-8", "column 4")),
    "UTF-16": ("a.csv", GOOD.encode("utf-16"), ("FILE:1: expected UTF-8, got UTF-16", "iconv")),
    "UTF-16 without BOM": ("a.csv", GOOD.encode("utf-16-le"), ("expected UTF-8, got UTF-16LE",)),
    "NUL": ("a.csv", GOOD.encode() + b"a\0b,pos\n", ("FILE:22: expected text, got a NUL byte",)),
    "10 MB line": (
        *("a.csv", GOOD.encode() + b"good " * 2_000_000 + b",pos\n"),
        ("FILE:22: expected lines of at most 8 MiB",),
    ),
    "10 MB object": (
        *("a.jsonl", b'{"text": "' + b"good " * 2_000_000 + b'", "label": 1}\n'),
        ("FILE:1: expected lines of at most 8 MiB",),
    ),
    "open quote": ("a.csv", GOOD.encode() + b'"good,pos\nbad,neg\n', ("FILE:22: expected a clos",)),
    "JSON": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"}\n', ("FILE:2: expected JSON lines",)),
    "JSON list": ("a.json", b'[{"text": "a", "label": 1}]\n', ("FILE:1:", "jq -c '.[]'")),
    "no label": ("a.jsonl", b'{"text": "a"}\n', ("FILE:1: expected a usual name for the label",)),
    "name": ("a.parquet", b"PAR1", ("FILE: expected a name that ends in .csv", "'.parquet'")),
    "too few": ("a.csv", b"text,label\na,x\nb,y\n", ("FILE: too few rows of each of 2 labels",)),
    "not there": ("", b"", ("nothing.csv: expected a file, got No such file",)),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_training_file(capsys, model, tmp_path, kind):
    name, content, parts = BAD_FILES[kind]
    path = tmp_path / (name or "nothing.csv")
    if name:
        path.write_bytes(content)
    flags = ("--train", path, "--output", tmp_path / "out", "--quiet")
    result = call(capsys, "train", "--model", model, *flags)
    assert_one_line(result, *(part.replace("FILE", str(path)) for part in parts))
    assert len(result.err) < 600 + 2 * len(str(path))  # a line of 10 MB is not repeated
    assert not (tmp_path / "out").exists()


def test_bad_validation_and_test_files(refused, tmp_path):
    """Before the first step, not after the last."""
    for flag in ("--validation", "--test"):
        path = tmp_path / "bad.csv"
        path.write_text("text,label\ngood,pos,more\n")
        refused(flag, path, parts=(f"{path}:2: expected 2 fields",))


@pytest.mark.parametrize("flag", ["--validation", "--test"])
def test_a_label_that_training_has_never_seen(refused, tmp_path, flag):
    path = tmp_path / "other.csv"
    path.write_text("text,label\ngood,pos\n\nbad,negative\n")
    line = f"1 of 2 rows cannot be used: 1 label 'negative' is not among the known ones ({path}:4)"
    refused(flag, path, parts=(f"{path}: {line}: more than --max_dropped 0.01",))


def test_a_column_that_is_not_there(refused, data):
    where = f"{data / 'train.csv'}:1"
    refused("--text_column", "txt", parts=(f"{where}: expected a column 'txt'", "mean 'text'?"))
    refused("--label_column", "3", parts=(f"{where}: expected a column '3'", "from 1 to 2"))
    refused("--pair_column", "text", "--text_column", "text", parts=("'text' twice",))


def test_pairs_beside_single_texts(refused, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"text": "a", "text_pair": "b", "label": "pos"}\n{"text": "a", "label": "neg"}\n'
    )
    refused("--train", path, parts=(f"without a text in column 'text_pair' ({path}:2)",))


def test_a_byte_order_mark_is_fine(train, tmp_path):
    path = tmp_path / "bom.csv"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert train("--train", path).status == 0


def test_odd_labels_survive(capsys, train, tmp_path):
    """Quotes, newlines, commas, equals signs, emoji: a label is any text."""
    names = ['say "yes"', "no,\nthank you", "a=b\\n", "☃ übel"]
    texts = ("good", "bad", "fine", "awful")
    made = [{"text": t, "label": n} for t, n in zip(texts, names, strict=True)] * 5
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(m) + "\n" for m in made))
    result = train("--train", path, "--validation", path, "--test", path)
    assert result.status == 0
    assert {f"eval_f1/{name}" for name in names} <= set(result.summary)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["id2label"].values()) == sorted(names)
    assert config["label2id"] == {name: int(i) for i, name in config["id2label"].items()}
    answer = call(capsys, "predict", "--model", tmp_path / "out", "good film").answers[0]
    assert answer["label"] in names
    assert sorted(answer["scores"]) == sorted(names)
    assert call(capsys, "inspect", tmp_path / "out").status == 0
    flags = ("--train", path, "--validation", path)
    again = train(*flags, model=tmp_path / "out", output=tmp_path / "b")
    assert again.status == 0  # with the head of these labels
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config


# --------------------------------------------------------------- bad models


def test_no_model(refused, tmp_path):
    refused(model=tmp_path / "no", parts=(f"{tmp_path / 'no'}: expected a model folder",))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "model.safetensors",
            ": expected model.safetensors or pytorch_model.bin, found no weights",
        ),
        ("config.json", "config.json: cannot be read (No such file or directory)"),
        ("vocab.txt", ": expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt"),
    ],
)
def test_a_model_that_lacks_a_file(refused, tmp_path, name, part):
    folder = tiny_model(tmp_path / "m")
    (folder / name).unlink()
    refused(model=folder, parts=(str(folder), part))


@pytest.mark.parametrize("size", [0, 7, 100, 50_000, -1])
def test_weights_that_are_cut_short(refused, tmp_path, size):
    path = tiny_model(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(model=path.parent, parts=(f"{path}: damaged or cut short (", "copy it again"))


def test_weights_that_lack_a_tensor(refused, tmp_path):
    path = tiny_model(tmp_path / "m") / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.attention.self.key.bias"]
    save_file(tensors, path)
    refused(model=path.parent, parts=(f"{path}: expected a tensor 'bert.encoder.layer.1.atten",))


def test_weights_with_a_tensor_too_much(refused, tmp_path):
    path = tiny_model(tmp_path / "m") / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(3)}, path)
    refused(
        model=path.parent, parts=(f"{path}: 1 tensors that a bert does not", "'lm_head.weight'")
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"intermediate_size": 96}, ("config.json says (96, 32)", "the file holds (64, 32)")),
        ({"hidden_size": 64}, ("config.json says (200, 64)", "holds (200, 32)")),
        ({"num_hidden_layers": 3}, ("expected a tensor 'bert.encoder.layer.2.",)),
        ({"num_hidden_layers": 1}, ("tensors that a bert does not have", "layer.1.")),
        ({"num_attention_heads": 3}, ("config.json: hidden_size=32 is not divisible by 3 heads",)),
        ({"vocab_size": 60}, ("the tokenizer has ids up to", "the embedding 60 rows")),
        ({"model_type": "t5"}, ("config.json: expected model_type bert,", "'t5'")),
        ({"hidden_act": "relu"}, ("config.json: expected hidden_act", "'relu'")),
        ({"vocab_size": "200"}, ("expected vocab_size in config.json as a number", "'200'")),
        ({"hidden_size": None}, ("expected hidden_size in config.json as a number", "None")),
        ({"position_embedding_type": "relative_key"}, ("expected absolute positions",)),
        ({"id2label": ["a"]}, ("expected id2label as number -> name",)),
    ],
)
def test_a_config_that_contradicts_the_weights(refused, tmp_path, changes, parts):
    folder = tiny_model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(tiny_config() | changes))
    refused(model=folder, parts=(str(folder), *parts))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff{}x"])
def test_a_config_that_is_no_config(refused, tmp_path, text):
    path = tiny_model(tmp_path / "m") / "config.json"
    path.write_text(text)
    refused(model=path.parent, parts=(f"{path}: expected ",))


def test_more_word_pieces_than_rows(refused, tmp_path):
    """The id would be out of the table only for some texts, in the middle of training."""
    folder = tiny_model(tmp_path / "m")
    more = [f"word{i}" for i in range(200)]
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, *more]) + "\n")
    last = len(VOCABULARY) + 199
    refused(model=folder, parts=(f"has ids up to {last}, the embedding 200 rows",))


def test_a_tokenizer_that_is_none(refused, tmp_path):
    folder = tiny_model(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    refused(model=folder, parts=(f"{folder / 'tokenizer.json'}: not a tokenizer (",))


def test_predict_and_eval_need_a_trained_model(capsys, model, data):
    flags = ("--model", model, "--data", data / "train.csv")
    for command in ("eval", "predict"):
        assert_one_line(call(capsys, command, *flags), str(model), "is this a trained classifier?")


def test_eval_of_a_file_with_another_label(capsys, finished_run, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,pos\nbad,sad\n")
    result = call(capsys, "eval", "--model", finished_run, "--data", path)
    line = f"1 of 2 rows cannot be used: 1 label 'sad' is not among the known ones ({path}:3)"
    assert_one_line(result, line)


# --------------------------------------------------------------- bad flags


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ("--metric_for_best_model", "f2"),
            ("metric_for_best_model 'f2' is unknown", "loss, n, a"),
        ),
        (("--device", "gpu"), ("expected device cpu, cuda or cuda:N, got 'gpu'",)),
        pytest.param(
            *(("--device", "cuda"), ("device cuda: no GPU", "use --device cpu")), marks=CPU
        ),
        pytest.param(*(("--device", "cuda:1"), ("device cuda:1: no GPU",)), marks=CPU),
        (("--freeze", "layers:7"), ("no parameter is in 'layers:7': groups are embeddings",)),
        (("--freeze", "embeddings,layers:0-1,pooler,head"), ("every parameter is frozen",)),
        (("--lr_rules", "head"), ("expected lr_rules as pattern=rate,..., got 'head'",)),
        (("--lr_rules", "encoder=1"), ("no parameter is in 'encoder'",)),
        (("--max_seq_length", "33"), ("max_seq_length 33 is more than the model's 32 positions",)),
        (("--max_seq_length", "4"), ("expected max_seq_length 5 or more, got 4",)),
        (("--class_weights", "pos=1"), ("expected class_weights 'balanced' or", "'neg=1,pos=1'")),
        (("--class_weights", "pos=1,neg=0"), ("expected class_weights", "got 'pos=1,neg=0'")),
        (("--class_weights", "pos=1,neg=x"), ("expected class_weights",)),
        (("--class_weights", "pos=1,neg=2,sad=3"), ("expected class_weights",)),
        (("--class_weights", "equal"), ("expected class_weights 'balanced'",)),
    ],
)
def test_a_flag_that_does_not_fit(refused, flags, parts):
    refused(*flags, parts=parts)


@pytest.mark.parametrize("name", ["model", "train", "output"])
def test_what_a_run_needs(capsys, name, tmp_path):
    flags = {n: ("--" + n, tmp_path / "x") for n in ("model", "train", "output")}
    del flags[name]
    assert_one_line(call(capsys, "train", *sum(flags.values(), ())), "expected --", name)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("ops", ["auto", "torch", "triton"])
def test_every_table_of_operations_trains(train, ops):
    assert train("--ops", ops).status == 0


def test_rows_without_a_text_are_left_out_and_said(train, data, tmp_path):
    """A real file of 7,766 rows has one: nobody wants to mend it first. All blank is an error."""
    shutil.copy(data / "validation.jsonl", tmp_path)
    lines = (data / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(lines + ",pos\n  ,neg\n")
    result = train("--max_steps", 1, "--max_dropped", 0.05, data=tmp_path)
    assert result.status == 0
    n, path = lines.count("\n") + 1, tmp_path / "train.csv"
    wanted = f"WARNING: train: 2 of {n} rows cannot be used: 2 no text ({path}:{n}, {path}:{n + 1})"
    assert f"{wanted}; they are left out" in result.err


def test_rows_that_stand_in_two_parts_are_counted(train, data, tmp_path):
    """What was trained on is no test; case and spaces make no difference."""
    lines = (data / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(lines)
    text = lines.splitlines()[1].split(",")[0]
    rows = [{"text": f" {text.upper()}", "label": "pos"}, {"text": "a new one", "label": "neg"}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train("--max_steps", 1, data=tmp_path)
    assert "WARNING: 1 of 2 validation rows stand in the training rows too" in result.err
    test = ("--test", tmp_path / "train.csv", "--overwrite_output_dir")
    result = train("--max_steps", 1, *test, data=tmp_path)
    n = lines.count("\n") - 1
    assert f"WARNING: {n} of {n} test rows stand in the training rows too" in result.err


def test_texts_that_are_too_long_may_stop_a_run(train, tmp_path):
    """Before anything is written; the line names the first of them."""
    result = train("--max_seq_length", 7, "--overflow", "error")
    assert_one_line(result, "train.csv:2: longer than 7 tokens, as ", " texts are: raise --max_seq")
    assert not (tmp_path / "out").exists()


def test_a_token_is_never_written_down(train, tmp_path):
    """Neither as a setting nor in the command that run.json repeats, nor in the log."""
    secret = "hf_aSecretThatIsLong"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["minift", "train", f"--token={secret}"])
        result = train("--max_steps", 1, "--token", secret)
    assert result.status == 0
    for name, content in contents(tmp_path / "out").items():
        assert secret.encode() not in content, name
    assert secret not in result.err + result.out
    assert "--token=***" in (tmp_path / "out" / "run.json").read_text()


def test_labels_that_differ_only_in_case_are_warned_of(train, tmp_path):
    """Two spellings become two classes, and halve both."""
    (tmp_path / "train.csv").write_text("text,label\n" + "a film,good\n" * 9 + "a book,Good\n" * 3)
    rows = [{"text": "a day", "label": "good"}, {"text": "a meal", "label": "Good"}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train("--max_steps", 1, data=tmp_path)
    assert "WARNING: labels that differ only in case: Good, good" in result.err


def test_numbers_as_labels_are_asked_about(train, data, tmp_path):
    """Every row its own label: most likely another column was meant."""
    lines = [f"the film was good {i},{i}.5" for i in range(20)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
    words = ("--validation", "", "--max_steps", 1)
    result = train(*words, data=tmp_path)
    assert_one_line(result, "too few rows of each of 20 labels", "or is it another column")


def test_auto_without_a_checkpoint_says_that_it_begins(train, tmp_path):
    """A mistyped folder would begin anew in silence."""
    result = train("--max_steps", 1, "--resume_from_checkpoint", "auto")
    assert "WARNING:" in result.err
    assert "no checkpoint there, so this is a new run" in result.err


def test_the_folder_of_an_interrupted_run(capsys, finished):
    """It has checkpoints and no best model yet: the line names one that can be used."""
    (finished / "config.json").unlink()
    result = call(capsys, "predict", "--model", finished, "good")
    assert_one_line(result, f"{finished}: a run that was interrupted", "checkpoint-6")


def test_a_run_is_a_generator_of_what_happens(model, data, tmp_path):
    """The library's way in; nothing is written before the first event that needs it."""
    run = RunConfig(
        str(model), str(data / "train.csv"), output_dir=str(tmp_path / "out"), threads=1
    )
    events = fine_tune(run, TrainConfig(max_steps=1))
    assert not (tmp_path / "out").exists()
    kinds = [type(event).__name__ for event in events]
    # split, rows, weights, duplicates, rules, sizes of batches, few validation rows
    assert kinds == [*["Notice"] * 7, "Step", "Evaluation", "Finished"]
    with pytest.raises(InputError, match="is there already and not empty"):
        next(fine_tune(run))


# ------------------------------------------------------------ bad places


def test_losses_read_late_are_all_written_down(monkeypatch, model, data, tmp_path):
    """Four at a time, fewer before an evaluation: the lines of metrics.jsonl are in the order in
    which things happened, with the numbers of a run that reads at once; a window has one rate."""
    monkeypatch.setitem(LATE, "cpu", 4)
    run = RunConfig(str(model), str(data / "train.csv"), str(data / "validation.jsonl"),
                    output_dir=str(tmp_path / "late"), eval_steps=6)  # fmt: skip
    config = TrainConfig(max_steps=6, per_device_train_batch_size=8)
    *_, last = fine_tune(run, config)
    lines = (tmp_path / "late" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps, (evaluation, summary) = events[:6], events[6:]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert "eval_loss" in evaluation
    rates = [event["tokens_per_second"] for event in steps]
    assert len(set(rates[:4])) == len(set(rates[4:])) == 1
    seconds = sum(event["tokens"] / event["tokens_per_second"] for event in steps)
    assert summary["train_runtime"] == pytest.approx(seconds)
    monkeypatch.setitem(LATE, "cpu", 1)
    *_, at_once = fine_tune(replace(run, output_dir=str(tmp_path / "at-once")), config)
    assert last.summary["train_loss"] == at_once.summary["train_loss"]


def test_an_output_folder_that_is_not_empty(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    result = train()
    assert_one_line(result, f"{tmp_path / 'out'}: is there already and not empty: choose another")
    assert "--overwrite_output_dir" in result.err
    assert contents(tmp_path / "out") == {"thesis.tex": b"mine"}


def test_overwriting_deletes_only_what_runs_write(train, finished, data, tmp_path):
    """Whoever keeps the data beside the model keeps the data."""
    (finished / "thesis.tex").write_text("mine")
    shutil.copy(data / "train.csv", finished)
    result = train("--overwrite_output_dir", "--train", finished / "train.csv")
    assert result.status == 0
    assert (finished / "thesis.tex").read_text() == "mine"
    assert (finished / "train.csv").read_bytes() == (data / "train.csv").read_bytes()
    assert [path.name for path in checkpoints(finished)] == ["checkpoint-2"]
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 4  # 2 steps, 1 evaluation


def test_overwriting_waits_until_all_is_known_to_be_good(train, finished):
    """A typing error must not cost the old run."""
    before = contents(finished)
    for flags in (("--metric_for_best_model", "f2"), ("--freeze", "x"), ("--test", "/none.csv")):
        assert train("--overwrite_output_dir", *flags).status == 2
        assert contents(finished) == before


def test_an_output_that_is_a_file(train, tmp_path):
    (tmp_path / "out").write_text("mine")
    for flags in ((), ("--overwrite_output_dir",), ("--resume_from_checkpoint", "auto")):
        assert_one_line(train(*flags), f"{tmp_path / 'out'}: expected a folder", "found a file")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("place", ["/proc/minift", "FILE/out", "FILE/a/b"])
def test_an_output_that_cannot_be_written(train, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    output = place.replace("FILE", str(tmp_path / "file"))
    assert_one_line(train(output=output), f"{output}: cannot be written (", "another folder")
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------- a full disk


@contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes, as on a disk that is full (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def assert_nothing_partial(folder: Path) -> None:
    assert [p for p in folder.rglob("*") if p.name.startswith(".") or "partial" in p.name] == []


def test_the_disk_fills_up_before_the_first_model(train, tmp_path):
    size = 50_000  # of the model: 105 kB
    with full_disk(size):
        result = train()
    assert_one_line(result, "model.safetensors: cannot be written (", "free space")
    assert_nothing_partial(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert checkpoints(tmp_path / "out") == []


def test_the_disk_fills_up_at_a_checkpoint(train, tmp_path):
    """The moments are twice the model."""
    with full_disk(150_000):
        result = train()
    assert_one_line(result, "optimizer.safetensors: cannot be written (")
    assert_nothing_partial(tmp_path / "out")
    assert checkpoints(tmp_path / "out") == []
    assert load(tmp_path / "out")[0].config.labels == ("neg", "pos")


@pytest.mark.parametrize("size", [50_000, 150_000])
def test_a_run_goes_on_when_there_is_space_again(train, capsys, finished, finished_run, size):
    """What was there is there: the model, the older checkpoint, from which the run goes on."""
    shutil.rmtree(finished / "checkpoint-4")
    shutil.rmtree(finished / "checkpoint-6")
    before = {n: c for n, c in contents(finished).items() if n != "metrics.jsonl"}
    flags = (*SIX, "--resume_from_checkpoint", "auto")
    with full_disk(size):
        result = train(*flags)
    assert_one_line(result, "cannot be written (")
    after = contents(finished)
    assert_nothing_partial(finished)
    assert [path.name for path in checkpoints(finished)] == ["checkpoint-2"]
    for name in before:
        assert name in after
        if name.startswith("checkpoint") or size == 50_000:
            assert after[name] == before[name]
    assert train(*flags).status == 0
    assert_same_run(finished, finished_run)


def test_the_log_cannot_grow(train, tmp_path):
    """run.json of 2 kB is written, a hundred steps of metrics.jsonl are not."""
    with full_disk(4_000):
        result = train("--max_steps", 100, "--eval_steps", 100, "--save_steps", 100)
    assert_one_line(result, "metrics.jsonl: cannot be written (")


# ------------------------------------------------------------------ resume


def assert_same_run(one: Path, other: Path) -> None:
    """The same model, checkpoints and log, but for times."""
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    path = "checkpoint-6/optimizer.safetensors"
    mine, theirs = load_file(one / path), load_file(other / path)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert log(one) == log(other)


def log(output: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the place."""
    varies = {"tokens_per_second", "peak_rss_mib", "output_dir", "train_tokens_per_second"}
    varies |= {"eval_runtime", "train_runtime", "train_samples_per_second"}
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in varies} for x in lines]


def test_a_resumed_run_is_the_same_run(train, finished, finished_run):
    shutil.rmtree(finished / "checkpoint-6")
    (finished / ".checkpoint-6.1.partial").mkdir()  # of a process that was killed
    assert train(*SIX, "--resume_from_checkpoint", "auto").status == 0
    assert_nothing_partial(finished)
    assert_same_run(finished, finished_run)


def test_a_resume_from_a_chosen_checkpoint(train, finished, finished_run):
    result = train(*SIX, "--resume_from_checkpoint", finished / "checkpoint-2")
    assert result.status == 0
    assert_same_run(finished, finished_run)


def test_a_finished_run_that_goes_on_has_nothing_to_do(train, finished, finished_run):
    result = train(*SIX, "--resume_from_checkpoint", "auto")
    lines = (finished_run / "metrics.jsonl").read_text().splitlines()
    old = json.loads(lines[-1])
    assert {k: result.summary[k] for k in ("steps", "best_step", "eval_loss", "train_loss")} == {
        k: old[k] for k in ("steps", "best_step", "eval_loss", "train_loss")
    }


def test_auto_without_a_checkpoint_begins(train, tmp_path):
    """So that one command line serves a job that may be killed at any time."""
    result = train("--resume_from_checkpoint", "auto")
    assert (result.status, result.summary["steps"]) == (0, 2)


def test_what_is_free_to_change(train, finished, data):
    flags = ("--save_total_limit", 1, "--test", data / "validation.jsonl")
    result = train(*SIX, *flags, "--resume_from_checkpoint", finished / "checkpoint-4")
    assert (result.status, result.summary["test_n"]) == (0, 10)
    assert [path.name for path in checkpoints(finished)] == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--lr", 1e-3), ("learning_rate was 0.005, is 0.001",)),
        (("--seed", 1), ("seed was 0, is 1",)),
        (("--max_steps", 7), ("max_steps was 6, is 7",)),
        (("--freeze", "head", "--lr", 1), ("learning_rate was", "; freeze was '', is 'head'")),
        (("--max_seq_length", 30), ("max_seq_length was 0, is 30",)),
        (("--metric_for_best_model", "f1"), ("metric_for_best_model was '', is 'f1'",)),
        (("--batch_size", 4), ("per_device_train_batch_size was 8, is 4",)),
        (("--eval_steps", 3), ("eval_steps was 2, is 3",)),
        (("--validation_file", "FILE"), ("validation_file was",)),
    ],
)
def test_a_resume_with_other_flags_names_them(train, finished, tmp_path, flags, parts):
    before = contents(finished)
    path = write_rows(tmp_path / "other.jsonl", 10)
    flags = [path if flag == "FILE" else flag for flag in flags]
    result = train(*SIX, *flags, "--resume_from_checkpoint", "auto")
    assert_one_line(result, f"{finished / 'checkpoint-6'}: is of another run: ", *parts)
    assert contents(finished) == before


def test_a_resume_with_other_data_names_the_file(capsys, train, model, tmp_path):
    """The same path with other rows would be another order of other rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.csv", 40)
    write_rows(folder / "validation.jsonl", 10)
    assert train(*SIX, data=folder).status == 0
    for name, other in (("validation.jsonl", "train.csv"), ("train.csv", "validation.jsonl")):
        old = (folder / name).read_bytes()
        write_rows(folder / name, 42)
        result = train(*SIX, "--resume_from_checkpoint", "auto", data=folder)
        assert_one_line(result, "is of another run", f"{folder / name} has changed")
        assert f"{folder / other} has changed" not in result.err
        (folder / name).write_bytes(old)
    assert train(*SIX, "--resume_from_checkpoint", "auto", data=folder).status == 0


def test_a_checkpoint_that_is_none(train, finished, tmp_path, finished_run):
    for path in (finished, tmp_path / "nothing", finished / "config.json"):
        result = train(*SIX, "--resume_from_checkpoint", path)
        assert_one_line(result, f"{path}: expected a checkpoint, found none: try 'auto'")
    foreign = finished_run / "checkpoint-2"
    result = train(*SIX, "--resume_from_checkpoint", foreign)
    assert_one_line(result, f"{foreign}: expected a checkpoint inside {finished}")


@pytest.mark.parametrize("size", [0, 9, 3000])
@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint(train, finished, name, size):
    path = finished / "checkpoint-6" / name
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 4)])
    before = contents(finished)
    result = train(*SIX, "--resume_from_checkpoint", "auto")
    assert_one_line(result, f"{path}: ")
    assert contents(finished) == before
    # An older one still serves.
    older = ("--resume_from_checkpoint", finished / "checkpoint-4")
    assert train(*SIX, *older).status == 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_that_lacks_a_file(train, finished, name):
    path = finished / "checkpoint-6" / name
    path.unlink()
    assert_one_line(train(*SIX, "--resume_from_checkpoint", "auto"), f"{path}: ")


def test_a_run_that_lost_its_description(train, finished):
    (finished / "run.json").unlink()
    result = train(*SIX, "--resume_from_checkpoint", "auto")
    assert_one_line(result, f"{finished / 'run.json'}: cannot be read")


def test_other_threads_are_loud(train, finished, capsys):
    """Sums of another order have other last bits; the run goes on all the same."""
    more = ("--threads", 2, "--resume_from_checkpoint", finished / "checkpoint-4")
    result = train(*SIX, *more)
    assert result.status == 0
    assert "WARNING: saved with 1 threads, now 2" in result.err
    assert "--threads 1 keeps them" in result.err


# ---------------------------------------------------------------- diverged


def test_a_high_learning_rate_diverges(train, data, tmp_path):
    flags = ("--lr", 1e3, "--weight_decay", 1e3, "--max_grad_norm", 0, "--max_steps", 40)
    result = train(*flags, "--lr_scheduler_type", "constant", "--eval_steps", 99)
    assert_one_line(result, "loss nan", "training rows", "lower learning_rate", status=1)
    assert result.err.endswith("last good checkpoint: none yet\n")


@pytest.fixture
def poisoned(tmp_path, data):
    """A model whose row of the word `boom` is infinite, and data where it is said once."""
    folder = tiny_model(tmp_path / "poisoned")
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"][VOCABULARY.index("boom")] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(data / "validation.jsonl", tmp_path)
    with open(write_rows(tmp_path / "train.csv", 40), "a") as file:
        file.write("boom,pos\n")
    return folder


def test_a_run_that_diverges_names_the_step_the_rows_and_the_checkpoint(train, poisoned, tmp_path):
    """Row 40 is in the third step of this seed's order; what was saved before is as it was."""
    flags = (
        "--eval_steps",
        1,
        "--save_total_limit",
        0,
        "--max_steps",
        6,
        "--seed",
        seed_for(40, 3),
    )
    result = train(*flags, model=poisoned, data=tmp_path)
    output = tmp_path / "out"
    assert_one_line(result, "step 3: loss nan", "training rows ", status=1)
    shown = result.err.split("training rows ")[1].split(":")[0].split(", ")
    assert len(shown) == 8
    assert "40" in shown
    assert result.err.endswith(f"last good checkpoint: {output / 'checkpoint-2'}\n")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    kept = (output / "model.safetensors").read_bytes()
    saved = [(path / "model.safetensors").read_bytes() for path in checkpoints(output)]
    assert kept in saved
    text = (output / "metrics.jsonl").read_text()
    lines = [json.loads(x, parse_constant=pytest.fail) for x in text.splitlines()]
    assert max(line["step"] for line in lines) == 2
    # On from the checkpoint it is the same again: no bad step was taken.
    again = train(*flags, "--resume_from_checkpoint", "auto", model=poisoned, data=tmp_path)
    assert (again.status, again.err) == (1, result.err)


def seed_for(row: int, step: int) -> int:
    """A seed whose first epoch has `row` of 41 in the given step of 8."""
    from minift.batch import Batches

    orders = ((seed, Batches([None] * 41, 8, 1, seed).order(0).tolist()) for seed in range(999))
    return next(seed for seed, order in orders if order.index(row) // 8 == step - 1)


# ----------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_can_go_on(capsys, model, data, tmp_path, number, status):
    flags = ("--max_steps", 300, "--save_steps", 20, "--eval_steps", 100, "--quiet")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "minift", *words(model, data, output, *flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell lets what it starts in the background ignore SIGINT, which its children inherit.
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, **pipes)
    signal.signal(signal.SIGINT, was)
    try:
        give_up = time.monotonic() + 90
        while not checkpoints(output) and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (status, "")
    assert "Traceback" not in err
    found = checkpoints(output)
    assert found
    assert len(found) <= 3  # the limit, and one that was about to be deleted
    assert_nothing_partial(output)
    state = json.loads((found[-1] / "state.json").read_text())
    assert found[-1].name == f"checkpoint-{state['step']}"
    assert state["step"] < 300
    load(found[-1])
    if number == signal.SIGTERM:  # that the bits are the same is in test_checkpoint.py
        more = words(model, data, output, *flags, "--resume_from_checkpoint", "auto")
        assert call(capsys, *more).summary["steps"] == 300
        steps = [line["step"] for line in log(output) if "grad_norm" in line]
        assert steps == list(range(1, 301))


# ------------------------------------------------------------------ mistakes of other kinds


@pytest.mark.parametrize(
    "flags",
    [
        ("--device", "mps"),
        ("--device", "meta"),
        ("--num_train_epochs", 0, "--max_steps", 0),
        ("--output", "x" * 300),
    ],
)
def test_a_flag_that_cannot_be_followed(train, tmp_path, flags):
    assert_one_line(train(*flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\n" + "good,--1\nbad,1\n" * 9),  # not a number to int()
        ("a.csv", "text,text2,label\n" + "good,bad,1\nbad,good,0\n" * 9),  # one row of types
    ],
)
def test_data_that_the_model_cannot_take(train, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    model = tiny_model(tmp_path / "m", type_vocab_size=1)
    flags = ("--train", tmp_path / name, "--validation", tmp_path / name)
    result = train(*flags, model=model)
    assert result.status in (0, 2)
    assert "Traceback" not in result.err
    assert (result.status == 0) == (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("config.json", json.dumps(tiny_config(hidden_dropout_prob=1.0))),
        ("config.json", json.dumps(tiny_config(hidden_dropout_prob=1.5))),
    ],
)
def test_settings_of_a_model_that_cannot_be(refused, tmp_path, file, content):
    folder = tiny_model(tmp_path / "m")
    (folder / file).write_text(content)
    refused(model=folder, parts=(str(folder / file),))


@pytest.mark.parametrize("file", ["run.json", "checkpoint-6/state.json"])
def test_json_of_another_kind(train, finished, file):
    (finished / file).write_text("{}")
    assert_one_line(train(*SIX, "--resume_from_checkpoint", "auto"), str(finished / file))


def test_a_lost_log_is_not_filled_with_zeros(train, finished):
    shutil.rmtree(finished / "checkpoint-6")
    (finished / "metrics.jsonl").unlink()
    train(*SIX, "--resume_from_checkpoint", "auto")
    assert b"\0" not in (finished / "metrics.jsonl").read_bytes()


def test_odd_labels_keep_a_message_on_one_line(refused, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "x\\ny"}\n{"text": "b", "label": "z"}\n' * 9)
    flags = ("--train", path, "--validation", path, "--metric_for_best_model", "f2")
    refused(*flags, parts=("metric_for_best_model 'f2' is unknown",))
