"""The least time that a step of BERT or GPT-2 can take on a GPU, from its lengths.

    python -m bench.floors              tables, for the H200
    python -m bench.floors --detail "BERT-base SST-2 unpadded"     kernel by kernel

Three times for each workload, over a list of fused kernels with their flops, bytes and exps:

    IDEAL     max(all flops / rate of a matmul, all bytes / rate of a copy): perfect overlap
    FLOOR     the sum over the kernels of the slowest of flops, bytes and exps: one stream, no gaps
    TARGET    likewise with what is known to be lost: tiles that do not fill the multiprocessors,
              92 % of the matmul's rate inside of one and 88 % of the copy's, attention as fast as
              the fastest that is published, 1.5 us for each kernel of a replayed graph

The rates are of an H200 and stand in `Machine`; those that a run has measured replace them. An
activation of up to 20 MB is taken to stay in the cache between two kernels.

Model flops, which utilisation is counted from: products with matrices and attention scores of real
tokens, backward twice forward, half of the scores under a causal mask. The last layer counts whole,
whoever computes it for first tokens only; the hardware's attention backward is 2.5 times forward.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from bench.workloads import BATCH, MODELS

# TFLOP/s forward and backward by the rows a query sees, head width 64: the highest published for
# Hopper. 512 and 1024: FlashAttention-3, arXiv:2407.08608; 128: NVIDIA's cudnn-frontend on an H200
# with a window of 128; 384 lies between.
ATTENTION = {
    False: {128: (140, 115), 384: (300, 240), 512: (335, 272), 1024: (392, 363)},
    True: {512: (225, 178), 1024: (288, 275)},
}
TILES = (  # rows, columns, share of the rate inside
    *((128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.98), (128, 128, 0.93), (64, 256, 0.88)),
    *((128, 64, 0.80), (64, 128, 0.80), (64, 64, 0.62)),
)
SPLITS = (1, 2, 3, 4, 6, 8)  # of the inner dimension
GPTS = [name for name in MODELS if name.startswith("GPT-2 ")]


@dataclass(frozen=True)
class Machine:
    """Rates a second, and what is lost."""

    matmul: float = 790e12  # bf16 flops, 8192 x 8192 x 8192 of random numbers
    copy: float = 4.3e12  # bytes read and written
    nominal: float = 989e12  # bf16 flops by the datasheet
    processors: int = 132
    exps: float = 132 * 16 * 1.755e9
    resident: float = 20e6  # bytes of an activation that the cache keeps
    kernel: float = 1.5e-6  # seconds of beginning and end of a kernel in a graph
    matmul_share: float = 0.92
    copy_share: float = 0.88


H200 = Machine()


@dataclass(frozen=True)
class Sizes:
    """What the floor needs to know of a model."""

    layers: int
    width: int
    heads: int
    ffn: int
    vocab: int
    positions: int
    causal: bool = False  # a GPT with a tied head on all tokens, or a BERT that classifies

    @staticmethod
    def of(model: str) -> "Sizes":
        """Of an entry of MODELS."""
        return Sizes.read(MODELS[model])

    @staticmethod
    def read(raw: dict) -> "Sizes":
        """Of the config.json of a BERT or a GPT-2."""
        if raw["model_type"] == "gpt2":
            layers, width, heads = (raw[name] for name in ("n_layer", "n_embd", "n_head"))
            vocab, positions = raw["vocab_size"], raw["n_positions"]
            return Sizes(layers, width, heads, 4 * width, vocab, positions, causal=True)
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        names += ("vocab_size", "max_position_embeddings")
        return Sizes(*(raw[name] for name in names))

    @property
    def matrices(self) -> int:
        """Parameters of the layers' matmuls."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.ffn)

    @property
    def parameters(self) -> int:
        """All of them; a BERT's classifier has two labels."""
        C, F = self.width, self.ffn
        layers = self.matrices + self.layers * (4 * C + F + C + 4 * C)
        tables = (self.vocab + self.positions) * C
        return layers + tables + (2 * C if self.causal else 2 * C + 2 * C + C * C + C + 2 * C + 2)

    @property
    def padded_vocab(self) -> int:
        """A multiple of 128."""
        return -(-self.vocab // 128) * 128


@dataclass(frozen=True)
class Work:
    """What one step computes on, and how much of it is real."""

    sequences: float
    tokens: float  # padding included
    squares: float  # sum of squared lengths, likewise
    real: float
    real_squares: float

    @staticmethod
    def of(lengths: Sequence[int], width: int | None = None) -> "Work":
        """Of these lengths, packed, or padded to `width`."""
        n, real, squares = len(lengths), sum(lengths), sum(length**2 for length in lengths)
        if width is None:
            return Work(n, real, squares, real, squares)
        return Work(n, n * width, n * width**2, real, squares)

    @staticmethod
    def like(n: int, mean: float, variation: float, width: int | None = None) -> "Work":
        """Of n lengths with this mean and coefficient of variation."""
        real, squares = n * mean, n * mean**2 * (1 + variation**2)
        if width is None:
            return Work(n, real, squares, real, squares)
        return Work(n, n * width, n * width**2, real, squares)


@dataclass(frozen=True)
class Kernel:
    """`count` launches of one kind."""

    name: str
    count: int
    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0
    matmul: tuple[float, float, float] | None = None  # M, N, K
    rate: float | None = None  # flops a second at most; None: the machine's

    def floor(self, machine: Machine) -> float:
        """Seconds of one launch, nothing lost."""
        times = self.flops / machine.matmul, self.bytes / machine.copy, self.exps / machine.exps
        return max(times)

    def target(self, machine: Machine) -> float:
        """Seconds of one launch."""
        times = [self.bytes / (machine.copy * machine.copy_share), self.exps / machine.exps]
        if self.matmul:
            fill = filled(*self.matmul, machine.processors)
            times.append(self.flops / (machine.matmul * machine.matmul_share * fill))
        elif self.rate:
            times.append(self.flops / self.rate)
        return max(times) + machine.kernel


@lru_cache(maxsize=4096)
def filled(M: float, N: float, K: float, processors: int) -> float:
    """The share of its rate that a matmul reaches at best, over tiles and splits of K: tiles that
    do not fill the last wave, edges, the start of the inner loop."""
    best = 0.0
    for rows, columns, inside in TILES:
        down, across = math.ceil(M / rows), math.ceil(N / columns)
        edge = M * N / (down * rows * across * columns)
        for split in SPLITS:
            if K / split < 128:
                continue
            tiles = down * across * split
            wave = tiles / (math.ceil(tiles / processors) * processors)
            start = K / split / (K / split + 96)
            best = max(best, inside * edge * wave * start * (1 if split == 1 else 0.94))
    return best or 0.05  # a tiny model's: hardly anything


def layer_matmuls(sizes: Sizes, tokens: float) -> dict[str, tuple[float, float, float]]:
    """(M, N, K) of every matmul of a layer, forward and backward."""
    C, F, T = sizes.width, sizes.ffn, tokens
    forward = {"qkv": (3 * C, C), "out": (C, C), "up": (F, C), "down": (C, F)}
    found = {name: (T, N, K) for name, (N, K) in forward.items()}
    for name, (N, K) in forward.items():
        found[f"{name} gradient of x"] = (T, K, N)
        found[f"{name} gradient of w"] = (K, N, T)
    return found


def step_matmuls(
    sizes: Sizes, tokens: int, sequences: int, first_only: bool = True
) -> list[tuple[int, int, int, int]]:
    """(count, M, N, K) of every matmul of a BERT's step, attention's own left out.

    Args:
        first_only: after its attention the last layer computes first tokens alone, which is all
            that a classifier needs.
    """
    inner = layer_matmuls(sizes, tokens)
    last = layer_matmuls(sizes, sequences if first_only else tokens)
    last |= {name: shape for name, shape in inner.items() if name.startswith("qkv")}
    counted = [(sizes.layers - 1, *shape) for shape in inner.values()]
    head = [(sequences, n, sizes.width) for n in (sizes.width, 2)]
    head += [(M, K, N) for M, N, K in head] + [(K, N, M) for M, N, K in head]
    return counted + [(1, *shape) for shape in (*last.values(), *head)]


def step_kernels(sizes: Sizes, work: Work, machine: Machine = H200) -> list[Kernel]:
    """Every kernel of a step, the optimizer's last."""
    T, L, C, F = work.tokens, sizes.layers, sizes.width, sizes.ffn

    def reached(*activations: float) -> float:  # bytes that leave the cache
        return sum(2 * x for x in activations if 2 * x > machine.resident)

    def product(name, count, shape, activations):
        M, N, K = shape
        weights = 2 * (N * K if M == T else M * N)
        moved = weights + reached(*activations)
        return Kernel(name, count, 2 * M * N * K, moved, matmul=shape)

    h, f = T * C, T * F
    activations = {"qkv": [h, 3 * h], "out": [h, h], "up": [h, f, f], "down": [f, h]}
    activations |= {"qkv gradient of x": [3 * h, h] + [h] * (not sizes.causal)}
    activations |= {"down gradient of x": [h, f, f], "up gradient of x": [f, h]}
    activations |= {"up gradient of w": [h, f], "out gradient of x": [h, h]}
    norm_forward, norm_backward = (4, 5) if sizes.causal else (3, 4)
    return [
        Kernel("embed", 1, bytes=2 * h + reached(h)),
        *(product(name, L, shape, activations.get(name, activations[name.split()[0]]))
          for name, shape in layer_matmuls(sizes, T).items()),
        *attention_kernels(sizes, work, reached),
        Kernel("bias, dropout, residual, norm", 2 * L, bytes=reached(*[h] * norm_forward)),
        Kernel("their gradient", 2 * L, bytes=reached(*[h] * norm_backward)),
        Kernel("sums of partial gradients", 2 * L),
        *(gpt_ends if sizes.causal else bert_ends)(sizes, work, product, reached),
        Kernel("norm of the gradient", 2, bytes=sizes.parameters),
        Kernel("AdamW, fp32 moments and masters", 1, bytes=28 * sizes.parameters),
    ]  # fmt: skip


def attention_kernels(sizes: Sizes, work: Work, reached) -> list[Kernel]:
    """Forward, and backward as two."""
    seen = 0.5 if sizes.causal else 1.0
    flops, exps = 4 * work.squares * sizes.width * seen, work.squares * sizes.heads * seen
    rates = attention_rates(work.squares / work.tokens, sizes.width // sizes.heads, sizes.causal)
    h, L = work.tokens * sizes.width, sizes.layers
    forward, backward = reached(3 * h, h), reached(5 * h, 3 * h) / 2
    return [
        Kernel("attention", L, flops, forward, exps, rate=rates[0]),
        Kernel("its gradient", 2 * L, 2.5 * flops / 2, backward, exps / 2, rate=rates[1]),
    ]


def attention_rates(length: float, head: int, causal: bool) -> tuple[float, float]:
    """Flops a second forward and backward at the nearest published length. Narrower heads have
    more exps to a flop."""
    table = ATTENTION[causal]
    nearest = min(table, key=lambda known: abs(math.log(known / max(length, 16))))
    forward, backward = table[nearest]
    if head < 64:
        forward, backward = forward * head / 64 * 1.1, backward * head / 64 * 1.2
    return forward * 1e12, backward * 1e12


def bert_ends(sizes: Sizes, work: Work, product, reached) -> list[Kernel]:
    """The classifier, and the gradient of the embeddings, dense."""
    B, C = work.sequences, sizes.width
    flops = 2 * B * C * C
    pooler = Kernel("pooler", 3, flops, 2 * C * C, matmul=(B, C, C))
    embeddings = reached(work.tokens * C) + 2 * sizes.vocab * C
    return [pooler, Kernel("head and loss", 3), Kernel("embed gradient", 2, bytes=embeddings)]


def gpt_ends(sizes: Sizes, work: Work, product, reached) -> list[Kernel]:
    """The last norm, the tied head and its loss in place, the gradient of the embeddings."""
    T, C, V = work.tokens, sizes.width, sizes.padded_vocab
    h, logits = T * C, T * V
    return [
        Kernel("last norm and its gradient", 2, bytes=reached(h, h, h, h)),
        product("head", 1, (T, V, C), [h, logits]),
        Kernel("loss and gradient in place", 1, bytes=reached(logits, logits), exps=T * V),
        product("head gradient of x", 1, (T, C, V), [logits, h]),
        product("head gradient of w", 1, (V, C, T), [logits, h]),
        Kernel("embed gradient", 2, bytes=reached(h) + 4 * h),
    ]


def model_flops(sizes: Sizes, work: Work) -> float:
    """Of a step, on real tokens."""
    C, L = sizes.width, sizes.layers
    head = C * sizes.vocab * work.real if sizes.causal else C * C * work.sequences
    attention = 12 * work.real_squares * C * L * (0.5 if sizes.causal else 1)
    return 6 * (sizes.matrices * work.real + head) + attention


@dataclass(frozen=True)
class Floor:
    """A step's, in milliseconds."""

    ideal: float
    floor: float
    target: float
    model_flops: float
    kernels: int


def floor_of(sizes: Sizes, work: Work, machine: Machine = H200) -> Floor:
    """IDEAL, FLOOR and TARGET of a step."""
    kernels = step_kernels(sizes, work, machine)
    flops = sum(k.count * k.flops for k in kernels)
    moved = sum(k.count * k.bytes for k in kernels)
    return Floor(
        ideal=1e3 * max(flops / machine.matmul, moved / machine.copy),
        floor=1e3 * sum(k.count * k.floor(machine) for k in kernels),
        target=1e3 * sum(k.count * k.target(machine) for k in kernels),
        model_flops=model_flops(sizes, work),
        kernels=sum(k.count for k in kernels),
    )


def mean_floor(sizes: Sizes, steps: Sequence[Sequence[int]], machine: Machine = H200) -> Floor:
    """The mean over steps of these lengths, packed."""
    floors = [floor_of(sizes, Work.of(lengths), machine) for lengths in steps]
    n = len(floors)
    names = ("ideal", "floor", "target", "model_flops")
    means = {name: sum(getattr(floor, name) for floor in floors) / n for name in names}
    return Floor(**means, kernels=floors[0].kernels)


def measured(matmul: float | None, copy: float | None, machine: Machine = H200) -> Machine:
    """The machine with the rates that a run has measured, where it has."""
    return replace(machine, matmul=matmul or machine.matmul, copy=copy or machine.copy)


# Assumed lengths: mean and coefficient of variation, and what 32 of them are padded to.
BERT_WORK = {
    "SST-2 padded to 128": Work.like(BATCH, 25, 0.40, 128),
    "SST-2 padded to the longest": Work.like(BATCH, 25, 0.40, 46),
    "SST-2 unpadded": Work.like(BATCH, 25, 0.40),
    "SQuAD padded to 384": Work.like(BATCH, 175, 0.40, 384),
    "SQuAD unpadded": Work.like(BATCH, 175, 0.40),
    "full 384": Work.like(BATCH, 384, 0.0),
}
GPT_WORK = {"32 x 1024": Work.like(32, 1024, 0.0), "64 x 1024": Work.like(64, 1024, 0.0)}


def table_lines() -> list[str]:
    """One line a model and workload."""
    head = f"{'model, lengths':<40}{'tokens':>8}{'TFLOP':>8}{'IDEAL':>8}{'FLOOR':>8}{'TARGET':>8}"
    lines = [f"{head}  ms{'tokens/s':>12}{'of 989':>8}{'kernels':>9}"]
    for model in ("MiniLM-L6", "BERT-base", "BERT-large", *GPTS):
        sizes = Sizes.of(model)
        for name, work in (GPT_WORK if sizes.causal else BERT_WORK).items():
            f = floor_of(sizes, work)
            share = f.model_flops / (f.target / 1e3) / H200.nominal
            lines.append(
                f"{model + ' ' + name:<40}{work.real:>8.0f}{f.model_flops / 1e12:>8.2f}"
                f"{f.ideal:>8.2f}{f.floor:>8.2f}{f.target:>8.2f}"
                f"{work.real / f.target * 1e3:>16,.0f}{share:>8.0%}{f.kernels:>9}"
            )
    return lines


def detail_lines(wanted: str) -> list[str]:
    """One line a kernel of "MODEL LENGTHS"."""
    model = next((m for m in MODELS if wanted.startswith(m + " ")), None)
    work = (GPT_WORK if model in GPTS else BERT_WORK).get(wanted.removeprefix(f"{model} "))
    if model is None or work is None:
        raise SystemExit(f"expected a model and lengths of the table, got {wanted!r}")
    lines = [f"{'kernel':<36}{'count':>6}{'GFLOP':>10}{'MB':>9}{'FLOOR us':>10}{'TARGET us':>11}"]
    for k in step_kernels(Sizes.of(model), work):
        times = f"{1e6 * k.floor(H200):>10.2f}{1e6 * k.target(H200):>11.2f}"
        lines.append(f"{k.name:<36}{k.count:>6}{k.flops / 1e9:>10.2f}{k.bytes / 1e6:>9.2f}{times}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--detail", help="kernel by kernel: a model and its lengths")
    args = parser.parse_args()
    print("\n".join(detail_lines(args.detail) if args.detail else table_lines()))


if __name__ == "__main__":
    main()
