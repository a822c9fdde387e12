"""`minift train | eval | predict | generate | inspect | demo`: from words to a call.

Flags of `train` are the fields of RunConfig and TrainConfig; `-` and `_` are the same, and a TOML
file given with --config sets the same names. Bad input is one line on stderr and exit status 2.
"""

import argparse
import ctypes
import difflib
import importlib
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from .config import RunConfig, TrainConfig
from .errors import InputError

COMMANDS = {
    "train": "fine-tune a model, or train one from nothing",
    "eval": "measure a trained model on a file",
    "predict": "label texts",
    "generate": "continue texts, or answer prompts",
    "inspect": "say what a model folder holds",
    "demo": "train a small BERT, or GPT, on text that is on this machine",
}

RULES = (
    "learning_rate",
    "weight_decay",
    "method",
    "freeze",
    "layer_lr_decay",
    "head_lr",
    "lr_rules",
)


class Parser(argparse.ArgumentParser):
    """argparse that fails with one line and names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0]
            message = unknown(word.split("=")[0], self.flags())
        raise InputError(f"{message} (see {self.prog} --help)")

    def flags(self) -> list[str]:
        """All long flags of this parser."""
        return [
            flag for action in self._actions for flag in action.option_strings if flag[1] == "-"
        ]


def unknown(word: str, known: Sequence[str]) -> str:
    """What to say of a name that does not exist."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"unknown {word!r}" + (f": did you mean {close[0]!r}?" if close else "")


