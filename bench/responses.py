"""Responses of a trained model beside transformers' from the same weights, prompts and settings.

    python -m bench.responses --model e2e --data testset_w_refs.csv --num_beams 4

Both write an answer to every different prompt of the file; BLEU, chrF and ROUGE compare it with all
responses that the file has to it. transformers runs its `generate` on batches of prompts of like
length, padded on the left. A line of bench/results/responses.jsonl is a contender: its metrics,
`seconds`, and `same`, the share of answers that are transformers' to the letter.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bench.measure import ROOT, append, fingerprint
from minift.responses import respond
from minift.sampling import GenerateConfig
from minift.saving import load
from minift.tasks.instruct import dialogues
from minift.text_metrics import text_metrics
from minift.tokenizer import Tokenizer

RESULTS = ROOT / "bench" / "results" / "responses.jsonl"
TOGETHER = 16  # prompts in a batch of transformers'


@torch.inference_mode()
def theirs(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], config: GenerateConfig
) -> list[str]:
    """transformers' answer to each prompt."""
    ids = tokenizer.ids(prompts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    for start in range(0, len(order), TOGETHER):
        rows = order[start : start + TOGETHER]
        longest = max(len(ids[i]) for i in rows)
        tokens = torch.full((len(rows), longest), tokenizer.eos)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(rows):
            tokens[row, longest - len(ids[i]) :] = torch.from_numpy(ids[i])
            mask[row, longest - len(ids[i]) :] = 1
        found = model.generate(
            tokens, attention_mask=mask, do_sample=False, num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens, length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty, pad_token_id=tokenizer.eos,
            eos_token_id=tokenizer.eos,
        )  # fmt: skip
        for i, answer in zip(rows, found[:, longest:].tolist(), strict=True):
            answers[i] = tokenizer.decode(answer).strip()
    return answers


def compare(folder: str, data: str, config: GenerateConfig, most: int = 0) -> list[dict]:
    """The rows of both contenders.

    Args:
        folder: a model trained with --task instruct.
        data: records with the fields of its templates.
        config: how both answer.
        most: prompts, from the first; 0: all.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(folder)
    rows, _ = dialogues(data, *model.config.template)
    if most:
        wanted = set(list(dict.fromkeys(row.text for row in rows))[:most])
        rows = [row for row in rows if row.text in wanted]
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = time.perf_counter()
    ours = respond(model, tokenizer, rows, config)
    middle = time.perf_counter()
    expected = theirs(peer, tokenizer, ours.prompts, config)
    seconds = time.perf_counter() - middle
    same = sum(a == b for a, b in zip(ours.answers, expected, strict=True)) / len(expected)
    facts = dict(bench="responses", prompts=len(expected), num_beams=config.num_beams)
    facts |= {"parameters": sum(p.numel() for p in peer.parameters())}
    their = text_metrics(expected, ours.references)
    mine = {**ours.metrics(), "seconds": middle - start, "same": same}
    return [
        {**facts, "contender": "transformers", **their, "seconds": seconds, "same": 1.0},
        {**facts, "contender": "minift", **mine},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder that --task instruct has written")
    parser.add_argument("--data", required=True, help="records with references")
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--most", type=int, default=0, help="prompts; 0: all")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended to it")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = GenerateConfig(num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
    machine = fingerprint(torch.device("cpu")) | {"data": Path(args.data).name}
    rows = compare(args.model, args.data, config, args.most)
    for row in rows:
        append(args.out, row | machine)
        print(
            f"{row['contender']:13} BLEU {row['bleu']:.2f}  chrF {row['chrf']:.2f}  ROUGE-L "
            f"{row['rougeL']:.2f}  {row['seconds']:.1f} s  same {row['same']:.3f}"
        )
    print(json.dumps({row["contender"]: row["bleu"] for row in rows}))


if __name__ == "__main__":
    main()
