"""Everyone who computes attention over a batch of attention_batches.py.

Each peer takes its inputs as suits it best, made before the clock starts: packed rows, views
(B, heads, L, D) where lengths are equal, and "padded" to the longest, with a mask, where they are
not: that is what a batch of a tokenizer is. Its gradients are those of q, k and v apart, and are
joined after the clock has stopped.

With dropout all others have masks of their own, which no definition can tell: they are timed, and
only their shapes are judged and that all is finite.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.attention_batches import KINDS, TOKENS, Batch, batches
from bench.measure import Run, one_line
from bench.operations import (
    PASSES,
    Absent,
    Case,
    Inputs,
    Way,
    compiled,
    generator,
    kernel,
    normal,
    only_on,
)
from minift.kernels.attention import attention_ref
from minift.kernels.attention_step import attention_step_ref
from minift.kernels.dropout import Dropout, dropout_keep
from minift.ops import TORCH, Draw, KeyValues, Layout

DENSE = 2048  # keys: whoever holds all scores of longer sequences is left out
FEW = 32  # sequences: the definition has some launches for each
MATH = 512  # keys: torch's dense path in fp32


def attention_cases(device: torch.device) -> list[Case]:
    """All batches; on a CPU a small share of the tokens, and no long sequences."""
    cuda = device.type == "cuda"
    chosen = batches() if cuda else [b for b in batches(TOKENS // 16) if max(b.lengths) <= 512]
    cases = [case for batch in chosen for case in attention(batch, device)]
    slots = [(1, 1024), (16, 1024), (64, 4096)] if cuda else [(1, 1024), (16, 1024)]
    shapes = [(*shape, 12, 12, 64) for shape in slots] + [(slots[-1][0], 1024, 16, 4, 128)]
    return cases + [decoding(*shape, device) for shape in shapes]


def quick_cases(device: torch.device) -> list[Case]:
    """Whether it runs and is right: every path of ours and of the others."""
    chosen = [
        Batch("33, 17, 17", (33, 17, 17), 4, 32),
        Batch("2 of 70", (70, 70), 2, 16, Hk=1, causal=True),
        Batch("66, 5", (66, 5), 2, 16, p=0.1),
    ]
    cases = [case for batch in chosen for case in attention(batch, device)]
    return [*cases, decoding(3, 20, 2, 2, 16, device), decoding(2, 150, 4, 2, 16, device)]


# ----------------------------------------------------------------- definition


def drawn(batch: Batch, device: torch.device) -> Dropout | None:
    """The dropout of a batch."""
    key = [i << 32 | at for i, n in enumerate(batch.lengths) for at in range(n)]
    draw = Draw(torch.tensor(7, device=device), torch.tensor(1, device=device))
    words = TORCH.draw_dropout(
        draw, torch.tensor(key, device=device), max(batch.lengths), 1, batch.H
    )
    return words.at(0, batch.p)


def definition(batch: Batch, layout: Layout, dropout: Dropout | None) -> Callable:
    """Of long sequences a key head at a time, made again for the gradient: the scores of 8,192
    keys and 16 heads in fp64 are 8.6 GB for every step of the softmax."""
    longest = max(batch.lengths)

    def whole(qkv: Tensor, heads: int, keep: Tensor | None) -> Tensor:
        return attention_ref(qkv, layout, heads, causal=batch.causal, keep=keep, p=batch.p)

    def call(qkv: Tensor) -> Tensor:
        keep = dropout_keep(dropout, longest) if dropout else None
        if longest <= DENSE:
            return whole(qkv, batch.H, keep)
        group = batch.H // batch.key_heads
        q, k, v = split(qkv, batch)
        out = []
        for h in range(batch.key_heads):
            heads = slice(h * group, (h + 1) * group)
            part = torch.cat([q[:, heads], k[:, h : h + 1], v[:, h : h + 1]], 1)
            kept = keep[:, heads] if dropout else None
            out.append(
                checkpoint(whole, part, group, kept, use_reentrant=False, preserve_rng_state=False)
            )
        return torch.cat(out, 1)

    return call


def split(qkv: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return qkv.split([batch.H, batch.key_heads, batch.key_heads], dim=1)


# -------------------------------------------------------------------- others


@dataclass(frozen=True)
class Peer:
    """Attention of others, in the form that suits it."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v in that form -> out
    take: Callable[[Tensor], Tensor] = lambda x: x  # (T, heads, D) -> that form
    give: Callable[[Tensor], Tensor] = lambda x: x  # and back

    def way(self, kind: str, batch: Batch) -> Way:
        """A contender: inputs are brought to the form before the clock starts."""

        def forward(inputs: Inputs) -> Run:
            q, k, v = map(self.take, split(inputs.leaves[0], batch))

            @torch.no_grad()
            def call():
                return (self.call(q, k, v),)

            return Run(call, shaped=lambda results: (self.give(results[0]),))

        def backward(inputs: Inputs) -> Run:
            parts = split(inputs.leaves[0], batch)
            leaves = [self.take(x).detach().requires_grad_() for x in parts]
            out, upstream = self.call(*leaves), self.take(inputs.upstream[0])
            return Run(
                lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True),
                shaped=lambda grads: (torch.cat([self.give(g) for g in grads], 1),),
            )

        return {"forward": forward, "backward": backward}[kind]


