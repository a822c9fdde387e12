"""Training a GPT on a CPU beside transformers' Trainer: texts, and responses to prompts.

    python -m bench.finetune --device cpu --task lm instruct --data DIR

DIR holds tinyshakespeare/input.txt for `lm` and e2e_nlg/devset.csv for `instruct`. A vocabulary of
2,048 tokens over bytes is made of the training texts, and a GPT-2 of 6 layers, 384 wide, of random
weights; both trainers load the same folder. Blocks are 256 tokens; of a record the response alone
is learned. Once with GPT-2's dropout of 0.1, once with none.

Rows are encoded and put in order by minift; the Trainer gets the same rows in the same order, or
grouped by length where they differ in it. Each trainer is a process of its own (`bench.turns`);
they take turns of some steps (minift, Trainer at its best, as it comes, minift, ...), so that a
slow minute of the machine hits all. The first turn warms up and is not counted.

Before that the Trainer's loss of the first rows, in fp32 and without dropout, is held to minift's;
without dropout so is minift's own first step. A turn is a line of bench/results/language.jsonl:

    trainer, task, data, dropout, dtype, order, turn
    tokens_per_second    real tokens of the turn: padding counts for nobody
    step_seconds         median of the steps
    tokens_per_step, batch, steps, losses, peak_rss_mib, others_cpu
    begin                {loss, reference, passed}: what was compared
    utc, commit, cpu, threads, torch, python
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import minift
from bench.measure import ROOT
from bench.trainers import SHARED, TRAINERS, Neighbours, append, machine, median_ratio
from bench.turns import Worker
from bench.workloads import gpt, with_dropout
from minift.batch import collate
from minift.ops import IGNORE_INDEX, ops_for
from minift.prepare import Job, prepare

RESULTS = ROOT / "bench" / "results" / "language.jsonl"
SIZES = {"layers": 6, "width": 384, "heads": 6, "vocab": 2048, "positions": 256}
DROPOUTS = (0.1, 0.0)
WARM_UP = 2  # steps of the first turn
ALIKE = {"minift": 2e-3, "transformers": 1e-4}  # share by which a first loss may differ


@dataclass(frozen=True)
class Case:
    """A task and its data."""

    task: str
    file: str  # in --data
    batch: int
    run: dict  # fields of RunConfig
    grouped: bool = True  # whether rows differ in length

    @property
    def data(self) -> str:
        """As README calls it."""
        return Path(self.file).parent.name


CASES = {
    "lm": Case("lm", "tinyshakespeare/input.txt", 8, {}, grouped=False),
    "instruct": Case(
        "instruct", "e2e_nlg/devset.csv", 32,
        {"prompt_template": "{mr}\n", "response_template": "{ref}"},
    ),
}  # fmt: skip


def settings_of(case: Case, args: argparse.Namespace) -> dict:
    """What minift's and transformers' runs are given, and how long they are."""
    file = args.data / case.file if args.data else None
    if file is None or not file.is_file():
        raise SystemExit(f"--task {case.task}: expected --data DIR with {case.file}")
    run = {"train_file": str(file.resolve()), "task": case.task, **case.run}
    config = {
        "learning_rate": 5e-4,
        "per_device_train_batch_size": case.batch,
        "max_steps": WARM_UP + args.turns * args.turn_steps,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "seed": args.seeds[0],
    }
    return {"run": run, "config": config}


def write_case(case: Case, settings: dict, folder: Path) -> float:
    """Writes a folder for each of DROPOUTS: see `bench.turns`.

    Returns:
        The first step's loss in fp32, without dropout and without what the Trainer cannot know.
    """
    new = folder / "new.json"
    new.write_text(json.dumps(gpt(**SIZES)), "utf-8")
    run = minift.RunConfig(config_name=str(new), output_dir="none", **settings["run"])
    job = returned(prepare(run, minift.TrainConfig(**settings["config"])))
    epoch = job.batches.vary(0) if job.batches.vary else job.batches.examples
    steps = min(settings["config"]["max_steps"], len(job.batches))
    order = job.batches.order(0)[: steps * case.batch].tolist()
    rows = [peer_row(epoch[i]) for i in order]
    for p in DROPOUTS:
        path = folder / str(p)
        minift.save(job.model, job.tokenizer, path / "model")
        config = with_dropout(json.loads((path / "model" / "config.json").read_text("utf-8")), p)
        (path / "model" / "config.json").write_text(json.dumps(config), "utf-8")
        (path / "run.json").write_text(json.dumps(settings), "utf-8")
        (path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return first_loss(job, [epoch[i] for i in order[: case.batch]])


def peer_row(example: minift.Example) -> dict:
    """What the Trainer gets of an example: labels are of the tokens themselves, which its model
    predicts from those before. So the last target is a token too, where there is room: of a record
    with its end, not of a full block."""
    tokens, targets = ([int(t) for t in part] for part in (example.tokens, example.target))
    ids, labels = [*tokens, targets[-1]], [IGNORE_INDEX, *targets]
    n = min(len(ids), SIZES["positions"])
    return {"input_ids": ids[:n], "labels": labels[:n], "tokens": len(tokens)}


@torch.no_grad()
def first_loss(job: Job, examples: list[minift.Example]) -> float:
    """The mean loss of a batch of `peer_row`s in fp32; nothing is dropped."""
    known = [peer_row(e)["labels"][1:] for e in examples]
    pad = [[IGNORE_INDEX] * (len(e.tokens) - len(k)) for e, k in zip(examples, known, strict=True)]
    targets = [a + b for a, b in zip(known, pad, strict=True)]
    examples = [replace(e, target=t) for e, t in zip(examples, targets, strict=True)]
    batch, ops = collate(examples, range(len(examples))), ops_for(torch.device("cpu"))
    return float(job.task.loss(job.model(batch, ops), batch, ops)) / job.task.weight(batch)


def returned(generator):
    """What a generator returns; what it says is not wanted."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


