"""Adapters on a CPU beside PEFT: seconds of a step, and memory at its peak.

    python -m bench.adapters --models MiniLM-L6 BERT-large "GPT-2 355M"

Random weights of the published sizes, made sentences of 10 to 40 tokens (of a GPT 32 to 128, every
token learned), LoRA of rank 8 on queries and values (GPT-2: the projection of all three), 20
virtual tokens. Both trainers have the same rows, in a turn all of them: minift in random order,
PEFT grouped by length, so that least is padded. PEFT is at its best: its own model in a plain loop,
bf16 autocast, scaled_dot_product_attention, fused AdamW over what is trained, no look at the
losses; and with --as_it_comes once more in fp32, and in random order.

Each trainer is a process of its own; they take turns, so that a slow minute of the machine hits
both, and the first turn is not counted. PEFT has no prefix for encoders: minift's is beside nothing
then. A turn is a line of bench/results/adapters.jsonl:

    trainer, model, method, turn, batch, steps
    tokens_per_second    real tokens of the turn: neither padding nor virtual tokens count
    step_seconds         mean of the steps
    trained_parameters, peak_rss_mib, others_cpu
    utc, commit, cpu, threads, torch, python

The last line printed is JSON: by model and method the median ratio of the times, turn by turn, and
of the memory.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import ROOT
from bench.peers import import_transformers
from bench.trainers import Neighbours, append, machine
from bench.turns import Turns, Worker
from bench.workloads import MODELS

RESULTS = ROOT / "bench" / "results" / "adapters.jsonl"
METHODS = ("lora", "prompt", "prefix")
MINIFT, BEST, DEFAULT = "minift", "peft", "peft as it comes"
LENGTHS = {"bert": (10, 40), "gpt2": (32, 128)}
VIRTUAL, RATE = 20, 1e-3


def make_rows(name: str, count: int) -> list[list[int]]:
    """Token ids of made sentences, a function of the model's name."""
    raw, draw = MODELS[name], np.random.default_rng(0)
    low, high = LENGTHS[raw["model_type"]]
    sizes = draw.integers(low, min(high, raw.get("max_position_embeddings", 1024) - 21) + 1, count)
    return [draw.integers(5, raw["vocab_size"] - 1, size).tolist() for size in sizes]


def train_minift(settings: dict[str, Any], turns: Turns) -> None:
    """minift's loop, as long as there are turns."""
    import minift
    from minift.adapters import Adapter, adapt
    from minift.cli import keep_memory
    from minift.config import ModelConfig
    from minift.layers import body_of
    from minift.lora import LoRA
    from minift.scratch import random_model
    from minift.tasks.language import LanguageModel

    keep_memory()  # as the command line does; the peer has it too
    raw, rows = MODELS[settings["model"]], make_rows(settings["model"], settings["rows"])
    gpt = raw["model_type"] == "gpt2"
    labels = () if gpt else ("0", "1")
    model = random_model(ModelConfig.from_hf(raw), labels, 0)
    config = minift.TrainConfig(
        method=settings["method"], learning_rate=RATE, dtype="bf16", num_train_epochs=1000,
        per_device_train_batch_size=settings["batch"], num_virtual_tokens=VIRTUAL,
        lora_targets="c_attn" if gpt else "q,v",
    )  # fmt: skip
    adapt(model, Adapter.of(config, model.config))
    body, generator = body_of(model), torch.Generator().manual_seed(0)
    for part in body.modules():
        if isinstance(part, LoRA):
            part.reset(generator)
    for part in filter(None, (body.prompt, body.prefix)):
        part.weight.data.normal_(0, 1, generator=generator)
    examples = [
        minift.Example(ids, (), [*ids[1:], -100] if gpt else i % 2) for i, ids in enumerate(rows)
    ]
    task = LanguageModel() if gpt else minift.Classification(labels)
    steps = minift.train(model, examples, config, task)
    while turns.left:
        step = next(steps)
        if step.index == 1:  # what is frozen is, now
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            turns.others = {"trained_parameters": count}
        turns.step(step.tokens, step.loss)


def train_peft(settings: dict[str, Any], turns: Turns) -> None:
    """PEFT's model in a plain loop, as long as there are turns."""
    transformers = import_transformers()
    import peft

    from minift.cli import keep_memory

    keep_memory()
    model = peft_model(transformers, peft, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    turns.others = {"trained_parameters": sum(p.numel() for p in trained)}
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, fused=True)
    model.train()
    turns.begin = time.perf_counter()
    for inputs, tokens in peft_batches(settings):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["best"]):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.step(tokens, loss.detach())
        if not turns.left:
            return