def left_out(fn: Callable, reason: str) -> Callable:
    """`fn`, or with a reason nobody."""

    def call(*args):
        raise Absent(reason)

    return call if reason else fn


def peers(batch: Batch, layout: Layout, device: torch.device) -> dict[str, Peer]:
    """All of torch's own, each present or absent with a reason."""
    longest = max(batch.lengths)
    heads_first = {
        "take": lambda x: x.transpose(0, 1)[None],
        "give": lambda x: x[0].transpose(0, 1),
    }
    flex = left_out(
        only_on(device, flex_attention(batch, layout)),
        "has no dropout" if batch.p
        else "" if batch.flex else "left out: it compiles for ten seconds",
    )  # fmt: skip
    varlen = left_out(
        only_on(device, varlen_attention(batch, layout)), "has no dropout" if batch.p else ""
    )
    found = sdpa_peers(batch, longest, device)
    return found | {
        "torch varlen": Peer(varlen),
        "flash, private": Peer(only_on(device, private_flash(batch, layout))),
        "flex, compiled": Peer(flex, **heads_first),
    }


def sdpa_peers(batch: Batch, longest: int, device: torch.device) -> dict[str, Peer]:
    """scaled_dot_product_attention by each of its backends."""
    dense = "" if longest <= MATH else f"left out: dense scores of {longest} keys"
    # It is on the host where the forward pass was no graph: a graph of the gradient would have the
    # GPU read it there.
    seed = "left out: the seed of its dropout may be on the host" if batch.p else ""
    padded = "" if batch.equal else "takes no mask"
    reasons = {"flash": padded, "cudnn": seed, "efficient": seed, "math": dense}
    if batch.equal:
        n = len(batch.lengths)
        form = {
            "take": lambda x: x.view(n, longest, *x.shape[1:]).transpose(1, 2),
            "give": lambda x: x.transpose(1, 2).flatten(0, 1),
        }
        mask, prefix = None, "sdpa"
    else:
        form, mask = padding(batch, device)
        prefix = "sdpa padded"
    return {
        f"{prefix} {backend}": Peer(left_out(sdpa(batch, backend, mask), reason), **form)
        for backend, reason in reasons.items()
    }


