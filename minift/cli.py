"""`minift train | search | eval | predict | generate | inspect | merge | demo`: words to a call.

Flags of `train` are the fields of RunConfig and TrainConfig; `-` and `_` are the same, and a TOML
file given with --config sets the same names. Bad input is one line on stderr and exit status 2.
"""

import argparse
import ctypes
import importlib
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from .config import RunConfig, TrainConfig, as_setting
from .errors import InputError, unknown
from .methods import check_read, rate_of

COMMANDS = {
    "train": "fine-tune a model, or train one from nothing",
    "search": "try settings of train, and say which are best",
    "eval": "measure a trained model on a file",
    "predict": "label texts",
    "generate": "continue texts, or answer prompts",
    "inspect": "say what a model folder holds",
    "merge": "make a model of a LoRA adapter and its base",
    "demo": "train a small BERT, or GPT, on text that is on this machine",
}

MODULES = {
    "eval": "answering",
    "predict": "answering",
    "generate": "generate_command",
    "demo": "demo",
}  # others: commands

RULES = (
    "learning_rate",
    "weight_decay",
    "method",
    "freeze",
    "layer_lr_decay",
    "head_lr",
    "lr_rules",
    *("lora_r", "lora_alpha", "lora_targets", "num_virtual_tokens", "prefix_projection"),
    "prefix_hidden_size",
)

# Settings of a run that a trained model reads as well, if its task does.
TRAINED = (
    *("text_column", "pair_column", "label_column", "id_column", "task_name"),
    *("max_seq_length", "overflow", "max_dropped", "bad_tags"),
    *("threshold", "doc_stride", "max_answer_length", "device"),
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


def count(text: str) -> int:
    """A whole number from 0 of a flag."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


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


def add_training(train: Parser, search: Parser) -> None:
    """The flags of `train`, and of `search`, which has those too."""
    train.add_argument("--config", metavar="FILE", help="a TOML file that sets the names below, or "
                       "describes a model to make")  # fmt: skip
    text = "a TOML file that sets the names below, and lists or ranges of some in [search]"
    search.add_argument("--config", metavar="FILE", required=True, help=text)
    text = "the table of the trials that have ended, and no more of them"
    search.add_argument("--show", action="store_true", help=text)
    for config in (RunConfig, TrainConfig):
        add_config(train, config)
        add_config(search, config)


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
    add_training(train, subs["search"])
    for name in ("eval", "predict", "inspect"):
        subs[name].add_argument("--revision", help="branch, tag or commit of a hub id")
        subs[name].add_argument("--token", help="of a private hub id; or HF_TOKEN, `hf auth login`")
    model = {"dest": "model", "metavar": "DIR", "help": "a trained model: a folder or a hub id; or "
             "the base of --adapter"}  # fmt: skip
    for name in ("eval", "predict"):
        subs[name].add_argument("--model", "--model_name_or_path", **model)
        subs[name].add_argument("--adapter", action="append", metavar="DIR", help="over "
                                "the model, in place of the base that it names; predict takes "
                                "several")  # fmt: skip
        subs[name].add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
        add_config(subs[name], RunConfig, TRAINED)
    subs["eval"].add_argument("--data", "--test_file", "--test", required=True, metavar="FILE",
                              help="CSV, TSV or JSON lines with labels")  # fmt: skip
    predict.add_argument("text", nargs="*", help="texts to label; none: --data, or lines of stdin")
    predict.add_argument("--data", metavar="FILE", help="CSV, TSV, JSON lines, or a text a line")
    predict.add_argument("--output_file", metavar="FILE", help="for the answers, in place of "
                         "stdout; it is whole, or not there")  # fmt: skip
    predict.add_argument("--top_k", type=count, default=10, help="labels in `scores`; 0: all (10)")
    subs["inspect"].add_argument(
        "model", metavar="DIR", help="a model folder, a hub id, or a configuration file"
    )
    add_config(subs["inspect"], TrainConfig, RULES)
    subs["merge"].add_argument("--model", metavar="DIR", help="the adapter, or its base")
    for name in ("merge", "inspect"):
        subs[name].add_argument("--adapter", action="append", default=[], metavar="DIR",
                                help="over the model, in place of its own base")  # fmt: skip
    subs["merge"].add_argument("--output_dir", "--output", required=True, help="new folder")
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


def load_toml(path: str) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        InputError: it is missing, or not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None


def read_toml(path: str) -> dict[str, Any]:
    """Names and values of a configuration file; tables are only headings. A file that describes a
    model is that of --config_name.

    Raises:
        InputError: it is missing, not TOML, or a name is unknown or a value of another type.
    """
    content = load_toml(path)
    if "model_type" in content:  # of a model that is to be made
        return {"config_name": path}
    return settings_of(content, path)


def settings_of(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The fields that the names of a configuration file mean, and their values.

    Raises:
        InputError: a name is unknown or a value of another type.
    """
    values = {}
    for name, value in content.items():
        values |= value if isinstance(value, dict) else {name: value}
    try:
        return dict(as_setting(name, value) for name, value in values.items())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def configurations(args: argparse.Namespace) -> tuple[RunConfig, TrainConfig]:
    """Both configurations of `train`: flags over the TOML file over defaults."""
    given = (read_toml(args.config) if args.config else {}) | vars(args)
    check_read(given)
    return make_configs(given)


def make_configs(given: dict[str, Any]) -> tuple[RunConfig, TrainConfig]:
    """Both configurations of names and values; other names may be among them."""

    given = rate_of(given) | given

    def make(config):
        return config(**{f.name: given[f.name] for f in fields(config) if f.name in given})

    return make(RunConfig), make(TrainConfig)


def searched(args: argparse.Namespace) -> tuple[Any, RunConfig, TrainConfig]:
    """What `search` searches, and both configurations of what all its trials share.

    Raises:
        InputError: the file is not one of a search, or a setting is both searched and given.
    """
    from .search import from_table

    content = load_toml(args.config)
    try:
        space, seeds = from_table(content.pop("search", None))
    except InputError as error:
        raise InputError(f"{args.config}: {error}") from None
    given = settings_of(content, args.config) | vars(args)
    for name in space.space:
        if name in given:
            raise InputError(f"{args.config}: {name} is searched and given: leave one out")
    if seeds is not None:
        given.setdefault("seeds", seeds)
    return space, *make_configs(given)


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
        elif args.command == "search":
            args.configurations = searched(args)
        # Asking a pool that forked to be quiet is a setting of this process, so it is made here.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if args.command in ("train", "search", "eval", "predict", "demo"):
            keep_memory()
        module = MODULES.get(args.command, "commands")
        several = args.command == "train" and args.configurations[0].seeds > 1
        if several or args.command == "search":
            module = "search_command"
        status = importlib.import_module(f".{module}", __package__).run(args)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return status
    except InputError as error:
        if debug:
            raise
        print(f"minift: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "the same command" if "search" in words[:1] else "--resume_from_checkpoint auto"
        print(f"minift: interrupted; {again} goes on", file=sys.stderr)
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