class Trainer(Worker):
    """A process of `bench.turns`."""

    def __init__(self, name: str, folder: Path, case: Case, threads: int):
        self.dtype, order = TRAINERS[name]
        self.order = order if case.grouped else "random"
        who = "minift" if name == "minift" else "transformers"
        command = [sys.executable, "-m", "bench.turns", who, str(folder), "--dtype", self.dtype]
        super().__init__(name, [*command, "--order", self.order, "--threads", str(threads)])


def run_case(case: Case, args: argparse.Namespace) -> list[dict]:
    """The rows of a task: each dropout, each trainer, each turn; written as well."""
    settings, rows = settings_of(case, args), []
    with tempfile.TemporaryDirectory() as folder:
        reference = write_case(case, settings, Path(folder))
        for p in DROPOUTS:
            # As it comes, a GPT-2 has dropout.
            names = [name for name in args.trainers if p or name != "default peer"]
            trainers = [Trainer(n, Path(folder) / str(p), case, args.threads) for n in names]
            try:
                rows += take_turns(trainers, case, p, reference, args)
            finally:
                for trainer in trainers:
                    trainer.end()
    return rows


def take_turns(
    trainers: list, case: Case, p: float, reference: float, args: argparse.Namespace
) -> list[dict]:
    """The rows of the trainers of a dropout."""
    known, rows = {}, []
    for trainer in trainers:
        first = trainer.turn(WARM_UP)
        who = first.get("trainer", "minift")
        loss = first.get("begin_loss", None if p else first["losses"][0])
        limit = ALIKE[who.split()[0]] * reference
        passed = None if loss is None else abs(loss - reference) <= limit
        begin = {"loss": loss, "reference": reference, "passed": passed}
        known[trainer.name] = {"trainer": who, "begin": begin}
    for turn in range(args.turns):
        for trainer in trainers:
            with Neighbours() as others:
                facts = trainer.turn(args.turn_steps)
                others.ours = facts["cpu_seconds"]
            row = {
                "trainer": known[trainer.name]["trainer"],
                "task": case.task,
                "data": case.data,
                "dropout": p,
                "dtype": trainer.dtype,
                "order": trainer.order,
                "turn": turn,
                "tokens_per_second": sum(facts["tokens"]) / sum(facts["seconds"]),
                "step_seconds": statistics.median(facts["seconds"]),
                "tokens_per_step": statistics.mean(facts["tokens"]),
                "batch": case.batch,
                "steps": len(facts["seconds"]),
                "losses": facts["losses"],
                "peak_rss_mib": facts["peak_rss_mib"],
                "others_cpu": others.share,
                "begin": known[trainer.name]["begin"],
                **machine(args.threads),
            }
            append(args.out or RESULTS, row)
            rows.append(row)
    return rows


def summarise(rows: list[dict]) -> dict:
    """Of a task: medians of each trainer by its dropout, and of the ratios turn by turn."""
    found: dict = {
        "trusted": max((r["others_cpu"] or 0.0 for r in rows), default=0.0) <= SHARED,
        "begin_alike": all(r["begin"]["passed"] is not False for r in rows),
    }
    for p in sorted({row["dropout"] for row in rows}, reverse=True):
        runs: dict[str, list[dict]] = {}
        for row in rows:
            if row["dropout"] == p:
                runs.setdefault(f"{row['trainer'].split()[0]} {row['dtype']}", []).append(row)
        rates = {n: statistics.median(r["tokens_per_second"] for r in t) for n, t in runs.items()}
        mine = runs.get("minift bf16")
        ratios = {f"ratio_to_{name.replace(' ', '_')}": median_ratio(mine, theirs)
                  for name, theirs in runs.items() if mine and theirs is not mine}  # fmt: skip
        found[f"dropout {p}"] = rates | ratios
    return found


def run(args: argparse.Namespace) -> dict:
    """All tasks of --task but classification."""
    cases = [CASES[task] for task in args.task if task in CASES]
    for case in cases:
        settings_of(case, args)  # files that are not there are told before anything runs
    return {case.task: summarise(run_case(case, args)) for case in cases}