def padding(batch: Batch, device: torch.device) -> tuple[dict[str, Callable], Callable]:
    """To (B, heads, longest, D) and back; and the mask (B, 1, 1, longest), made once."""
    longest = max(batch.lengths)

    @functools.cache
    def real() -> Tensor:
        lengths = torch.tensor(batch.lengths, device=device)
        return torch.arange(longest, device=device) < lengths[:, None]

    def take(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(batch.lengths), longest, *x.shape[1:])
        padded[real()] = x
        return padded.transpose(1, 2)

    def give(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[real()]

    return {"take": take, "give": give}, lambda: real()[:, None, None]


def sdpa(batch: Batch, backend: str, mask: Callable | None) -> Callable:
    """One backend of torch's function, or why it cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION",
             "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}  # fmt: skip
    only = getattr(SDPBackend, names[backend])
    made = functools.cache(mask) if mask else lambda: None
    options = {"dropout_p": batch.p, "enable_gqa": batch.key_heads != batch.H}

    def call(q, k, v):
        hidden = made()
        if hidden is not None and batch.causal:
            raise Absent("a mask and causal: not made here")
        try:
            with sdpa_kernel(only):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=hidden, is_causal=batch.causal, **options
                )
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise Absent("torch has no such kernel for this") from None
            raise

    return call


def varlen_attention(batch: Batch, layout: Layout) -> Callable:
    """torch's public function for packed rows; its flags have changed from version to version."""

    def call(q, k, v):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Absent(one_line(error)) from None
        known = inspect.signature(varlen_attn).parameters
        options = {"enable_gqa": True} if batch.key_heads != batch.H else {}
        options = {name: value for name, value in options.items() if name in known}
        if batch.causal:
            options |= {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        cu, longest = layout.cu_seqlens, layout.max_length
        return varlen_attn(q, k, v, cu, cu, longest, longest, **options)

    return call


def private_flash(batch: Batch, layout: Layout) -> Callable:
    """What torch's flash attention is called inside: its only way to packed rows with dropout."""

    def call(q, k, v):
        cu, longest = layout.cu_seqlens, layout.max_length
        try:
            flash = torch.ops.aten._flash_attention_forward.default
            out, _, state, *_ = flash(
                q, k, v, cu, cu, longest, longest, batch.p, batch.causal, False
            )
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise Absent(one_line(error)) from None
        if batch.p and not state.is_cuda:
            raise Absent("its seed is on the host: not for a graph")
        return out

    return call


def flex_attention(batch: Batch, layout: Layout) -> Callable:
    """Compiled, with a mask of blocks of which sequence a row is in."""

    @functools.cache
    def make():
        from torch.nn.attention import flex_attention as flex

        device = layout.cu_seqlens.device
        numbers = torch.arange(len(batch.lengths), device=device)
        sequence = numbers.repeat_interleave(torch.tensor(batch.lengths, device=device))

        def sees(b, h, i, j):
            same = sequence[i] == sequence[j]
            return same & (j <= i) if batch.causal else same

        mask = flex.create_block_mask(sees, None, None, layout.rows, layout.rows, device)
        return compiled(flex.flex_attention), mask

    def call(q, k, v):
        fn, mask = make()
        return fn(q, k, v, None, mask, None, batch.key_heads != batch.H)

    return call


# --------------------------------------------------------------------- cases


def attention(batch: Batch, device: torch.device) -> list[Case]:
    """Forward and backward of a batch."""
    layout = Layout.pack(list(batch.lengths)).to(device)
    T, H, D, longest = layout.rows, batch.H, batch.D, max(batch.lengths)
    dropout = drawn(batch, device) if batch.p else None

    def make() -> Inputs:
        g = generator(device)
        qkv = normal(g, (T, H + 2 * batch.key_heads, D))
        return Inputs((qkv,), (normal(g, (T, H, D)),))

    by_definition = definition(batch, layout, dropout)
    dense = "" if longest <= DENSE else f"left out: dense scores of {longest} keys"
    few = longest <= 512 and len(batch.lengths) <= 8
    many = "" if few else "left out: compiling so many or so dense scores takes minutes"

    def call(fn: Callable) -> Callable:
        return lambda qkv: fn(qkv, layout, H, batch.causal, dropout)

    functions = {
        "definition": by_definition,
        "torch": left_out(call(TORCH.attention), dense),
        "torch.compile": left_out(compiled(by_definition), many),
    }
    ours = call(kernel("attention"))
    others = peers(batch, layout, device)
    slow = longest > DENSE or len(batch.lengths) > FEW
    return [
        Case(
            "attention", str(batch), kind, make,
            {
                **{name: PASSES[kind](fn) for name, fn in functions.items()},
                **{name: peer.way(kind, batch) for name, peer in others.items()},
                "ours": PASSES[kind](ours),
            },
            batch.bytes(kind), batch.flops(kind), batch.target(kind), ratios=batch.ratios,
            unjudged=dict.fromkeys(others, "its mask is another") if batch.p else {},
            untimed={"definition": "too slow to be timed"} if slow else {},
        )
        for kind in KINDS
    ]  # fmt: skip


def decoding(S: int, L: int, H: int, Hk: int, D: int, device: torch.device) -> Case:
    """A step of S sequences, half full to full. Whoever writes the new key writes the same numbers
    to the same place in every run."""
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(L // 2, L, (S,), generator=g, dtype=torch.int32)
    lengths, slots = counts.to(device), torch.arange(S, device=device)
    seen = (torch.arange(L, device=device) <= lengths[:, None])[:, None, None]

    def make() -> Inputs:
        g = generator(device)
        cache = (normal(g, (S, Hk, L, D)) for _ in range(2))
        return Inputs((normal(g, (S, H + 2 * Hk, D)), *cache), ())

    def by_sdpa(qkv: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k_new, v_new = qkv.split([H, Hk, Hk], dim=1)
        k[slots, :, lengths], v[slots, :, lengths] = k_new, v_new
        q = q[:, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=Hk != H)
        return out[:, :, 0]

    def step(fn: Callable) -> Callable:
        return lambda qkv, k, v: fn(qkv, KeyValues(k, v), lengths)

    waits = "left out: it waits for the lengths" if device.type == "cuda" else ""
    functions = {
        "definition": step(lambda *args: attention_step_ref(*args)[0]),
        "torch": left_out(step(TORCH.attention_step_), waits),
        "torch.compile": compiled(by_sdpa),
        "sdpa padded": by_sdpa,
        "ours": step(kernel("attention_step", "attention_step_")),
    }
    moved = 4 * D * (Hk * (int(counts.sum()) + 2 * S) + S * H)
    return Case(
        "attention_step", f"{S} x {L}, {H} heads of {D}, {Hk} of keys, bf16", "forward", make,
        {name: PASSES["forward"](fn) for name, fn in functions.items()}, moved,
        untimed={"definition": "it waits for the lengths"} if waits else {},
    )  # fmt: skip
