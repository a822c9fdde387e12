"""bench/tasks.py and what it stands on: both trainers get the same rows, their answers go to the
right rows, one arithmetic measures them, and README says what came out."""

import itertools
import json
import sys
from types import SimpleNamespace

import bench_package  # noqa: F401
import fake_results
import numpy as np
import pytest
from tiny import VOCABULARY, tiny_model

from bench import task_data, task_peer, task_scores, task_tables, tasks
from bench.rows import Missing
from minift.cli import make_parser
from minift.text_metrics import exact_match, token_f1

WORDS = "the good zq film was x".split()  # zq has two pieces
CONTEXT = "we saw the film today . the book was a good day , and it was fine ."


# ------------------------------------------------------------------------ data


def squad(questions: list[tuple[str, str, list[tuple[str, int]]]]) -> str:
    """The text of a file with a paragraph for each question."""
    data = [
        {"title": "t", "paragraphs": [{"context": context, "qas": [
            {"id": str(i), "question": question,
             "answers": [{"text": t, "answer_start": s} for t, s in answers]}]}]}
        for i, (question, context, answers) in enumerate(questions)
    ]  # fmt: skip
    return json.dumps({"version": "1.1", "data": data})


@pytest.mark.parametrize(
    ("name", "text", "rows", "right"),
    [
        ("sst2", 'a "b\u2028c\t1\n d\t0\ne\t1\n',
         [{"text": 'a "b\u2028c', "label": "1"}, {"text": " d", "label": "0"}], ["1", "0"]),
        ("stsb", "score\tsentence1\tsentence2\n4.4\ta\tb\n0\tc\td\n1\te\tf\n",
         [{"text": "a", "text_pair": "b", "label": 4.4},
          {"text": "c", "text_pair": "d", "label": 0.0}], [4.4, 0.0]),
        ("wnut17", "\nNew\u0085\tB-location\nYork\tI-location\n\t\n\nhi\tO\n\n\nx\tO\n",
         [{"words": ["New\u0085", "York"], "tags": ["B-location", "I-location"]},
          {"words": ["hi"], "tags": ["O"]}], [["B-location", "I-location"], ["O"]]),
        ("squad_subset", squad([("q", "a b b", [("b", 2), ("b b", 2)]), ("r", "a", [("a", 0)]),
                                ("s", "c", [("c", 0)])]),
         [{"id": "0", "question": "q", "context": "a b b", "answers": ["b", "b b"],
           "starts": [2, 2]},
          {"id": "1", "question": "r", "context": "a", "answers": ["a"], "starts": [0]}],
         [["b", "b b"], ["a"]]),
    ],
)  # fmt: skip
def test_what_is_written_is_what_was_read(tmp_path, name, text, rows, right):
    """The first two of three rows of each form of data, to the character."""
    data = task_data.DATA[name]
    for file in (data.train, data.dev):
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    assert task_data.write_data(name, tmp_path / "data", 2, tmp_path) == right
    for part in ("train", "dev"):
        file = task_data.file_of(tmp_path, data.task, part)
        assert task_data.written(data.task, file) == rows


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"stsb/train\.tsv: expected a file: give its folder"):
        task_data.write_data("stsb", tmp_path, None, tmp_path)


# ---------------------------------------------------------------------- scores


def test_answers_to_questions_are_measured_as_squad_does():
    """Case, punctuation and articles do not count; the best of several answers does. minift's own
    text metrics, written apart from these, agree."""
    right = [["The Cat!"], ["in the year 1520", "1520"], ["a b c d"], ["x"], ["the"]]
    given = ["cat", "1520", "b c. e", "y", "an"]
    found = task_scores.score("qa", right, given)
    # Of "the" and "an" nothing is left: equal, but without a common word.
    assert found == pytest.approx({"exact_match": 3 / 5, "f1": (1 + 1 + 2 * 2 / 6 + 0 + 0) / 5})
    assert 100 * found["exact_match"] == pytest.approx(exact_match(given, right))
    worded = task_scores.score("qa", right[:4], given[:4])
    assert 100 * worded["f1"] == pytest.approx(token_f1(given[:4], right[:4]))
    assert task_scores.score("qa", [["x"]], [None]) == {"exact_match": 0, "f1": 0}


