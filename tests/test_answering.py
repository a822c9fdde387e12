"""eval and predict of files of any size: blocks of rows, order, ids, memory, settings."""

import json
import os
import tracemalloc
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_one_line, call, rows, settings_kept, tiny_config, tiny_model, words

from minift import answering
from minift.answering import Encoded, Loaded, as_trained, cast_once, measure
from minift.batch import Example
from minift.bert import BertClassifier
from minift.cli import main, make_parser
from minift.config import ModelConfig, RunConfig
from minift.data import Row
from minift.errors import InputError
from minift.layers import init_weights
from minift.saving import load
from minift.step_weights import can_pack
from minift.tasks import texts
from minift.tasks.classification import Classification, logits_of
from minift.tasks.task import File

SOME = 16  # rows of a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model: of one step, which is enough to have labels."""
    tmp = tmp_path_factory.mktemp("answering")
    for name, n in (("train.csv", 40), ("validation.jsonl", 8)):
        write(tmp / name, n)
    with settings_kept():
        flags = ("--max_steps", 1, "--quiet")
        assert main(words(tiny_model(tmp / "model"), tmp, tmp / "out", *flags)) == 0
    return tmp / "out"


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(texts, "ROWS", SOME)


def write(path: Path, n: int) -> Path:
    """Texts of 1 to 20 words, as CSV or JSON lines."""
    made = [(f"{text} {'very good ' * (i * 7 % 9)}".strip(), y) for i, (text, y) in
            enumerate(rows(n))]  # fmt: skip
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": text, "label": y}) for text, y in made]
    else:
        lines = ["text,label", *(f"{text},{y}" for text, y in made)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    model, tokenizer = load(folder)
    return Loaded(model, tokenizer, Classification(model.config.labels), RunConfig(), dtype)


def encoded(of: Loaded, path: Path, **settings) -> Encoded:
    file = File(RunConfig(**settings), str(path), str(path))
    return Encoded(of.task, file, of.model.config, of.tokenizer)


# ---------------------------------------------------------------- eval


def test_blocks_measure_what_the_whole_file_does(folder, tmp_path, monkeypatch):
    """Line by line, so in the order of the file: blocks of 16 rows, and one of all."""
    path, of = write(tmp_path / "a.csv", 100), loaded(folder)
    whole = measure(of, encoded(of, path))
    monkeypatch.setattr(texts, "ROWS", SOME)
    parts = measure(of, encoded(of, path))
    target = [of.model.config.labels.index(y) for _, y in rows(100)]
    assert whole[:, 0].tolist() == parts[:, 0].tolist() == target
    assert np.abs(whole - parts).max() < 1e-5
    assert of.task.metrics(whole) == pytest.approx(of.task.metrics(parts), abs=1e-6)


def test_what_is_dropped_is_told_once_for_the_file(folder, tmp_path, small_blocks, capsys):
    """One row in a block of 16 is more than the share that is allowed; of the file it is less."""
    path, of = write(tmp_path / "a.csv", 60), loaded(folder)
    path.write_text(path.read_text() + " ,pos\n")
    outputs = measure(of, encoded(of, path, max_dropped=0.02))
    assert len(outputs) == 60
    assert capsys.readouterr().err == (
        f"WARNING: {path}: 1 of 61 rows cannot be used: 1 no text ({path}:62); they are left out\n"
    )
    with pytest.raises(InputError, match="more than --max_dropped"):
        measure(of, encoded(of, path))


def test_texts_that_are_cut_are_counted_over_all_blocks(folder, tmp_path, small_blocks, capsys):
    path, of = write(tmp_path / "a.csv", 100), loaded(folder)
    of.tokenizer.max_length = 12
    examples = of.task.encode([Row(t) for t in text_of(path)], of.tokenizer)
    cut = sum(e.cut for e in examples)
    measure(of, encoded(of, path))
    assert 0 < cut < 100
    assert capsys.readouterr().err == (
        f"WARNING: {path}: {cut} of 100 texts are longer than 12 tokens and cut there\n"
    )


def text_of(path: Path) -> list[str]:
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]]


def test_memory_does_not_grow_with_the_file(folder, tmp_path, monkeypatch):
    """Of a row that has been measured the three numbers stay: 24 bytes, with room for the copy
    that joins the blocks. The rows of the file alone would take 300 bytes each."""
    monkeypatch.setattr(texts, "ROWS", 512)
    of = loaded(folder)

    def peak(n):
        path = tmp_path / f"{n}.csv"
        made = (f"{text} {i:05},{y}\n" for i, (text, y) in enumerate(rows(n)))
        path.write_text("text,label\n" + "".join(made))
        tracemalloc.start()
        try:
            outputs = measure(of, encoded(of, path))
            return tracemalloc.get_traced_memory()[1], len(outputs)
        finally:
            tracemalloc.stop()

    peak(512)  # what is made once
    (few, n), (many, m) = peak(1024), peak(5120)
    assert (n, m) == (1024, 5120)
    assert many - few < (m - n) * 100


@settings(max_examples=12)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from(["fp32", "bf16"]))
def test_an_answer_is_that_of_the_sequence_alone(lengths, dtype):
    """Batches are by length, answers in the order of the rows."""
    model, kind = MODEL, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    draw = np.random.default_rng(0)
    examples = [Example(draw.integers(5, 90, n).tolist(), (), -100) for n in lengths]
    with cast_once(model, kind):
        together = logits_of(model, examples, kind)
        alone = [logits_of(model, [example], kind)[0] for example in examples]
    assert np.abs(together - np.array(alone)).max() < (1e-4 if dtype == "fp32" else 0.15)


