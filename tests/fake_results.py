"""Rows as the benches write them, with numbers that are easy to follow: what tests of the report
start from. Those of a GPU hold every case that a table or a plot knows."""

import itertools
import json
from pathlib import Path

COPY, PRODUCT = 4e12, 800e12  # ceilings of the GPU
CPU = {"utc": "2026-03-01T10:00:00Z", "commit": "aaa0000", "cpu": "Intel(R) Xeon(R) Processor",
       "threads": 2, "torch": "2.13.0+cpu"}  # fmt: skip
GPU = {"utc": "2026-03-02T10:00:00Z", "commit": "bbb1111", "gpu": "NVIDIA H200", "cpu": "a CPU",
       "torch": "2.11.0+cu128", "triton": "3.6.0"}  # fmt: skip
PEER = "transformers 5.23.0"
SHAPES = {  # op -> pass -> bytes and flops of the largest case; others have a half and a quarter
    "cross_entropy": {"forward": (8e8, 0), "backward": (16e8, 0), "forward+gradient": (16e8, 0)},
    "adamw": {"step": (64e8, 0)},
    "add_norm": {"forward": (2e8, 0), "backward": (3e8, 0)},
    "bias_gelu": {"forward": (2e8, 0), "backward": (3e8, 0)},
    "embed": {"forward": (1e8, 0), "backward": (1e8, 0)},
    "attention": {"forward": (1e8, 4e11), "backward": (2e8, 1e12)},
    "linear_cross_entropy": {"forward+gradient": (4e8, 4e12)},
}


def finetune_rows() -> list[dict]:
    """Three seeds; minift makes 100, 200 and 300 tokens a second, 1.25, 1 and 0.75 times those of
    the best peer. Four seeds on all rows."""
    rows = []
    shared = {"data": "sst2", "epochs": 1}
    for seed, ours, best in ((0, 100, 80), (1, 200, 200), (2, 300, 400)):
        for trainer, dtype, order, rate in (
            ("minift", "bf16", "random", ours),
            (PEER, "bf16", "grouped", best),
            (PEER, "fp32", "random", 50),
        ):
            rows.append({**shared, "rows": 2000, "trainer": trainer, "dtype": dtype,
                         "order": order, "seed": seed, "tokens_per_second": rate,
                         "train_runtime": 60_000 / rate, "peak_rss_mib": 1000 + seed,
                         "eval_accuracy": 0.5, **CPU})  # fmt: skip
    for trainer, accuracies in (("minift", (0.8, 0.9)), (PEER, (0.7, 0.8))):
        for seed, accuracy in enumerate(accuracies):
            run = {**shared, "rows": None, "trainer": trainer, "dtype": "bf16",
                   "order": "random", "seed": seed, "eval_accuracy": accuracy, **CPU}  # fmt: skip
            rows += [run, {**run, "data": "banking77", "epochs": 5}]
    return rows


def language_rows() -> list[dict]:
    """Two turns; minift makes 1.5 and 2 times the tokens of the best peer. Without dropout nobody
    is timed as it comes."""
    rows = []
    for task, batch, tokens in (("lm", 8, 2048), ("instruct", 32, 1792)):
        for turn, p in itertools.product((0, 1), (0.1, 0.0)):
            case = {"task": task, "batch": batch, "tokens_per_step": tokens, "dropout": p,
                    "turn": turn, "steps": 3, **CPU}  # fmt: skip
            for trainer, dtype, rate, memory in (
                ("minift", "bf16", 3000 + 1000 * turn, 800 + turn),
                (PEER, "bf16", 2000, 1500),
                (PEER, "fp32", 500, 1400),
            ):
                if p or dtype == "bf16":
                    rows.append({**case, "trainer": trainer, "dtype": dtype,
                                 "tokens_per_second": rate, "peak_rss_mib": memory})  # fmt: skip
    return rows


def method_rows() -> list[dict]:
    """Two methods, two sets, two seeds each."""
    return [
        {"method": method, "flags": flags, "data": data, "rows": None, "epochs": 1, "seed": seed,
         "learning_rate": 1e-3, "trained_parameters": n, "score": 0.8 + 0.02 * seed,
         "seconds_per_step": 0.1 + 0.1 * seed, "peak_rss_mib": 1000 + 500 * seed,
         "saved_mib": n / 1000, **CPU}
        for seed in (0, 1)
        for data in ("sst2", "wnut17")
        for method, flags, n in (("full", "", 12345), ("bitfit", "--method bitfit", 12))
    ]  # fmt: skip


def adapter_rows() -> list[dict]:
    """An encoder and a decoder; PEFT takes twice the time and memory, and has no prefix for one;
    as it comes four times, of the other."""
    return [
        {"trainer": who, "model": model, "method": method, "turn": turn, "batch": 8, "steps": 4,
         "tokens_per_second": 1000 / scale, "step_seconds": 0.25 * scale,
         "trained_parameters": 1234, "peak_rss_mib": 1000 * scale, **CPU}
        for model in ("MiniLM-L6", "GPT-2 355M")
        for method in ("lora", "prefix")
        for turn in (1, 2)
        for who, scale in (("minift", 1), ("peft", 2), ("peft as it comes", 4))
        if who == "minift" or (model, method) != ("MiniLM-L6", "prefix")
        if who != "peft as it comes" or model != "MiniLM-L6"
    ]  # fmt: skip


