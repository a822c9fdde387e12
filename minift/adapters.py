"""Fine-tuning a small part of a large model: an adapter adds parameters, and all else is frozen but
the head. Which rules that makes is in methods.py; the trainer does not know.

    lora      two thin matrices beside some of a layer's        Hu et al. 2021, arXiv:2106.09685
    prompt    trained vectors before the first token            Lester et al. 2021, arXiv:2104.08691
    prefix    trained keys and values in every layer            Li and Liang 2021, arXiv:2101.00190

A model has one adapter at a time, as parts of its own: `lora` in a Linear, `prompt` or `prefix` in
the body. `model.adapter` says which.
"""

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Example, collate
from .config import ModelConfig, TrainConfig
from .errors import InputError
from .layers import Body, Linear, body_of
from .lora import LoRA, Part
from .ops import IGNORE_INDEX, TORCH
from .tokenizer import Tokenizer

ADAPTERS = "lora", "prompt", "prefix"
SHORT = {  # of a layer's products: our names -> what --lora_targets calls them
    "attention.qkv": ("q", "k", "v"),
    "attention.out": ("out",),
    "mlp.up": ("up",),
    "mlp.down": ("down",),
}
ORDER = ("qkv", *(short for names in SHORT.values() for short in names))  # of targets
LEAST = 4  # tokens of a text that virtual ones must leave room for


@dataclass(frozen=True)
class Adapter:
    """What kind of adapter a model has."""

    method: str
    targets: tuple[str, ...] = ()  # of LoRA: short names, and `qkv` of one that is not split
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    count: int = 20  # virtual tokens
    projection: bool = False  # whether a prefix is made by an MLP, to train
    hidden: int = 0  # its width
    whole: tuple[str, ...] = ()  # parameters of the model that are trained and saved with it

    @staticmethod
    def of(config: TrainConfig, model: ModelConfig) -> "Adapter":
        """That of a run.

        Raises:
            InputError: a target is unknown, or a size does not fit the model.
        """
        if config.method == "lora":
            targets = read_targets(config.lora_targets, model)
            if config.lora_r > model.dim:
                raise InputError(
                    f"expected lora_r of at most {model.dim}, the model's width, got "
                    f"{config.lora_r}: 8 is usual"
                )
            scale = config.lora_r, config.lora_alpha, config.lora_dropout
            return Adapter("lora", targets, *scale)
        count = config.num_virtual_tokens
        if count > model.max_len - LEAST:
            raise InputError(
                f"expected at most {model.max_len - LEAST} num_virtual_tokens, so that of the "
                f"model's {model.max_len} positions some are left for a text, got {count}"
            )
        projection = config.method == "prefix" and config.prefix_projection
        hidden = (config.prefix_hidden_size or model.dim) if projection else 0
        return Adapter(config.method, count=count, projection=projection, hidden=hidden)


