"""Words on a command line and names in a TOML file, up to the call of a command."""

import importlib.metadata
import io
import os
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
from tiny import assert_one_line, call, settings_kept

from minift import answering, cli, commands
from minift.cli import configurations, main, make_parser, normalise
from minift.config import RunConfig, TrainConfig
from minift.errors import InputError
from minift.methods import OF_METHODS
from minift.train import Diverged


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture
def parse(tmp_path):
    """(RunConfig, TrainConfig) of the words after `train`, with a TOML file when there is text."""

    def parse(*words: str, toml: str | None = None):
        if toml is not None:
            (tmp_path / "c.toml").write_text(toml, encoding="utf-8")
            words = ("--config", str(tmp_path / "c.toml"), *words)
        args, left = make_parser()[0].parse_known_args(normalise(["train", *words]))
        assert not left
        return configurations(args)

    return parse


@pytest.fixture
def command(monkeypatch):
    """Puts a function in the place of all commands, or an exception that they raise."""

    def put(what):
        def run(args):
            if isinstance(what, BaseException):
                raise what
            return what(args)

        for module in (answering, commands):
            monkeypatch.setattr(module, "run", run)

    return put


# ------------------------------------------------------------------ flags


@pytest.mark.parametrize("config", [RunConfig, TrainConfig])
def test_every_field_has_a_flag_under_all_its_names(parse, config):
    for f in fields(config):
        kinds = {str: "cpu", int: "3", float: "0.5"}
        word = (f.metadata["choices"] or (kinds.get(f.type),))[-1]
        of = [methods[-1] for methods, names in OF_METHODS.items() if f.name in names]
        method = [word for name in of for word in ("--method", name)]  # that reads it
        for name in (f.name, *f.metadata["aliases"]):
            for spelled in (name, name.replace("_", "-")):
                if f.type is bool:
                    run, train = parse(f"--{spelled}", *method)
                    expected = True
                else:
                    run, train = parse(f"--{spelled}", word, *method)
                    expected = f.type(word)
                    assert parse(f"--{spelled}={word}", *method) == (run, train)
                assert getattr(run if config is RunConfig else train, f.name) == expected


def test_the_short_names(parse):
    """Those of the README; a script that has them must not break."""
    run, train = parse(
        *("--model", "m", "--train", "t", "--validation", "v", "--test", "e", "--output", "o"),
        *("--lr", "1e-3", "--epochs", "2", "--batch-size", "8"),
    )
    assert run == RunConfig(
        model_name_or_path="m", train_file="t", validation_file="v", test_file="e", output_dir="o"
    )
    assert train == TrainConfig(
        learning_rate=1e-3, num_train_epochs=2.0, per_device_train_batch_size=8
    )


def test_no_flags_are_the_defaults(parse):
    assert parse() == (RunConfig(), TrainConfig())


def test_only_names_lose_their_dashes():
    words = ["train", "--learning-rate=1e-3", "--text-column", "my-text", "--freeze=a-b"]
    assert normalise(words) == [
        *("train", "--learning_rate=1e-3", "--text_column", "my-text", "--freeze=a-b"),
    ]
    assert normalise(["predict", "--max-seq-length", "9", "--", "--a-b", "--"]) == [
        *("predict", "--max_seq_length", "9", "--", "--a-b", "--"),
    ]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train", "--lerning-rate", "1"), ("'--lerning_rate'", "'--learning_rate'")),
        (("train", "--lerning_rate=1"), ("'--lerning_rate': did you mean '--learning_rate'?",)),
        (("train", "--epoch", "1"), ("did you mean '--epochs'?", "minift train --help")),
        (("eval", "--model", "m", "--data", "d", "--quite"), ("did you mean '--quiet'?",)),
        (("predict", "--model", "m", "--devise", "cpu"), ("did you mean '--device'?",)),
        (("demo", "--seeds", "1"), ("did you mean '--seed'?",)),
        (("inspect", "m", "--xyzzyx"), ("unknown '--xyzzyx' (see minift inspect --help)",)),
        (("train", "word"), ("unknown 'word'",)),
        (("--versoin",), ("did you mean '--version'?",)),
        (("trian",), ("'trian'", "'train'", "'predict'")),
        (("train", "--lr", "fast"), ("--learning_rate/--lr", "invalid float value: 'fast'")),
        (("train", "--max_steps", "1.5"), ("--max_steps", "invalid int value: '1.5'")),
        (("predict", "--top_k", "-1"), ("--top_k", "expected a whole number from 0, got '-1'")),
        (("predict", "--top_k", "x"), ("--top_k", "expected a whole number from 0, got 'x'")),
        (("train", "--dtype", "fp8"), ("--dtype", "'fp8'", "'auto', 'fp32', 'bf16'")),
        (("train", "--lr"), ("--lr: expected one argument",)),
        (("train", "--lr", "nan"), ("expected learning_rate between 0 and 1000, got nan",)),
        (("train", "--validation_split=2"), ("expected validation_split in (0, 1), got 2.0",)),
        (("eval",), ("required: --data/--test_file/--test",)),
        (("predict", "text"), ("expected --model, or --adapter with its own base, got none",)),
        (("inspect",), ("required: DIR",)),
        (("train",), ("expected --model_name_or_path, or ", "got none: see minift train --help")),
        (("train", "--model", "m", "--config_name", "c"), ("got both",)),
        (("train", "--model", "m"), ("expected --train_file",)),
        (("train", "--model", "m", "--train", "t"), ("expected --output_dir",)),
    ],
)
def test_wrong_words_are_one_line(capsys, words, parts):
    assert_one_line(call(capsys, *words), *parts)