def task_rows() -> list[dict]:
    """Two data sets, three seeds; minift takes 60, 120 and 240 seconds, transformers twice, one and
    a half times and just as many."""
    rows = []
    cases = (("wnut17", "tagging", {"f1": 0.25}), ("squad_subset", "qa",
             {"f1": 0.5, "exact_match": 0.375}))  # fmt: skip
    for data, task, metrics in cases:
        case = {"data": data, "task": task, "model": "MiniLM", "rows": None, "dtype": "bf16",
                "max_steps": 0, "num_train_epochs": 3 if task == "tagging" else 1,
                "learning_rate": 1e-4, "per_device_train_batch_size": 16,
                "warmup_steps": 20, **CPU}  # fmt: skip
        for seed, times in enumerate((2, 1.5, 1)):
            seconds = 60 * 2**seed
            for trainer, taken, more in (("minift", seconds, 0.125), (PEER, times * seconds, 0)):
                found = {name: value + more * seed for name, value in metrics.items()}
                rows.append({**case, "trainer": trainer, "seed": seed, "train_runtime": taken,
                             "eval_runtime": taken / 10, "metrics": found})  # fmt: skip
    return rows


def kernel_rows() -> list[dict]:
    """Ours reaches 80 % of its ceiling at the largest case, 60 and 40 % at the others. torch takes
    twice as long, but in the smallest case of attention half as long. One case is wrong."""
    rows = []
    for op, passes in SHAPES.items():
        for (kind, (moved, flops)), i in itertools.product(passes.items(), range(3)):
            case = {"op": op, "shape": f"{4 - i} x 10", "pass": kind, "status": "timed",
                    "reason": "", "bytes": moved / 2**i, "flops": flops / 2**i, "trusted": True,
                    "quick": False, **GPU}  # fmt: skip
            floor = 1e3 * max(case["bytes"] / COPY, case["flops"] / PRODUCT)
            ours = floor / (0.8, 0.6, 0.4)[i]
            peer = ours / 2 if op == "attention" and i == 2 else 2 * ours
            for contender, ms in (("definition", 9 * ours), ("torch", peer), ("ours", ours)):
                rows.append({**case, "contender": contender, "p50": ms, "floor_ms": floor,
                             "of_copy": floor / ms, "ratio_to_best_peer": ms / peer})  # fmt: skip
            rows.append({**case, "contender": "liger", "status": "absent", "floor_ms": floor,
                         "of_copy": None, "ratio_to_best_peer": None})  # fmt: skip
    rows.append({**rows[-2], "shape": "7 x 7", "status": "wrong", "of_copy": None,
                 "ratio_to_best_peer": None})  # fmt: skip
    return rows


def gpu_rows() -> list[dict]:
    """Two workloads: minift at half of the floor's rate, others behind it; of two that do not do
    the same one is in front."""
    rows = []
    for workload, tokens, floor in (("BERT-base SST-2", 800, 4.0), ("BERT-large SQuAD", 5600, 40)):
        for peer, times, comparable in (
            ("minift", 2, True),
            ("minift, no graph", 3, True),
            ("transformers", 20, True),
            ("unpadded <torch> & co", 4, True),
            ("compiled", 5, True),
            ("slow", 40, True),
            ("half moments", 1.6, False),
            ("half dropout", 6, False),
        ):
            ours = peer == "minift"
            rows.append({
                "bench": "finetune", "workload": workload, "peer": peer, "status": "timed",
                "note": "moments in bf16" if not comparable else "", "comparable": comparable,
                "tokens_per_step": tokens, "tokens_per_second": 1e3 * tokens / (times * floor),
                "p50": times * floor, "floor_ms": floor, "of_floor": 1 / times,
                "peak_allocated_mib": 1000 * times, "batch": 32, "dtype": "bf16",
                "trusted": not (ours and tokens > 800), "transformers": "5.17.0",
                "doubts": ["the clocks differ"] if ours and tokens > 800 else [],
                "best_peer": "unpadded <torch> & co" if ours else None,
                "ratio_to_best_peer": 2.0 if ours else None,
                "ratio_to_default_peer": 10.0 if ours else None, **GPU,
            })  # fmt: skip
        lost = {"bench": "finetune", "workload": workload, "peer": "none", "status": "unavailable"}
        rows.append({**lost, "comparable": True, "trusted": False, **GPU})
    rows.append({"bench": "learning", "workload": "BERT-base SST-2", "peer": "minift", **GPU})
    return rows


def step_rows() -> list[dict]:
    """Twenty kernels of a step: 20, 19, ... 1 ms."""
    return [
        {"bench": "step_kernels", "workload": "BERT-base SST-2", "ms": 20.0 - i, "share": 0.05,
         "kernel": f"void at::native::kernel_{i}<4, std::array<char*, 1ul> & more and more>", **GPU}
        for i in range(20)
    ]  # fmt: skip


def write(path: Path, rows: list[dict]) -> None:
    """As JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
