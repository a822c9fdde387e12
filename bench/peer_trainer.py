"""One fine-tuning run by transformers' Trainer, as a process of its own: its memory is its own.

`python -m bench.peer_trainer --model DIR --data DIR --seed 0 --dtype bf16 --order grouped`
prints one JSON object: accuracy on the development rows, real tokens/s, peak resident memory.
`bench.trainers` writes the data: train.jsonl and dev.jsonl with text and the label's number.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file; only "\\n" ends a line, since texts hold U+2028."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def encode(rows: list[dict], tokenizer) -> list[dict]:
    """Rows as the Trainer takes them."""
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    texts = [row["text"] for row in rows]
    encoded = tokenizer(texts, pairs, truncation=True, max_length=128)
    keys = [key for key in encoded if key == "input_ids" or (pairs and key == "token_type_ids")]
    return [
        {**{key: encoded[key][i] for key in keys}, "labels": row["label"]}
        for i, row in enumerate(rows)
    ]


def make_trainer(args: argparse.Namespace, model, tokenizer, train: list[dict], folder: str):
    """The Trainer with the settings of `bench.trainers`."""
    import torch
    import transformers

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
    return transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=train,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )


def run(args: argparse.Namespace) -> dict:
    """Trains, predicts the development rows, measures."""
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.set_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    train, dev = (read_jsonl(args.data / f"{name}.jsonl") for name in ("train", "dev"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1 + max(row["label"] for row in train), dtype=torch.float32
    )
    train, dev = encode(train, tokenizer), encode(dev, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, model, tokenizer, train, folder)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        predicted = trainer.predict(dev)
    accuracy = float((np.argmax(predicted.predictions, -1) == predicted.label_ids).mean())
    tokens = args.epochs * sum(len(row["input_ids"]) for row in train)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="has train.jsonl and dev.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--order", choices=("random", "grouped"), default="random")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # `-m` puts this repository first on the path, where transformers would take our folder
    # `kernels` for the package of that name.
    root = Path(__file__).resolve().parent.parent
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != root]
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main()
