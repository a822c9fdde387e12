"""One fine-tuning run by transformers' Trainer, as a process of its own: its memory is its own.

`python -m bench.peer_trainer --model DIR --data DIR --seed 0 --dtype bf16 --order grouped`
prints one JSON object: accuracy on the development rows, real tokens/s, peak resident memory.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path


def read_tsv(path: Path, limit: int | None = None) -> list[tuple[str, int]]:
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [(text, int(label)) for text, label in rows][:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv, dev.tsv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rows", type=int, help="only the first rows of train.tsv")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--order", choices=("random", "grouped"), default="random")
    args = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    # `-m` puts this repository first on the path, where transformers would take our folder
    # `kernels` for the package of that name.
    root = Path(__file__).resolve().parent.parent
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != root]
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

    transformers.logging.set_verbosity_error()
    transformers.set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=2, dtype=torch.float32
    )

    def encode(rows):
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=128)["input_ids"]
        return [{"input_ids": i, "labels": y} for i, (_, y) in zip(ids, rows, strict=True)]

    train = encode(read_tsv(args.data / "train.tsv", args.rows))
    dev = encode(read_tsv(args.data / "dev.tsv"))
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            seed=args.seed,
            num_train_epochs=args.epochs,
            learning_rate=5e-5,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            warmup_steps=20,
            weight_decay=0.01,
            lr_scheduler_type="linear",
            bf16=args.dtype == "bf16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=False,
            train_sampling_strategy="group_by_length" if args.order == "grouped" else "random",
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=train,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        predicted = trainer.predict(dev)
    accuracy = float((np.argmax(predicted.predictions, -1) == predicted.label_ids).mean())
    tokens = args.epochs * sum(len(row["input_ids"]) for row in train)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(
        json.dumps(
            {
                "trainer": f"transformers {transformers.__version__}",
                "order": args.order,
                "dtype": args.dtype,
                "seed": args.seed,
                "epochs": args.epochs,
                "eval_accuracy": accuracy,
                "train_runtime": seconds,
                "tokens_per_second": tokens / seconds,
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "train_loss": losses[-1] if losses else None,
            }
        )
    )


if __name__ == "__main__":
    main()