def add_config(
    parser: argparse.ArgumentParser, config: type, only: Sequence[str] | None = None
) -> None:
    """A flag for each field, or for some. Their defaults are absent, to tell what was given."""
    group = parser.add_argument_group(config.__doc__.split("\n")[0])
    for f in fields(config):
        if only is not None and f.name not in only:
            continue
        names = [f"--{name}" for name in (f.name, *f.metadata["aliases"])]
        text = f.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        if f.type is bool:
            options["action"] = "store_true"
        else:
            text += f" ({f.default})" if f.default not in ("", 0) else ""
            options |= {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.metadata["choices"]:
            options |= {
                "choices": f.metadata["choices"],
                "metavar": "|".join(f.metadata["choices"]),
            }
        group.add_argument(*names, help=text, **options)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `minift`, and those of its commands."""
    from .generate_command import add_arguments
    from .sampling import FLAGS, GenerateConfig

    parser = Parser(
        "minift",
        description="Fine-tune BERT and GPT-2, and their kin. `minift COMMAND --help` lists flags.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    subs = {}
    for name, text in COMMANDS.items():
        subs[name] = sub = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name != "inspect":
            sub.add_argument("--quiet", action="store_true", help="no progress on stderr")
    train, predict = subs["train"], subs["predict"]
    train.add_argument("--config", metavar="FILE", help="a TOML file that sets the names below, or "
                       "describes a model to make")  # fmt: skip
    for config in (RunConfig, TrainConfig):
        add_config(train, config)
    for name in ("eval", "predict", "inspect"):
        subs[name].add_argument("--revision", help="branch, tag or commit of a hub id")
        subs[name].add_argument("--token", help="of a private hub id; or HF_TOKEN, `hf auth login`")
    model = {"dest": "model", "required": True, "metavar": "DIR", "help": "a trained model: a "
             "folder or a hub id"}  # fmt: skip
    for name in ("eval", "predict"):
        subs[name].add_argument("--model", "--model_name_or_path", **model)
        for column in ("text_column", "pair_column", "label_column"):
            subs[name].add_argument(f"--{column}", help="name, or number from 1")
        subs[name].add_argument("--max_seq_length", type=int, default=0, help="cut texts there")
        subs[name].add_argument("--overflow", choices=("cut", "error"), default="cut")
        subs[name].add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
        subs[name].add_argument("--device", default="auto", help="cpu, cuda, cuda:1")
    subs["eval"].add_argument(
        "--data",
        "--test_file",
        "--test",
        required=True,
        metavar="FILE",
        help="CSV, TSV or JSON lines with labels",
    )
    predict.add_argument("text", nargs="*", help="texts to label; none: --data, or lines of stdin")
    predict.add_argument("--data", metavar="FILE", help="CSV, TSV, JSON lines, or a text a line")
    predict.add_argument("--top_k", type=int, default=10, help="labels in `scores`; 0: all (10)")
    subs["inspect"].add_argument(
        "model", metavar="DIR", help="a model folder, a hub id, or a configuration file"
    )
    add_config(subs["inspect"], TrainConfig, RULES)
    add_arguments(subs["generate"])
    add_config(subs["eval"], GenerateConfig, FLAGS)
    demo = subs["demo"]
    demo.add_argument("--gpt", action="store_true", help="train a small GPT on Python's own source")
    demo.add_argument("--output_dir", "--output", help="(minift-demo, or minift-demo-gpt)")
    demo.add_argument("--epochs", type=float, help="passes over the data; fewer without bf16")
    demo.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser, subs


def normalise(argv: Sequence[str]) -> list[str]:
    """`--learning-rate` is `--learning_rate`; texts after `--` stay as they are."""
    words, rest = list(argv), []
    if "--" in words:
        words, rest = words[: words.index("--")], words[words.index("--") :]
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words[i] = "--" + name[2:].replace("-", "_") + equals + value
    return words + rest


def read_toml(path: str) -> dict[str, Any]:
    """Names and values of a configuration file; tables are only headings. A file that describes a
    model is that of --config_name.

    Raises:
        InputError: it is missing, not TOML, or a name is unknown or a value of another type.
    """
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    if "model_type" in content:  # of a model that is to be made
        return {"config_name": path}
    values = {}
    for name, value in content.items():
        values |= value if isinstance(value, dict) else {name: value}
    known = {
        alias: f
        for config in (RunConfig, TrainConfig)
        for f in fields(config)
        for alias in (f.name, *f.metadata["aliases"])
    }
    given = {}
    for name, value in values.items():
        field = known.get(name.replace("-", "_"))
        if field is None:
            raise InputError(f"{path}: {unknown(name, list(known))}")
        if field.type is float and type(value) is int:
            value = float(value)
        choices = field.metadata["choices"]
        if type(value) is not field.type or (choices and value not in choices):
            wanted = " or ".join(choices) or field.type.__name__
            raise InputError(f"{path}: expected {name} as {wanted}, got {value!r}")
        given[field.name] = value
    return given


def configurations(args: argparse.Namespace) -> tuple[RunConfig, TrainConfig]:
    """Both configurations of `train`: flags over the TOML file over defaults."""
    given = read_toml(args.config) if args.config else {}
    given |= vars(args)

    def make(config):
        return config(**{f.name: given[f.name] for f in fields(config) if f.name in given})

    return make(RunConfig), make(TrainConfig)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_memory() -> None:
    """Asks glibc to keep what is freed, for this process; no more is needed at the peak.

    It hands large blocks back to the system, and a step of training would fault them in again: for
    MiniLM, 10,000 pages of zeros a step, a tenth to a fifth of its time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, 2 for bad input, 1 for a run that failed."""
    words = normalise(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words[: words.index("--") if "--" in words else None]
    try:
        parser, subs = make_parser()
        args, left = parser.parse_known_args(words)
        if left:
            subs.get(args.command, parser).error(f"unrecognized arguments: {' '.join(left)}")
        if args.version or not args.command:
            from importlib.metadata import version

            print(f"minift {version('minift')}" if args.version else parser.format_help().strip())
            return 0
        if args.command == "train":
            args.configurations = configurations(args)
        # Asking a pool that forked to be quiet is a setting of this process, so it is made here.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if args.command in ("train", "demo"):
            keep_memory()
        module = {"demo": "demo", "generate": "generate_command"}.get(args.command, "commands")
        status = importlib.import_module(f".{module}", __package__).run(args)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return status
    except InputError as error:
        if debug:
            raise
        print(f"minift: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minift: interrupted; --resume_from_checkpoint auto goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from .train import Diverged

        if debug or not isinstance(error, Diverged):
            raise
        print(f"minift: {error}", file=sys.stderr)
        return 1
