"""A trainer that takes turns: a process of its own, which trains some steps whenever it is told to.

`bench.language` starts one for each trainer, writes a number of steps on its stdin, and reads one
JSON object from its stdout when they are done; meanwhile the others wait. At the end of stdin it
leaves. FOLDER, which `bench.language` writes, holds model/ (config.json, weights, vocabulary),
run.json (the settings), and rows.jsonl: what transformers trains, in minift's order.

    python -m bench.turns minift FOLDER --dtype bf16
    python -m bench.turns transformers FOLDER --dtype bf16 --order grouped

minift is what `minift train` runs; transformers is its Trainer. In bf16 it is the Trainer at its
best on a CPU: autocast, scaled_dot_product_attention, fused AdamW, no cache, no look at the losses,
rows grouped by their length where that differs. (Without padding, a batch as one sequence with
positions, it is half as fast: its attention computes all pairs of the batch.) Its batches are put
together in its own process: a worker would take one of few cores. In fp32 it is the Trainer as it
comes.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from bench.measure import ROOT
from bench.peers import import_transformers

Say = Callable[[dict], None]


class Turns:
    """Counts the steps of turns and reports each turn when it is over."""

    def __init__(self, orders: Iterable[str], say: Say):
        """
        Args:
            orders: a number of steps each.
            say: is given the report of each turn.
        """
        self.orders, self.say = iter(orders), say
        self.others: dict = {}  # that the first report tells as well
        self.wait()

    def wait(self) -> None:
        """Until the next turn; `left` is 0 when there is none."""
        self.left = int(next(self.orders, 0))
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.cpu, self.begin = time.process_time(), time.perf_counter()

    def step(self, tokens: int, loss: float | torch.Tensor) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.seconds.append(now - self.begin)
        self.tokens.append(tokens)
        self.losses.append(loss)
        self.begin, self.left = now, self.left - 1
        if self.left == 0:
            self.report()
            self.wait()

    def report(self) -> None:
        """Says what the turn took."""
        cpu = time.process_time() - self.cpu
        losses = [float(loss) for loss in self.losses]
        facts = {"seconds": self.seconds, "tokens": self.tokens, "losses": losses}
        self.say(facts | {"cpu_seconds": cpu, "peak_rss_mib": peak_rss_mib()} | self.others)
        self.others = {}


class Worker:
    """A process that takes turns, from outside."""

    def __init__(self, name: str, command: list[str]):
        """
        Args:
            name: for messages.
            command: of the process.
        """
        self.name = name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115, closed by `end`
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True,
        )  # fmt: skip

    def turn(self, steps: int) -> dict:
        """The report of so many steps.

        Raises:
            SystemExit: the process has failed.
        """
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.name} failed:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Lets it leave; after a failure of another one as well."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def peak_rss_mib() -> float:
    """Of this process alone: what getrusage tells begins with the memory of the one that started
    it."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def minift_steps(folder: Path, dtype: str, settings: dict) -> Iterator:
    """The steps of `minift train`."""
    import minift

    with tempfile.TemporaryDirectory() as output:
        run = minift.RunConfig(
            model_name_or_path=str(folder / "model"), output_dir=output, **settings["run"]
        )
        config = minift.TrainConfig(dtype=dtype, **settings["config"])
        for event in minift.fine_tune(run, config):
            if isinstance(event, minift.Step):
                yield event


def train_minift(folder: Path, dtype: str, turns: Turns) -> None:
    """Trains while there are turns."""
    steps = minift_steps(folder, dtype, read_settings(folder))
    while turns.left:
        step = next(steps)
        turns.step(step.tokens, step.loss)
    steps.close()


def train_peer(folder: Path, dtype: str, order: str, turns: Turns) -> None:
    """Likewise, by transformers' Trainer."""
    transformers = import_transformers()
    settings = read_settings(folder)
    config, best = settings["config"], dtype == "bf16"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().split("\n") if line]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    collate = Collator(model.config.eos_token_id)
    first = collate(rows[: config["per_device_train_batch_size"]])
    turns.others = {"trainer": f"transformers {transformers.__version__}",
                    "begin_loss": begin_loss(model, first)}  # fmt: skip
    collate.counts.clear()
    if best:
        model.config.use_cache = False

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            turns.step(collate.counts.pop(0), trainer.losses.pop())
            control.should_training_stop = turns.left == 0

    class Trainer(transformers.Trainer):
        losses: list[torch.Tensor] = []  # noqa: RUF012, of the only one

        def training_step(self, *args, **kwargs):
            self.losses.append(super().training_step(*args, **kwargs))
            return self.losses[-1]

    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            **{name: value for name, value in config.items() if name != "dtype"},
            bf16=best,
            optim="adamw_torch_fused",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no" if best else "steps",
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length" if order == "grouped" else "sequential",
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate,
            callbacks=[Callback()],
        )  # fmt: skip
        turns.begin = time.perf_counter()
        trainer.train()


class Collator:
    """Rows to a batch, padded to the longest; counts the real tokens of each."""

    def __init__(self, pad: int):
        self.pad, self.counts = pad, []

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self.counts.append(sum(row["tokens"] for row in rows))
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        ids = torch.full((len(rows), int(sizes.max())), self.pad)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            ids[i, : sizes[i]] = torch.tensor(row["input_ids"])
            labels[i, : sizes[i]] = torch.tensor(row["labels"])
        mask = torch.arange(ids.shape[1]) < sizes[:, None]
        masked = {} if mask.all() else {"attention_mask": mask.long()}
        return {"input_ids": ids, "labels": labels, **masked}


@torch.no_grad()
def begin_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Of a batch before any step, in fp32; nothing is dropped."""
    loss = model.eval()(**batch).loss.item()
    model.train()
    return loss


def read_settings(folder: Path) -> dict:
    """`run` and `config`: fields of minift's RunConfig and TrainConfig. transformers' have the
    names of the latter."""
    return json.loads((folder / "run.json").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("trainer", choices=("minift", "transformers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--order", choices=("random", "grouped"), default="random")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.threads:
        torch.set_num_threads(args.threads)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    turns = Turns(sys.stdin, lambda facts: print(json.dumps(facts), file=answers, flush=True))
    if args.trainer == "minift":
        train_minift(args.folder, args.dtype, turns)
    else:
        train_peer(args.folder, args.dtype, args.order, turns)


if __name__ == "__main__":
    main()
