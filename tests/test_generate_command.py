"""minift.generate_command: a JSON object a text on stdout, or its answer as it comes."""

import json

import pytest
from test_stream_text import TEXTS, folder
from tiny import tiny_model

from minift import InputError, generate_command, load
from minift.cli import Parser
from minift.sampling import GenerateConfig
from minift.stream_text import generate_text


def run(*words: object) -> int:
    """The command, with the flags that every command has."""
    parser = Parser("minift generate")
    parser.add_argument("--quiet", action="store_true")
    generate_command.add_arguments(parser)
    model = () if "--model" in words else ("--model", folder().name)
    given = map(str, ("--device", "cpu", *model, *words))
    return generate_command.run(parser.parse_args([*given]))


def answered(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def expected(**given) -> list[str]:
    model, tokenizer = load(folder().name, head="lm")
    return generate_text(model, tokenizer, TEXTS, GenerateConfig(**given))


def test_an_object_a_text_in_their_order(capsys):
    """However they end, with fewer slots than texts; flags reach the configuration."""
    flags = ("--max_new_tokens", 9, "--temperature", 1.0, "--seed", 4, "--batch_size", 2)
    assert run(*TEXTS, *flags) == 0
    answers = answered(capsys)
    assert [answer["text"] for answer in answers] == TEXTS
    want = expected(max_new_tokens=9, temperature=1.0, seed=4)
    assert [answer["answer"] for answer in answers] == want
    assert {answer["end"] for answer in answers} == {"length"}


def test_a_file_and_lines_of_stdin_give_the_same(capsys, tmp_path, monkeypatch):
    """A text is drawn by its place among all, wherever it stands."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    flags = ("--max_new_tokens", 5, "--temperature", 1.0)
    run("--data", file, *flags)
    want = answered(capsys)
    assert len(want) == len(TEXTS)
    with open(file) as lines:
        monkeypatch.setattr("sys.stdin", lines)
        run(*flags)
    assert answered(capsys) == want


def test_a_stream_is_the_answer_alone(capsys):
    assert run(TEXTS[0], "--stream", "--max_new_tokens", 12) == 0
    assert capsys.readouterr().out == expected(max_new_tokens=12)[0] + "\n"


def test_stop_strings_may_be_several(capsys):
    """The first that comes ends the answer."""
    whole = expected(max_new_tokens=20, temperature=1.0)[3]
    first, second = whole[3:5], whole[6:8]
    flags = ("--max_new_tokens", 20, "--temperature", 1.0, "--stop", second, "--stop", first)
    run(*TEXTS, *flags)
    answer = answered(capsys)[3]
    assert (answer["answer"], answer["end"]) == (whole[: whole.index(first)], "stop")


def test_answers_that_meet_the_last_position_are_counted(capsys):
    """A warning on stderr says how many; what was made is there."""
    run("a" * 60, "a", "--max_new_tokens", 10)
    out, err = capsys.readouterr()
    assert [json.loads(line)["end"] for line in out.splitlines()] == ["positions", "length"]
    assert "WARNING: 1 of 2 answers end where the model's 64 positions end" in err
    run("a" * 60, "--max_new_tokens", 3, "--quiet")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a" * 64], "prompt 1: expected at most 63 tokens"),
        (["a", ""], "text:2: expected a text to continue, got an empty one"),
        (["a", "b", "--stream"], "expected one text with --stream, got 2"),
        (["a", "--max_new_tokens", "0"], "expected max_new_tokens between 1"),
        (["a", "--num_beams", "2", "--temperature", "1"], "expected temperature 0 with num_beams"),
        (["a", "--top_p", "x"], "invalid float value"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    with pytest.raises(InputError, match=message):
        run(*words)
    assert capsys.readouterr().out == ""


def test_an_encoder_is_refused(tmp_path):
    model = tiny_model(tmp_path / "bert")
    with pytest.raises(InputError, match="expected a GPT-2 that predicts tokens"):
        run("a", "--model", model)
