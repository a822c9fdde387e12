"""`minift generate`: what is continued, what is printed, what is refused; `eval` of responses."""

import json

import pytest
from tiny import assert_one_line, call, settings_kept

from minift.tasks.instruct import prompts

SMALL = ('model_type = "gpt2"\nn_embd = 16\nn_layer = 1\nn_head = 2\nn_positions = 32\n'
         "vocab_size = 280\n")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learned responses, and one that has learned running text, for a moment."""
    path = tmp_path_factory.mktemp("models")
    (path / "small.toml").write_text(SMALL)
    (path / "text.txt").write_text("the cat sat on the mat\n" * 40)
    rows = [{"en": f"{w} cat", "zh": f"{w} dog"} for w in "a the one my our".split()] * 4
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture
def models(folder, capsys):
    flags = ("--max_steps", 3, "--lr", 1e-2, "--threads", 1, "--quiet", "--batch_size", 4)
    flags = ("--config_name", folder / "small.toml", *flags)
    if not (folder / "writer").exists():
        files = ("--train", folder / "text.txt", "--output", folder / "writer")
        assert call(capsys, "train", "--task", "lm", *files, *flags).status == 0
        files = ("--train", folder / "pairs.jsonl", "--output", folder / "answers")
        fields = ("--prompt_template", r"{en}\n", "--response_template", "{zh}")
        assert call(capsys, "train", "--task", "instruct", *files, *fields, *flags).status == 0
    return folder


def generate(capsys, model, *more):
    return call(capsys, "generate", "--model", model, "--max_new_tokens", 4, *more)


def test_texts_and_prompts_are_continued_in_their_order(capsys, models):
    """Words and --prompt are the same; stdout holds a JSON object a text and nothing else."""
    result = generate(capsys, models / "writer", "the", "--prompt", "the cat")
    assert result.status == 0, result.err
    assert [answer["text"] for answer in result.answers] == ["the", "the cat"]
    assert all(a["end"] in ("length", "eos") and "answer" in a for a in result.answers)
    assert "2 texts in" in result.err


def test_a_stream_is_the_answer(capsys, models):
    """As plain text, the same as in JSON."""
    whole = generate(capsys, models / "writer", "the").answers[0]["answer"]
    assert generate(capsys, models / "writer", "the", "--stream").out == whole + "\n"


def test_a_model_of_responses_uses_its_template(capsys, models):
    """A text is put where the field is; of a file the records' fields are; --raw leaves it."""
    model = models / "answers"
    assert generate(capsys, model, "my cat").answers[0]["text"] == "my cat\n"
    assert generate(capsys, model, "my cat", "--raw").answers[0]["text"] == "my cat"
    answers = generate(capsys, model, "--data", models / "pairs.jsonl").answers
    assert [answer["text"] for answer in answers[:2]] == ["a cat\n", "the cat\n"]
    assert len(answers) == 20


def test_eval_measures_the_responses(capsys, models):
    """Perplexity of those in the file, and what is written compared with all that answer the same
    prompt."""
    flags = ("--model", models / "answers", "--data", models / "pairs.jsonl", "--max_new_tokens", 6)
    found = call(capsys, "eval", *flags).summary
    names = "loss perplexity bleu chrf rouge1 rouge2 rougeL exact_match f1".split()
    assert all(found[f"eval_{name}"] >= 0 for name in names)
    text = call(capsys, "eval", "--model", models / "writer", "--data", models / "text.txt")
    assert {"eval_bits_per_byte", "eval_loss_per_character"} < text.summary.keys()
    assert "eval_bleu" not in text.summary


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("",), ("text:1", "empty")),
        (("cat " * 40,), ("at most 31 tokens", "cut it")),
        (("a", "--max_new_tokens", "0"), ("max_new_tokens",)),
        (("a", "b", "--stream"), ("one text", "got 2")),
        (("a", "--temprature", "1"), ("did you mean '--temperature'?",)),
        (("a", "--temperature", "1", "--num_beams", "2"), ("num_beams 2",)),
    ],
)
def test_bad_input_is_one_line(capsys, models, words, parts):
    """Status 2, and nothing on stdout."""
    assert_one_line(generate(capsys, models / "writer", *words), *parts)


def test_what_does_not_write_is_refused(capsys, models, tmp_path):
    """A missing folder, a template of other fields."""
    assert_one_line(generate(capsys, tmp_path / "none", "a"), str(tmp_path / "none"))
    (tmp_path / "other.jsonl").write_text('{"english": "a"}\n')
    result = generate(capsys, models / "answers", "--data", tmp_path / "other.jsonl")
    assert_one_line(result, "other.jsonl:1", "no field 'en'")


def test_predict_says_who_can(capsys, models):
    """A model that writes has no labels."""
    result = call(capsys, "predict", "--model", models / "writer", "a")
    assert_one_line(result, "minift generate")


def test_rows_of_a_file_that_cannot_be_continued_are_null(capsys, models, tmp_path):
    """The others have their answers, in their lines; stderr counts."""
    texts = ["the cat", " ", "cat " * 60, "the mat"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = generate(capsys, models / "writer", "--data", path)
    assert [a["end"] for a in result.answers][1:3] == ["blank", "too long"]
    assert [a["answer"] is None for a in result.answers] == [False, True, True, False]
    assert result.answers[3] | {"text": ""} == (
        generate(capsys, models / "writer", "x", "x", "x", "the mat").answers[3] | {"text": ""}
    )
    assert "WARNING: 2 of 4 texts are blank or too long" in result.err


def test_a_chat_is_continued_where_the_answer_is_wanted(tmp_path):
    """Answers at its end are what eval compares with: they are no part of the prompt."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (asked,) = prompts(str(tmp_path / "chat.jsonl"), "{prompt}")
    assert asked.prompt() == "user: hi\nassistant:"


def test_prompts_that_are_too_long_do_not_stop_eval(capsys, models, tmp_path):
    """They are counted and left out; so are answers that were cut."""
    rows = [{"en": "a cat", "zh": "a dog"}, {"en": "cat " * 60, "zh": "dog"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", models / "answers", "--data", tmp_path / "long.jsonl")
    result = call(capsys, "eval", *flags, "--max_new_tokens", 1)
    assert result.status == 0, result.err
    assert "1 of 2 prompts are too long" in result.err
