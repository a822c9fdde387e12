"""Tokens a second that minift and transformers generate, from the same weights, in turn.

    python -m bench.generate
    python -m bench.generate --size tiny --batch 1 --dtype fp32 --blocks 1

Greedy, without an end token, so that both make the same number of tokens: NEW after each of
`--batch` prompts of PROMPT random ids. The weights are random; GPT-2 small's shape. transformers
runs as it comes: `generate` with its cache. Both hold their weights in the dtype, laid out as they
want them, before the clock starts; a run is all of the rest: the prompts, then every token. Each
line of bench/results/generate.jsonl is a contender of a case: `ms` a run, its median and the
percentiles beside it; `tokens_per_s`; `ratio`, of transformers' median to it; and `same`, the share
of tokens that are transformers', which is 1 in fp32 unless two tokens are equally probable.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from bench.measure import ROOT, Run, append, fingerprint, measure
from minift.config import ModelConfig
from minift.decoder import make_weights
from minift.generate import generate
from minift.gpt import GPTLanguageModel
from minift.layers import init_weights
from minift.sampling import GenerateConfig
from minift.weights import hf_tensors

RESULTS = ROOT / "bench" / "results" / "generate.jsonl"
PROMPT, NEW = 32, 64
SIZES = {  # the sizes of GPT-2 small, and of one for tests
    "small": dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
    "tiny": dict(vocab_size=64, n_positions=128, n_embd=16, n_layer=1, n_head=2),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def models_of(size: str, device: torch.device) -> tuple[torch.nn.Module, GPTLanguageModel]:
    """transformers' model and ours, with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = ModelConfig.from_hf({"model_type": "gpt2", **SIZES[size]})
    ours = GPTLanguageModel(replace(config, head="lm"))
    init_weights(ours, config.init_std, seed=0)
    peer = GPT2LMHeadModel(GPT2Config(**SIZES[size], bos_token_id=None, eos_token_id=None))
    peer.load_state_dict(hf_tensors(ours), strict=False)
    return peer.eval().to(device), ours.to(device)


def compare(
    size: str, batch: int, dtype: str, device: torch.device, blocks: int, new: int = NEW
) -> list[dict]:
    """The rows of a case: both contenders, timed in turn."""
    peer, ours = models_of(size, device)
    peer = peer.to(DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SIZES[size]["vocab_size"], (batch, PROMPT), generator=generator)
    prompts, ids = ids.tolist(), ids.to(device)
    given = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    config = GenerateConfig(max_new_tokens=new, batch_size=batch)
    weights = make_weights(ours, DTYPES[dtype], batch)

    def theirs() -> list[list[int]]:
        with torch.inference_mode():
            return peer.generate(ids, pad_token_id=0, **given)[:, PROMPT:].tolist()

    def minifts() -> list[list[int]]:
        return generate(ours, prompts, config, dtype=DTYPES[dtype], weights=weights)

    calls = {"transformers": theirs, "minift": minifts}
    made = {name: torch.tensor(call()) for name, call in calls.items()}
    runs = {name: (lambda _, call=call: Run(call)) for name, call in calls.items()}
    timings = measure(runs, device, copies=1, blocks=blocks, block_ms=1)
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                **dict(bench="generate", contender=name, size=size, dtype=dtype, batch=batch),
                **dict(prompt=PROMPT, new=new, p20_ms=timing.p20, ms=timing.p50),
                **dict(p80_ms=timing.p80, tokens_per_s=1e3 * batch * new / timing.p50),
                "ratio": timings["transformers"].p50 / timing.p50,
                "same": (made[name] == made["transformers"]).float().mean().item(),
                **dict(runs=timing.runs, trusted=timing.trusted),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--new", type=int, default=NEW, help="tokens (%(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="of three runs each (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines are appended to it")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    machine, ratios = fingerprint(device), {}
    for dtype in args.dtype:
        for batch in args.batch:
            for row in compare(args.size, batch, dtype, device, args.blocks, args.new):
                append(args.out, row | machine)
                print(
                    f"{dtype} batch {batch:3d} {row['contender']:13} {row['tokens_per_s']:9.1f} "
                    f"tokens/s, {row['ms']:9.1f} ms ({row['p20_ms']:.1f} to {row['p80_ms']:.1f}), "
                    f"ratio {row['ratio']:.2f}, same {row['same']:.3f}"
                )
                ratios[f"{dtype} {batch}"] = row["ratio"]
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