def test_flags_are_not_abbreviated(capsys):
    """--save would change its meaning with every new flag that begins with it."""
    assert_one_line(call(capsys, "train", "--save", "3"), "unknown '--save'")


# ------------------------------------------------------------------- help


def test_no_command_is_a_request_for_help(capsys):
    result = call(capsys)
    assert (result.status, result.err) == (0, "")
    for name, text in cli.COMMANDS.items():
        assert name in result.out
        assert text in result.out


def test_version(capsys):
    result = call(capsys, "--version")
    assert (result.status, result.out) == (0, f"minift {importlib.metadata.version('minift')}\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(capsys, name):
    """A % in a help text, or a width that argparse cannot wrap, would break it."""
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert cli.COMMANDS[name] in " ".join(capsys.readouterr().out.split())


def test_help_of_train_names_all_flags_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for config in (RunConfig, TrainConfig):
        for f in fields(config):
            assert f"--{f.name}" in out
            if f.type is float and f.default:
                assert f"({f.default})" in out
    assert "linear|cosine|constant" in out


# ------------------------------------------------------------------- TOML


def test_flags_win_over_the_file_and_the_file_over_defaults(parse):
    toml = "learning_rate = 1e-3\nseed = 7\nfreeze = 'embeddings'\n"
    run, train = parse("--seed", "8", "--output", "o", toml=toml + 'output_dir = "p"')
    assert train == TrainConfig(learning_rate=1e-3, seed=8, freeze="embeddings")
    assert run == RunConfig(output_dir="o")


def test_a_default_given_as_a_flag_wins_too(parse):
    """What was given must be told from what was not."""
    assert parse("--seed", "0", toml="seed = 7")[1].seed == 0


def test_names_in_a_file_are_those_of_flags(parse):
    toml = 'lr = 1e-3\nmax-steps = 5\n[data]\ntrain = "a.csv"\ntext-column = "2"\n[x]\nepochs = 2\n'
    run, train = parse(toml=toml)
    assert train == TrainConfig(learning_rate=1e-3, max_steps=5, num_train_epochs=2.0)
    assert run == RunConfig(train_file="a.csv", text_column="2")


def test_a_switch_in_a_file(parse):
    assert parse(toml="overwrite_output_dir = true")[0].overwrite_output_dir is True


def test_a_file_that_describes_a_model_is_one_to_make(parse, tmp_path):
    """--config and --config_name are easily taken for each other."""
    path = tmp_path / "small.toml"
    path.write_text('model_type = "gpt2"\nn_embd = 64\n')
    run, _ = parse("--config", str(path), "--train", "t")
    assert (run.config_name, run.train_file) == (str(path), "t")


def test_an_empty_file_is_all_defaults(parse):
    assert parse(toml="") == (RunConfig(), TrainConfig())


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("lerning_rate = 1", "unknown 'lerning_rate': did you mean 'learning_rate'"),
        ("xyzzyx = 1", "unknown 'xyzzyx'$"),
        ("learning_rate = '1e-3'", "expected learning_rate as float, got '1e-3'"),
        ("seed = 1.0", "expected seed as int, got 1.0"),
        ("seed = true", "expected seed as int, got True"),  # though True is an int in Python
        ("lr = true", "expected lr as float, got True"),
        ("text_column = 2", "expected text_column as str, got 2"),
        ("overwrite_output_dir = 1", "expected overwrite_output_dir as bool, got 1"),
        ("dtype = 'fp8'", "expected dtype as auto or fp32 or bf16, got 'fp8'"),
        ("freeze = ['head']", r"expected freeze as str, got \['head'\]"),
        ("seed = -1", "expected seed between 0 and"),
        ("learning_rate = nan", "expected learning_rate between 0 and 1000, got nan"),
        ("learning_rate 1", r"not TOML: .*line 1, column"),
        ("a = 1\na = 2\n", "not TOML: .*line 2"),
    ],
)
def test_wrong_names_and_values_in_a_file(parse, toml, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(toml=toml)
    assert len(str(caught.value).splitlines()) == 1


def test_a_whole_number_is_a_float_too(parse):
    value = parse(toml="learning_rate = 1")[1].learning_rate
    assert (value, type(value)) == (1.0, float)


def test_files_that_cannot_be_read(capsys, tmp_path):
    assert_one_line(
        call(capsys, "train", "--config", tmp_path / "no.toml"),
        str(tmp_path / "no.toml"),
        "No such file",
    )
    assert_one_line(call(capsys, "train", "--config", tmp_path), "Is a directory")
    (tmp_path / "latin.toml").write_bytes(b"freeze = '\xe9'")
    assert_one_line(call(capsys, "train", "--config", tmp_path / "latin.toml"), "not TOML")


# ---------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("expected this"), 2, "minift: expected this\n"),
        (Diverged("step 3: loss nan"), 1, "minift: step 3: loss nan\n"),
        (KeyboardInterrupt(), 130, "minift: interrupted; --resume_from_checkpoint auto goes on\n"),
    ],
)
def test_statuses(capsys, command, error, status, line):
    command(error)
    result = call(capsys, "inspect", "m")
    assert (result.status, result.out, result.err) == (status, "", line)