def names_of_targets(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """What a target may be called -> the short names that it means; files' names too."""
    found = {short: (short,) for names in SHORT.values() for short in names}
    every = []
    for ours, shorts in SHORT.items():
        theirs = config.kind.layer[ours]
        own = [(name, (short,)) for name, short in zip(theirs, shorts, strict=False)]
        if len(theirs) < len(shorts):  # one projection in the file: it is adapted as one
            own = [(theirs[0], ("qkv",))]
            found["qkv"] = ("qkv",)
        for name, short in own:
            every += short
            parts = name.split(".")
            for i in range(len(parts)):
                end = ".".join(parts[i:])
                found[end] = (*found.get(end, ()), *short)
    return found | {"all": tuple(dict.fromkeys(every))}


def read_targets(text: str, config: ModelConfig) -> tuple[str, ...]:
    """The short names of `lora_targets`, in the order of a layer.

    Raises:
        InputError: a name means nothing; the nearest are told.
    """
    known, wanted = names_of_targets(config), set()
    for name in filter(None, map(str.strip, text.split(","))):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
            guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise InputError(
                f"lora_targets {name!r} is no product of a {config.family} layer: {guess}there are "
                f"{', '.join(known)}"
            )
        wanted |= set(known[name])
    if not wanted:
        raise InputError(f"expected lora_targets such as 'q,v' or 'all', got {text!r}")
    if "qkv" in wanted and wanted & {"q", "k", "v"}:
        raise InputError("expected lora_targets with q, k, v or the projection as one, got both")
    return tuple(sorted(wanted, key=ORDER.index))


class Prompt(nn.Module):
    """weight (P, C): vectors that stand where a text's word vectors do, before them."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.zeros(count, dim))

    def forward(self) -> Tensor:
        """(P, C) fp32."""
        return self.weight


class Prefix(nn.Module):
    """Keys and values of P virtual tokens for each of N layers with H heads of D.

    weight      (P, N * 2 * H * D): of a layer the keys, then the values
    or, to train, what makes it: tanh(embedding U) W, with U (C, hidden), W (hidden, N * 2 * H * D)
    """

    def __init__(self, config: ModelConfig, count: int, hidden: int = 0):
        """
        Args:
            config: of the model.
            count: P.
            hidden: width of the MLP; 0: there is none.
        """
        super().__init__()
        self.config, self.count, wide = config, count, config.n_layer * 2 * config.dim
        self.weight = self.embedding = None
        if hidden:
            # Plain parameters: no layer of the model, so nobody casts or lays them out.
            self.embedding = nn.Parameter(torch.zeros(count, config.dim))
            self.up = nn.Parameter(torch.zeros(hidden, config.dim))
            self.down = nn.Parameter(torch.zeros(wide, hidden))
            self.up_bias = nn.Parameter(torch.zeros(hidden))
            self.down_bias = nn.Parameter(torch.zeros(wide))
        else:
            self.weight = nn.Parameter(torch.zeros(count, wide))

    def values(self) -> Tensor:
        """(P, N * 2 * H * D) fp32."""
        if self.weight is not None:
            return self.weight
        h = torch.tanh(F.linear(self.embedding, self.up, self.up_bias))
        return F.linear(h, self.down, self.down_bias)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """For each layer (P, 2 * H, D): heads of keys, then of values."""
        config = self.config
        shape = self.count, config.n_layer, 2 * config.n_head, config.dim // config.n_head
        return self.values().to(dtype).view(shape).unbind(1)


def adapt(model: nn.Module, adapter: Adapter, new: Collection[str] = ()) -> None:
    """Gives the model the parts of an adapter, whose numbers `begin` or a file sets.

    Args:
        model: without one; its head is trained with it.
        adapter: which kind.
        new: parameters beside the head that no file has set: they are trained, too.
    """
    body, config = body_of(model), model.config
    heads = model.head_groups
    whole = [n for n, _ in model.named_parameters() if n.split(".")[0] in heads or n in new]
    if adapter.method == "lora":
        for i in range(config.n_layer):
            for ours, parts in parts_of(adapter.targets, config).items():
                add_lora(body, i, ours, parts, adapter.r, adapter.alpha / adapter.r)
        if adapter.dropout:
            _let_drop(body, adapter.dropout)
    elif adapter.method == "prompt":
        body.prompt = Prompt(adapter.count, config.dim)
    else:
        body.prefix = Prefix(config, adapter.count, adapter.hidden if adapter.projection else 0)
    model.adapter = replace(adapter, whole=tuple(whole))
    noted = {"method": adapter.method, "count": body.virtual.count if body.virtual else 0}
    model.config = replace(config, adapter=config.adapter | noted)


def parts_of(targets: Iterable[str], config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Our name of each product of a layer that is adapted -> the columns of its result."""
    targets, C, found = set(targets), config.dim, {}
    wide = {"attention.out": C, "mlp.up": config.ffn_dim, "mlp.down": C}
    if "qkv" in targets:
        found["attention.qkv"] = (Part(0, 3 * C),)
    elif own := [i for i, name in enumerate("qkv") if name in targets]:
        found["attention.qkv"] = tuple(Part(i * C, (i + 1) * C) for i in own)
    for ours, width in wide.items():
        if SHORT[ours][0] in targets:
            found[ours] = (Part(0, width),)
    return found


def add_lora(
    body: Body, layer: int, ours: str, parts: tuple[Part, ...], r: int, scale: float
) -> LoRA:
    """LoRA for one product of one layer."""
    product = body.layers[layer].get_submodule(ours)
    product.lora = LoRA(product.weight.shape[1], parts, r, scale)
    return product.lora


def _let_drop(body: Body, p: float) -> None:
    """Every LoRA drops its input, each at a place of its own behind all others."""
    config = body.config
    for i, block in enumerate(body.layers):
        for j, ours in enumerate(SHORT):
            if (lora := block.get_submodule(ours).lora) is not None:
                lora.p, lora.site = p, 3 + 3 * config.n_layer + len(SHORT) * i + j
    body.sites = 3 + (3 + len(SHORT)) * config.n_layer
    body.columns = max(config.dim, config.ffn_dim)


def remove_adapter(model: nn.Module) -> None:
    """The base again; the head stays as it is."""
    body = body_of(model)
    for layer in body.modules():
        if isinstance(layer, Linear):
            layer.lora = None
    body.prompt = body.prefix = None
    body.sites, body.columns = 3 + 3 * body.config.n_layer, body.config.dim
    model.adapter, model.config = None, replace(model.config, adapter={})


def adapter_of(model: nn.Module) -> Adapter | None:
    """What `adapt` has given it."""
    return getattr(model, "adapter", None)


# ------------------------------------------------------------- the first numbers


@torch.no_grad()
def begin(model: nn.Module, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """The numbers that training begins with, a function of the seed.

    LoRA begins as the base: B is 0. Prompts and prefixes begin as words: those of
    `prompt_init_text`, or drawn from the vocabulary (Lester et al. 2021, section 3.2: better than
    random numbers); a prefix as their keys and values in the base (Li and Liang 2021, section 7.4).

    Raises:
        InputError: the text has no tokens.
    """
    body, generator = body_of(model), torch.Generator().manual_seed(config.seed)
    for layer in body.modules():
        if isinstance(layer, LoRA):
            layer.reset(generator)
    if body.virtual is None:
        return
    part = body.prompt if body.prompt is not None else body.prefix
    ids = first_words(config, body.virtual.count, tokenizer, generator)
    if body.prompt is not None:
        body.prompt.weight.normal_(0, body.config.init_std, generator=generator)
        if ids:
            body.prompt.weight.copy_(body.embeddings.word.weight[torch.tensor(ids)])
    elif part.weight is None:
        for weight in (part.up, part.down):
            weight.normal_(0, body.config.init_std, generator=generator)
        part.embedding.normal_(0, 1, generator=generator)
    elif ids:
        part.weight.copy_(_keys_of(model, ids))
    else:
        part.weight.normal_(0, 1, generator=generator)


def first_words(
    config: TrainConfig, count: int, tokenizer: Tokenizer, generator: torch.Generator
) -> list[int]:
    """The ids of the words that virtual tokens begin as; none for random numbers."""
    if config.prompt_init_text:
        (found,) = tokenizer.backend.encode_batch(
            [config.prompt_init_text], add_special_tokens=False
        )
        if not found.ids:
            raise InputError(f"prompt_init_text {config.prompt_init_text!r} has no tokens")
        return (found.ids * (count // len(found.ids) + 1))[:count]
    if config.prompt_init == "random":
        return []
    special = {tokenizer.backend.token_to_id(token) for token in tokenizer.special.values()}
    usable = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in special])
    drawn = torch.randint(len(usable), (count,), generator=generator)
    return usable[drawn].tolist()


def _keys_of(model: nn.Module, ids: list[int]) -> Tensor:
    """(P, N * 2 * H * D): keys and values of these tokens in the base, as a text of their own."""
    body, seen = body_of(model), []
    prefix, body.prefix = body.prefix, None

    def attention(qkv, layout, n_head, causal=False, dropout=None):
        seen.append(qkv[: len(ids), n_head:])
        return TORCH.attention(qkv, layout, n_head, causal, dropout)

    batch = collate([Example(ids, (), IGNORE_INDEX)], [0])
    body(batch.to(body.embeddings.word.weight.device), replace(TORCH, attention=attention))
    body.prefix = prefix
    return torch.stack(seen, 1).flatten(1)


# --------------------------------------------------------------------- merging


@torch.no_grad()
def merge(model: nn.Module) -> dict:
    """Puts LoRA into the weights, in fp64 and rounded once, and takes it out of the model.

    Returns:
        What `unmerge` wants: the LoRA parts and the weights as they were, by name.

    Raises:
        InputError: the model has no LoRA: prompts and prefixes are no part of any weight.
    """
    adapter = adapter_of(model)
    if adapter is None or adapter.method != "lora":
        what = "a model without" if adapter is None else f"a {adapter.method}, which is no matrix"
        raise InputError(f"expected an adapter of LoRA to merge, got {what}")
    kept = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and layer.lora is not None:
            kept[name] = layer.lora, layer.weight.detach().clone()
            wide, delta = layer.weight.double(), layer.lora.delta()
            wide[: len(delta)] += delta
            layer.weight.copy_(wide)
            layer.lora = None
    kept = {"adapter": adapter, "config": model.config, "layers": kept}
    model.adapter, model.config = None, replace(model.config, adapter={})
    return kept


@torch.no_grad()
def unmerge(model: nn.Module, merged: dict) -> None:
    """Undoes `merge`, to the bit."""
    for name, (lora, weight) in merged["layers"].items():
        layer = model.get_submodule(name)
        layer.weight.copy_(weight)
        layer.lora = lora
    model.adapter, model.config = merged["adapter"], merged["config"]