def made_model() -> BertClassifier:
    config = ModelConfig.from_hf({**tiny_config(), "id2label": {"0": "a", "1": "b"}})
    model = BertClassifier(config)
    init_weights(model, 0.1, seed=3)
    return model


MODEL = made_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_that_are_cast_once_change_rounding_alone(dtype):
    """Against fp64 they are no worse than weights that are cast for each product; and the model
    has its own weights again after it."""
    examples = [Example([2, 9, 40 + i, 3], (), -100) for i in range(5)]
    before = {name: p.clone() for name, p in MODEL.named_parameters()}
    each = logits_of(MODEL, examples, dtype)
    with cast_once(MODEL, dtype):
        assert MODEL.bert.layers[0].mlp.up.bias is None or not can_pack(dtype)
        once = logits_of(MODEL, examples, dtype)
    exact = logits_of(deepcopy(MODEL).double(), examples, torch.float64)
    floor = 8 * torch.finfo(dtype).eps * np.abs(exact).max()
    assert np.abs(once - exact).max() <= 2 * np.abs(each - exact).max() + floor
    assert all(torch.equal(p, before[name]) for name, p in MODEL.named_parameters())


# ---------------------------------------------------------------- predict


def test_answers_come_in_the_order_of_the_file(folder, tmp_path, capsys, small_blocks):
    """Over several blocks, each answer that of its text alone; a blank row has none."""
    path = write(tmp_path / "a.csv", 50)
    lines = path.read_text().splitlines()
    lines.insert(20, ",pos")
    path.write_text("\n".join(lines) + "\n")
    answers = call(capsys, "predict", "--model", folder, "--data", path, "--quiet").answers
    assert [a["text"] for a in answers] == text_of(path)
    assert [i for i, a in enumerate(answers) if a["label"] is None] == [19]
    for place in (0, 15, 16, 50):
        (alone,) = call(capsys, "predict", "--model", folder, answers[place]["text"]).answers
        assert alone["label"] == answers[place]["label"]
        assert alone["scores"] == pytest.approx(answers[place]["scores"], abs=2e-6)


def test_answers_have_the_ids_of_their_rows(folder, tmp_path, capsys, monkeypatch):
    """What a row is called comes first in its answer, over several blocks, under any column's
    name; without such a column there is no `id`."""
    monkeypatch.setattr(texts, "ROWS", 2)
    path = tmp_path / "a.csv"
    path.write_text("id,text,other\nx,good,1\ny,,2\nz,bad film,3\nx,good,4\n")
    flags = ("predict", "--model", folder, "--data", path, "--text_column", "text")
    answers = call(capsys, *flags).answers
    assert [(a["id"], a["text"]) for a in answers] == [
        *(("x", "good"), ("y", ""), ("z", "bad film"), ("x", "good")),
    ]
    assert {next(iter(a)) for a in answers} == {"id"}
    answers = call(capsys, *flags, "--id_column", "other").answers
    assert [a["id"] for a in answers] == ["1", "2", "3", "4"]
    path.write_text("text\ngood\n")
    assert "id" not in call(capsys, *flags).answers[0]


def test_an_output_file_is_whole_or_not_there(folder, tmp_path, capsys, small_blocks):
    """The answers are those of stdout; a row that stops the run leaves an older file as it was."""
    data, out = write(tmp_path / "a.csv", 40), tmp_path / "answers.jsonl"
    flags = ("predict", "--model", folder, "--data", data)
    printed = call(capsys, *flags).out
    result = call(capsys, *flags, "--output_file", out)
    assert (result.status, result.out) == (0, "")
    assert out.read_text(encoding="utf-8") == printed
    result = call(capsys, *flags, "--output_file", out, "--max_seq_length", 12, "--overflow",
                  "error")  # fmt: skip
    assert_one_line(result, "longer than 12 tokens: raise --max_seq_length, or --overflow cut")
    assert out.read_text(encoding="utf-8") == printed
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "answers.jsonl"]
    rows, link = data.read_bytes(), tmp_path / "link.jsonl"
    link.symlink_to(data)
    for same in (data, link):
        assert_one_line(call(capsys, *flags, "--output_file", same), "is --data: choose another")
    assert data.read_bytes() == rows
    for other in (".", tmp_path, "/dev/null"):
        result = call(capsys, *flags, "--output_file", other)
        assert_one_line(result, "expected a file for the answers, found something else")


# ---------------------------------------------------------------- settings


def arguments(*words: str):
    return make_parser()[0].parse_args(["eval", "--model", "m", "--data", "d", *words])


def test_the_settings_of_the_folder_count_unless_others_are_given():
    config = ModelConfig.from_hf(tiny_config(task_settings={"text_column": "a", "overflow": 3,
                                                            "ours": 1}))  # fmt: skip
    assert as_trained(arguments(), config).text_column == "a"
    assert as_trained(arguments(), config).overflow == "cut"  # a number is no way to cut
    assert as_trained(arguments("--text_column", "b"), config).text_column == "b"


def test_a_setting_that_the_task_does_not_read_is_refused(folder, tmp_path, capsys):
    data = write(tmp_path / "a.csv", 4)
    config = ModelConfig.from_hf(tiny_config(architectures=["BertForMaskedLM"]))
    with pytest.raises(InputError, match="--label_column is not read by --task mlm: leave it out"):
        as_trained(arguments("--label_column", "x"), config)
    flags = ("--data", data, "--max_dropped", "2")
    result = call(capsys, "eval", "--model", folder, *flags)
    assert_one_line(result, "expected max_dropped in [0, 1), got 2")


def test_every_task_gives_blocks():
    """eval and predict know no more of a task than its interface."""
    tasks = answering.TASKS.values()
    assert all("blocks" in {n for c in kind.__mro__[:-2] for n in vars(c)} for kind in tasks)