def peft_model(transformers, peft, settings: dict[str, Any]) -> torch.nn.Module:
    """A random model of the sizes, with the adapter."""
    raw = MODELS[settings["model"]]
    gpt = raw["model_type"] == "gpt2"
    kind = transformers.AutoModelForCausalLM if gpt else None
    kind = kind or transformers.AutoModelForSequenceClassification
    config = transformers.AutoConfig.for_model(**raw)
    model = kind.from_config(config, attn_implementation="sdpa")
    task = "CAUSAL_LM" if gpt else "SEQ_CLS"
    if settings["method"] == "lora":
        targets = ["c_attn"] if gpt else ["query", "value"]
        adapter = peft.LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules=targets,
                                  fan_in_fan_out=gpt)  # fmt: skip
    else:
        names = {"prompt": "PromptTuningConfig", "prefix": "PrefixTuningConfig"}
        make = getattr(peft, names[settings["method"]])
        adapter = make(task_type=task, num_virtual_tokens=VIRTUAL)
    if settings["method"] != "prefix":
        model.config.use_cache = False
    return peft.get_peft_model(model, adapter)


def peft_batches(settings: dict[str, Any]) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Batches padded to their longest, over and over, and their real tokens; at its best of like
    length."""
    rows, size = make_rows(settings["model"], settings["rows"]), settings["batch"]
    gpt = MODELS[settings["model"]]["model_type"] == "gpt2"
    numbered = list(enumerate(rows))
    if settings["best"]:
        numbered.sort(key=lambda pair: len(pair[1]))
    groups = [numbered[i : i + size] for i in range(0, len(rows), size)]
    draw = np.random.default_rng(1)
    while True:
        for g in draw.permutation(len(groups)):
            group = groups[g]
            sizes = torch.tensor([len(ids) for _, ids in group])
            ids = torch.zeros(len(group), int(sizes.max()), dtype=torch.int64)
            for line, (_, row) in zip(ids, group, strict=True):
                line[: len(row)] = torch.tensor(row)
            mask = torch.arange(ids.shape[1]) < sizes[:, None]
            labels = torch.tensor([i % 2 for i, _ in group])
            labels = ids.masked_fill(~mask, -100) if gpt else labels
            yield (
                {"input_ids": ids, "attention_mask": mask.long(), "labels": labels},
                int(sizes.sum()),
            )


def compare(args: argparse.Namespace, name: str, method: str) -> dict[str, float]:
    """All turns of a model and a method, written; the ratios, where PEFT has the method."""
    gpt = MODELS[name]["model_type"] == "gpt2"
    settings = {"model": name, "method": method, "batch": args.batch,
                "rows": args.batch * args.steps, "threads": args.threads}  # fmt: skip
    names = [MINIFT, BEST, *[DEFAULT] * args.as_it_comes]
    names = names if method != "prefix" or gpt else [MINIFT]
    start = [sys.executable, "-m", "bench.adapters", "--worker"]
    trainers = [
        Worker(who, [*start, who, json.dumps(settings | {"best": who == BEST})]) for who in names
    ]
    seconds, memory, known = {}, {}, {}
    try:
        for turn in range(args.turns + 1):
            for trainer in trainers:
                with Neighbours() as others:
                    facts = trainer.turn(args.steps)
                    others.ours = facts["cpu_seconds"]
                if not turn:
                    known[trainer.name] = facts["trained_parameters"]
                    continue
                took = sum(facts["seconds"])
                row = {
                    "trainer": trainer.name, "model": name, "method": method, "turn": turn,
                    "batch": args.batch, "steps": args.steps,
                    "tokens_per_second": sum(facts["tokens"]) / took,
                    "step_seconds": took / args.steps,
                    "trained_parameters": known[trainer.name],
                    "peak_rss_mib": facts["peak_rss_mib"], "others_cpu": others.share,
                    **machine(args.threads),
                }  # fmt: skip
                append(args.out, row)
                seconds.setdefault(trainer.name, []).append(took)
                memory[trainer.name] = facts["peak_rss_mib"]
    finally:
        for trainer in trainers:
            trainer.end()
    found = {}
    for who in names[1:]:
        ratios = (a / b for a, b in zip(seconds[MINIFT], seconds[who], strict=True))
        found |= {f"time to {who}": statistics.median(ratios)}
        found |= {f"memory to {who}": memory[MINIFT] / memory[who]}
    return found


def work(who: str, settings: dict[str, Any]) -> None:
    """A trainer's process: see `bench.turns`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # `-m` puts this repository first on the path, where transformers would take our folder
    # `kernels` for the package of that name.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    turns = Turns(sys.stdin, lambda facts: print(json.dumps(facts), file=answers, flush=True))
    (train_minift if who == MINIFT else train_peft)(settings, turns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["MiniLM-L6"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--as_it_comes", action="store_true", help="PEFT in fp32, too")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append to")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], json.loads(args.worker[1]))
        return
    pairs = [(name, method) for name in args.models for method in args.methods]
    found = {f"{name} {method}": compare(args, name, method) for name, method in pairs}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
