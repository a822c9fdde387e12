"""Whether all peers learn alike: a rate says nothing of one that computes something else.

`check_peer` is quick and for every run: without dropout, the losses of the first steps and the
first gradient beside transformers' in fp32 from the same weights. `learn` trains each peer on a
task that can be learned, from several seeds, with dropout: the mean curve of each must lie in the
band of the others' seeds.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpt_peers import GPTTransformers
from bench.measure import one_line
from bench.peers import Job, Minift, Peer, TorchGraphs, TorchUnpadded, Transformers

CHECKED = (Minift.name, TorchUnpadded.name)
CHECK_STEPS, CHECK_RATE = 3, 5e-5  # from the first step on: no warm-up
LIMITS = {"fp32": (1e-3, 0.999), "bf16": (1e-2, 0.99)}  # loss, cosine of the gradients
WINDOW = 20  # steps that a point of a curve is the mean of
LEARNERS = (Minift, Transformers, TorchUnpadded, TorchGraphs)


@dataclass(frozen=True)
class Start:
    """How a peer begins, without dropout."""

    losses: list[float]  # of the first steps
    gradient: Tensor  # all parameters', end to end


def start_of(kind: type[Peer], job: Job) -> Start:
    """The first gradient, and the losses of the first steps."""
    peer = kind(job)
    named = peer.gradients(0)
    losses = []
    for k in range(CHECK_STEPS):
        peer.step(k)
        losses.append(peer.loss())
    return Start(losses, torch.cat([named[name].flatten() for name in sorted(named)]))


def compare(start: Start, reference: Start, dtype: str) -> dict:
    """The largest relative difference of the losses, the cosine of the gradients, and whether
    these will do."""
    pairs = zip(start.losses, reference.losses, strict=True)
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    mine, theirs = start.gradient.double(), reference.gradient.double()
    cosine = F.cosine_similarity(mine, theirs, dim=0).item()
    most, least = LIMITS[dtype]
    passed = difference <= most and cosine >= least  # NaN compares false
    return {"dtype": dtype, "loss_difference": difference, "cosine": cosine, "passed": passed}


def check_peers(kinds: Sequence[type[Peer]], job: Job, exactly: bool = True) -> dict[str, dict]:
    """The check of those that can be checked, by name, in the dtype that is timed.

    Args:
        kinds: peers.
        job: of a model without dropout.
        exactly: minift in fp32 as well: both must pass, and one that does not is told.
    """
    settings = replace(job.config, dtype="fp32", warmup_steps=0, learning_rate=CHECK_RATE)
    exact = replace(job, config=settings, data=job.data.checked(), made={})
    reference = start_of(GPTTransformers if job.predicts else Transformers, exact)
    found = {}
    for kind in kinds:
        if kind.name not in CHECKED:
            continue
        fp32 = ["fp32"] * (exactly and kind.name == Minift.name)
        dtypes = dict.fromkeys([job.config.dtype, *fp32])
        results = []
        for dtype in dtypes:
            settings = replace(exact.config, dtype=dtype)
            results.append(check_one(kind, replace(exact, config=settings, made={}), reference))
        found[kind.name] = min(results, key=lambda result: result["passed"])
    return found


def check_one(kind: type[Peer], job: Job, reference: Start) -> dict:
    """One peer's check in one dtype; a peer that raises has not passed."""
    try:
        return compare(start_of(kind, job), reference, job.config.dtype)
    except Exception as error:  # it will raise again where it is timed, and is reported there
        facts = {"dtype": job.config.dtype, "loss_difference": None, "cosine": None}
        return facts | {"passed": False, "error": one_line(error)}


def curve(kind: type[Peer], job: Job) -> list[float]:
    """Means of the loss over windows of steps."""
    peer = kind(job)
    losses = []
    for k in range(job.config.max_steps):
        peer.step(k)
        losses.append(peer.loss())
    windows = range(0, len(losses) - WINDOW + 1, WINDOW)
    return [statistics.mean(losses[i : i + WINDOW]) for i in windows]


def inside(mine: list[list[float]], others: list[list[float]], slack: float = 0.5) -> float:
    """The share of windows at which the mean of `mine` lies in the band of `others`.

    Args:
        mine, others: a curve for each seed.
        slack: the band, from the lowest to the highest of them, is widened by this times its own
            height on both sides: a mean of few seeds is no sharp line.
    """
    hits = 0
    for i in range(len(mine[0])):
        band = [other[i] for other in others]
        room = slack * (max(band) - min(band))
        mean = statistics.mean(seed[i] for seed in mine)
        hits += min(band) - room <= mean <= max(band) + room
    return hits / len(mine[0])


def judge(curves: dict[str, list[list[float]]], least: float = 0.9) -> dict[str, dict]:
    """Of each peer, whether it lies in the band of all others' seeds, nearly everywhere, and has
    learned something: a last loss below 0.9 of the first."""
    found = {}
    for name, mine in curves.items():
        others = [seed for other, seeds in curves.items() if other != name for seed in seeds]
        if not others:
            continue
        share = inside(mine, others)
        first, last = (statistics.mean(seed[i] for seed in mine) for i in (0, -1))
        found[name] = {"inside": share, "learned": last < 0.9 * first}
        found[name]["passed"] = share >= least and found[name]["learned"]
    return found


def learn(
    kinds: Sequence[type[Peer]], make_job: Callable[[int], Job], seeds: Sequence[int]
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """The curves of each peer, one a seed, and why others have none.

    Args:
        kinds: those among LEARNERS take part.
        make_job: the job of a seed.
    """
    curves: dict[str, list[list[float]]] = {}
    reasons: dict[str, str] = {}
    for seed in seeds:
        job = make_job(seed)
        for kind in kinds:
            if kind not in LEARNERS or kind.name in reasons:
                continue
            try:
                curves.setdefault(kind.name, []).append(curve(kind, job))
            except Exception as error:  # a peer may raise anything; the others are still wanted
                reasons[kind.name] = one_line(error)
    return {n: c for n, c in curves.items() if n not in reasons}, reasons