def test_tags_are_measured_by_words_and_by_entities():
    """An entity counts when all of it is right; a word without a tag is wrong, and in none."""
    right = [["B-x", "I-x", "O"], ["B-y", "O"]]
    given = [["B-x", "I-x", "B-x"], ["B-y", None]]
    found = task_scores.score("tagging", right, given)
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": 2 * 2 / (2 + 3)})
    assert task_scores.score("tagging", [["NOUN"]], [["VERB"]]) == {"accuracy": 0.0}
    assert task_scores.score("tagging", [["B-x"]], [["O"]])["f1"] == 0


def test_numbers_and_labels_are_measured():
    """Pearson's r of what rises alike is 1; where all answers are the same it is 0, no warning."""
    found = task_scores.score("regression", [1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
    assert found == pytest.approx({"pearson": 1.0, "mse": (4 + 9 + 25) / 3})
    assert task_scores.score("regression", [1.0, 2.0], [3.0, 3.0])["pearson"] == 0
    assert task_scores.score("classification", ["a", "b"], ["a", None]) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="expected 2 answers, got 1"):
        task_scores.score("classification", ["a", "b"], ["a"])


# -------------------------------------------------- the examples of transformers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    return transformers.BertTokenizerFast(str(file))


def test_a_word_is_tagged_at_its_first_piece(tokenizer):
    """And there alone; what is cut or has no piece gets no tag, all others their own."""
    tags = [f"T{i}" for i in range(7)]
    row = {"words": [*WORDS, "\u200b"], "tags": tags}
    numbers = {tag: i for i, tag in enumerate(tags)}
    (example,) = task_peer.encode_words([row], tokenizer, numbers, 32)
    pieces = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert pieces == ["[CLS]", "the", "good", "z", "##q", "film", "was", "x", "[SEP]"]
    assert example["labels"] == [-100, 0, 1, 2, -100, 3, 4, 5, -100]
    padded = [*example["labels"], -100]
    assert task_peer.tags_of(row, example["begins"], padded, tags) == [*tags[:6], None]
    (cut,) = task_peer.encode_words([row], tokenizer, numbers, 5)
    given = task_peer.tags_of(row, cut["begins"], cut["labels"], tags)
    assert given == [*tags[:3], *[None] * 4]


def test_answers_lie_in_the_windows_that_hold_them(tokenizer, monkeypatch):
    """Every answer of every span of words, with windows of any width: where a window has all its
    tokens it is found there, to the character; else it is at [CLS]. No word is in no window."""
    monkeypatch.setattr(task_peer, "STRIDE", 3)
    words = CONTEXT.split()
    begins = [len(" ".join(words[:i])) + (i > 0) for i in range(len(words))]
    rows = []
    for i, n in itertools.product(range(len(words)), (1, 3)):
        text = " ".join(words[i : i + n])
        rows.append({"question": " was it ? ", "context": CONTEXT, "answers": [text],
                     "starts": [begins[i]]})  # fmt: skip
    examples = task_peer.encode_questions(rows, tokenizer, 16)
    assert len(examples) > 2 * len(rows)
    seen = [0] * len(rows)
    for example in examples:
        row = rows[example["row"]]
        held = {span for span in example["spans"] if span}
        wanted = {(b, b + len(w)) for b, w in zip(begins, words, strict=True)
                  if row["starts"][0] <= b < row["starts"][0] + len(row["answers"][0])}  # fmt: skip
        first, last = example["start_positions"], example["end_positions"]
        if wanted <= held:
            begin, end = example["spans"][first][0], example["spans"][last][1]
            assert CONTEXT[begin:end] == row["answers"][0]
            seen[example["row"]] += 1
        else:
            assert (first, last) == (0, 0)
        assert len(example["spans"]) == len(example["input_ids"]) <= 16
    assert all(seen)


def test_the_best_pair_of_tokens_is_the_answer(monkeypatch):
    """Beside a search of all pairs: of two windows the better one, no pair from back to front, none
    that is too long, none outside the context."""
    monkeypatch.setattr(task_peer, "LONGEST", 2)
    context = "a bc d ef"
    spans = [None, (0, 1), (2, 4), (5, 6), (7, 9), None]
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores = draw.normal(size=(2, 2, 8)).astype(np.float32)  # wider than the windows: padded
        scores[..., 0] = scores[..., 6:] = 9
        examples = [{"row": 0, "spans": spans}, {"row": 0, "spans": [None, *spans[3:]]}]
        best = max(
            (scores[w, 0, i] + scores[w, 1, j], context[here[i][0] : here[j][1]])
            for w, here in enumerate(example["spans"] for example in examples)
            for i in range(len(here))
            for j in (i, i + 1)
            if j < len(here) and here[i] and here[j]
        )[1]
        found = task_peer.best_texts([{"context": context}], examples, scores[:, 0], scores[:, 1])
        assert found == [best]


def test_only_the_likeliest_tokens_are_tried(monkeypatch):
    """With one of each, which do not go together, there is no answer; with two there is."""
    examples = [{"row": 0, "spans": [None, (0, 1), (2, 3)]}]
    scores = [[0, 1, 3]], [[0, 3, 2]]
    monkeypatch.setattr(task_peer, "LIKELIEST", 1)
    assert task_peer.best_texts([{"context": "a b"}], examples, *scores) == [""]
    monkeypatch.setattr(task_peer, "LIKELIEST", 2)
    assert task_peer.best_texts([{"context": "a b"}], examples, *scores) == ["b"]


class Peer:
    """A Trainer whose predictions tell what it was given, padded as batches are."""

    def __init__(self, task: str):
        self.task, self.args, self.lengths = task, SimpleNamespace(), []

    def predict(self, rows):
        self.lengths = [len(row["input_ids"]) for row in rows]
        first = np.array([row["input_ids"][0] for row in rows])
        if self.task == "qa":  # the likeliest token is the one that the first id names
            scores = -np.abs(np.arange(6) - first[:, None]).astype(np.float32)
            return SimpleNamespace(predictions=(scores, scores))
        return SimpleNamespace(predictions={
            "regression": first[:, None] / 8,
            "classification": np.eye(6)[first],
            "tagging": np.broadcast_to(first[:, None], (len(rows), 9)),
        }[self.task])  # fmt: skip


@pytest.mark.parametrize("task", ["classification", "regression", "tagging", "qa"])
def test_answers_go_to_their_rows(task):
    """Although the longest are asked first, for little padding; the Trainer may not order them."""
    firsts, sizes = (1, 2, 3, 4), (2, 5, 3, 4)
    spans = [None, (0, 1), (1, 2), (2, 3), (3, 4)]
    dev = [{"input_ids": [k] * n, "row": i, "spans": spans, "begins": [None, 0]}
           for i, (k, n) in enumerate(zip(firsts, sizes, strict=True))]  # fmt: skip
    rows = [{"context": "abcd", "words": ["x"]}] * 4
    peer = Peer(task)
    given = task_peer.answer(peer, {"task": task}, rows, dev, list("zabcd"))
    right = {"regression": [k / 8 for k in firsts], "tagging": [[c] for c in "abcd"]}
    assert given == right.get(task, list("abcd"))
    assert peer.lengths == sorted(sizes, reverse=True)
    assert peer.args.train_sampling_strategy == "sequential"


def test_the_trainer_trains_what_is_asked(tmp_path):
    """A step of tagging, as bench.tasks asks for it: an answer to each word, and what it took."""
    pytest.importorskip("accelerate")
    model = tiny_model(tmp_path / "model")
    task_data.write_rows("tagging", [{"words": WORDS, "tags": list("ABABAB")}] * 3,
                         tmp_path / "train.conll")  # fmt: skip
    (tmp_path / "dev.conll").write_bytes((tmp_path / "train.conll").read_bytes())
    args = SimpleNamespace(model=str(model), threads=1, epochs=1, max_steps=1, learning_rate=0.1)
    settings = tasks.settings_of(args, "wnut17", "bf16", 0) | {"max_seq_length": 32}
    facts, answers = task_peer.run(tmp_path, settings)
    assert facts["steps"] == 1
    assert facts["trainer"].startswith("transformers ")
    assert [[tag in "AB" for tag in row] for row in answers] == [[True] * 6] * 3


# ------------------------------------------------------------------ both in turn


@pytest.mark.parametrize("name", list(task_data.DATA))
def test_minift_is_told_what_the_trainer_is_told(name, tmp_path):
    """Its command line has the flags, with the same values; evaluated once, at the end."""
    args = SimpleNamespace(model="M", threads=2, epochs=None, max_steps=7, learning_rate=None)
    settings = tasks.settings_of(args, name, "bf16", 5)
    command = tasks.train_command(settings, tmp_path, tmp_path / "out")
    parsed, left = make_parser()[0].parse_known_args(command[3:])
    assert not left
    for key, value in settings.items():
        key = "model_name_or_path" if key == "model" else key
        assert getattr(parsed, key) == value, key
    assert parsed.eval_steps > 10**8
    assert parsed.validation_file == str(task_data.file_of(tmp_path, settings["task"], "dev"))
    assert set(task_peer.GIVEN) <= set(settings)


def test_runs_take_turns_and_are_summed_up(tmp_path, monkeypatch, capsys):
    """A line for each run, in turn, with the metrics of its answers; the summary at the end."""
    (tmp_path / "sst2").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "sst2" / f"{part}.tsv").write_text("a\t1\nb\t0\nc\t1\nd\t1\n")

    def fake(trainer, seconds, answers):
        def train(settings, data, folder):
            facts = {"trainer": trainer, "train_runtime": seconds * (1 + settings["seed"])}
            return facts | {"eval_runtime": 1.0}, answers[settings["seed"]]

        return train

    monkeypatch.setattr(tasks, "run_minift", fake("minift", 2.0, ["1010", "1011"]))
    monkeypatch.setattr(tasks, "run_peer", fake("transformers 5", 5.0, ["1011", "1011"]))
    (tmp_path / "MiniMe").mkdir()
    words = ["--data", tmp_path, "--tasks", "sst2", "--seeds", 0, 1, "--out", tmp_path / "out",
             "--model", tmp_path / "MiniMe"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench.tasks", *map(str, words)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert (tmp_path / "out").read_text().splitlines() == lines
    runs = [json.loads(line) for line in lines]
    assert [(row["trainer"], row["seed"]) for row in runs] == [
        ("minift", 0), ("transformers 5", 0), ("minift", 1), ("transformers 5", 1),
    ]  # fmt: skip
    assert [row["metrics"]["accuracy"] for row in runs] == [0.75, 1, 1, 1]
    assert {row["model"] for row in runs} == {"MiniMe"}
    assert json.loads(last)["sst2"] == pytest.approx({
        "minift_accuracy": 0.875, "minift_accuracy_sd": 0.25 / 2**0.5,
        "transformers_accuracy": 1.0, "transformers_accuracy_sd": 0.0,
        "minift_train_runtime": 3.0, "transformers_train_runtime": 7.5,
        "minift_eval_runtime": 1.0, "transformers_eval_runtime": 1.0,
        "ratio_of_train_runtime_to_transformers": 2.5,
        "ratio_of_eval_runtime_to_transformers": 1.0,
    })  # fmt: skip


def test_ratios_are_of_the_same_seed():
    """Their median: one slow run changes it little. Whatever the order of the rows."""
    ours = [{"seed": s, "t": t} for s, t in ((0, 1.0), (1, 10.0), (2, 2.0))]
    theirs = [{"seed": s, "t": t} for s, t in ((2, 5.0), (0, 2.0), (1, 90.0))]
    assert task_tables.median_ratio(ours, theirs, "t") == 2.5


# ----------------------------------------------------------------------- README


def test_the_table_says_what_the_rows_say():
    """A line for each metric, the times once; runs that were cut short or are of another model or
    dtype do not count."""
    rows = fake_results.task_rows()
    short = [
        {**rows[0], **change, "metrics": {"f1": 9.0}, "utc": "2026-03-01T11:00:00Z"}
        for change in ({"rows": 64}, {"max_steps": 3}, {"dtype": "fp32"}, {"model": "x"})
    ]
    text = task_tables.tasks([*rows, *short]).replace("\n", " ")
    for words in (
        "MiniLM on two cores of an Intel Xeon with AMX, torch 2.13.0, bf16: WNUT-17 three epochs "
        "at 0.0001 in batches of 16, SQuAD one epoch at 0.0001 in batches of 16; AdamW, linear "
        "decay after 20 steps. Means and standard deviations of three seeds",
        "transformers 5.23's Trainer at its best",
        "| `--task tagging` | WNUT-17 | entity F1 | 0.3750 ± 0.1250 | 0.2500 ± 0.0000 | 2.0 min | "
        "3.0 min | 1.50 |",
        "| `--task qa` | SQuAD, 4,378 questions | F1 | 0.6250 ± 0.1250 | 0.5000 ± 0.0000 |",
        "| | | exact match | 0.5000 ± 0.1250 | 0.3750 ± 0.0000 | | | |",
    ):
        assert words in text, words
    assert task_tables.tasks([]) == task_tables.tasks(short[:1]) == ""


def test_seeds_that_differ_are_told():
    """Between the trainers, or between data sets."""
    rows = fake_results.task_rows()
    with pytest.raises(Missing, match=r"tasks.jsonl: squad_subset: expected runs of the same seed"):
        task_tables.tasks(rows[:-1])
    with pytest.raises(Missing, match=r"expected the same seeds of every data set"):
        task_tables.tasks(rows[:-2])