def test_a_command_says_its_status(capsys, command):
    command(lambda args: 0)
    assert call(capsys, "inspect", "m").status == 0


@pytest.mark.parametrize("error", [InputError("wrong"), Diverged("nan")])
def test_debug_shows_the_traceback(command, error):
    command(error)
    with pytest.raises(type(error)):
        main(["inspect", "m", "--debug"])


def test_debug_is_a_text_after_two_dashes(capsys, command):
    command(InputError("wrong"))
    assert_one_line(call(capsys, "predict", "--model", "m", "--", "--debug"), "wrong")


def test_our_own_mistakes_are_not_hidden(command):
    """Only what the user can mend is one line."""
    command(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "m"])


def test_texts_may_begin_with_dashes(capsys, command):
    command(lambda args: print(args.text) or 0)
    result = call(capsys, "predict", "--model", "m", "a", "--", "--b-c", "-d", "--model=x")
    assert result.out == "['a', '--b-c', '-d', '--model=x']\n"


def test_a_request_to_stop_leaves_by_an_exception(command):
    """So that half-written files are removed on the way."""
    command(lambda args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "m"])
    assert caught.value.code == 143


def test_the_tokenizer_is_told_once_and_the_user_is_heard(command, monkeypatch):
    seen = []
    command(lambda args: seen.append(os.environ["TOKENIZERS_PARALLELISM"]) or 0)
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    main(["inspect", "m"])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(["inspect", "m"])
    assert seen == ["true", "false"]


def test_results_are_flushed_where_a_closed_pipe_is_no_error(command, monkeypatch):
    """`minift inspect DIR | true`: the output is small, so it leaves only at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(os.fdopen(writing, "wb")) as out:
        monkeypatch.setattr(sys, "stdout", out)
        command(lambda args: print("result") or 0)
        assert main(["inspect", "m"]) == 0


def test_module_and_script_are_the_same():
    """`python -m minift` hands on the exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "minift", "inspect", "/nowhere"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minift: /nowhere: expected a model folder")
    script = importlib.metadata.entry_points(group="console_scripts", name="minift")
    assert {point.load() for point in script} == {main}


@pytest.mark.parametrize(("before", "kept"), [("", False), ("keep_memory()", True)])
def test_freed_memory_is_kept(before, kept):
    """A block that is made again and again faults its pages in once or twice, and each time
    without."""
    code = f"""if True:
        import resource
        import torch
        from minift.cli import keep_memory
        {before}
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        begin = faults()
        for _ in range(8):
            torch.ones(10 << 20)  # 40 MiB: glibc never keeps as much by itself
        print((faults() - begin) / (10 << 10))  # pages of 4 KiB
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (float(done.stdout) < 4) == kept
