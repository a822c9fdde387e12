"""Adapters on disk, in PEFT's layout, so that PEFT loads ours and we load PEFT's.

    adapter_config.json           which kind, its sizes, the base model
    adapter_model.safetensors     base_model.model.NAME.lora_A.weight (r, in), .lora_B.weight (out,
                                  r); or prompt_embeddings: (P, C) of a prompt, of a prefix
                                  (P, N * 2 * C); and the head, by its own names
    config.json                   the model's, with its labels and task, and the base's fingerprint
    prefix_projection.safetensors what makes a prefix, to train on

What PEFT has no model for is written in the same shape, and config.json says so (`adapter.peft`):
prefixes of encoders and of classifiers, and models of masked words, whose head is trained without
the token table that it multiplies with.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import ORDER, SHORT, Adapter, adapt, adapter_of, add_lora, parts_of
from .config import ModelConfig
from .errors import InputError
from .files import read_json, write_file, write_json
from .layers import body_of
from .lora import LoRA, Part
from .names import copy_parts, hf_names, in_file, is_transposed
from .storage import open_tensors

CONFIG, WEIGHTS, PROJECTION = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "prefix_projection.safetensors",
)
NO_BASE = "is an adapter: train over its base, or over the model that minift merge makes of LoRA"
TYPES = {"lora": "LORA", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
TASK_TYPES = {"classifier": "SEQ_CLS", "tokens": "TOKEN_CLS", "span": "QUESTION_ANS"}
NOT_BUILT = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "use_qalora")
SAMPLED = 64  # numbers of each tensor that a fingerprint looks at


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "model.safetensors").exists()


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Of the base: names, shapes and some numbers of every tensor that an adapter leaves alone."""
    adapter, digest = adapter_of(model), hashlib.sha256()
    whole = adapter.whole if adapter else ()
    own = re.compile(r".*\.lora\.|\w+\.(prompt|prefix)\.")
    for name, p in model.named_parameters():
        if name.split(".")[0] in ("bert", "gpt") and not own.match(name) and name not in whole:
            flat = in_file(p, name, model.config).detach().flatten()
            some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().cpu()
            digest.update(f"{name}{len(flat)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def note_base(model: nn.Module, base: str) -> None:
    """Notes in a model's configuration over which base its adapter is trained.

    Args:
        model: with the base's weights, as they are.
        base: folder or hub id.
    """
    noted = {"base": base, "fingerprint": fingerprint(model)}
    model.config = replace(model.config, adapter=model.config.adapter | noted)


# ---------------------------------------------------------------------- names


def _layer_names(config: ModelConfig, ours: str, layer: int) -> list[str]:
    """A file's names of the modules that one of our products is."""
    kind = config.kind
    return [f"{kind.prefix}{kind.layers}.{layer}.{name}" for name in kind.layer[ours]]


def _loras(model: nn.Module) -> Iterator[tuple[list[str], LoRA, bool]]:
    """A file's names of what each LoRA adapts, as many as it has parts; it; and whether its parts
    are some of a projection that is one in files, and has one name."""
    config = model.config
    for i, block in enumerate(body_of(model).layers):
        for ours in SHORT:
            lora = block.get_submodule(ours).lora
            names = _layer_names(config, ours, i)
            if lora is not None and len(names) > 1:
                names = [names[part.begin // config.dim] for part in lora.parts]
            if lora is not None:
                fused = ours == "attention.qkv" and len(config.kind.layer[ours]) == 1
                yield names, lora, fused and lora.parts != (Part(0, 3 * config.dim),)


def _start(adapter: Adapter) -> str:
    """What names in an adapter's file begin with."""
    return "base_model.model." if adapter.method == "lora" else "base_model."


# ----------------------------------------------------------------------- save


@torch.no_grad()
def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter and the head by the names of PEFT's files, on the CPU."""
    adapter, config, body, found = model.adapter, model.config, body_of(model), {}
    start = _start(adapter)
    for names, lora, some in _loras(model):
        a = lora.a.weight.split(lora.r)
        bs = [b.weight for b in lora.b]
        if some:  # one pair of more rows, whose B is 0 where parts do not meet
            a, bs = [lora.a.weight], [_spread(lora, body)]
        for name, a_i, b in zip(names, a, bs, strict=True):
            found[f"{start}{name}.lora_A.weight"] = a_i
            found[f"{start}{name}.lora_B.weight"] = b
    if body.virtual is not None:
        own = body.prompt() if body.prompt is not None else body.prefix.values()
        found["prompt_embeddings"] = own
    names, whole = hf_names(config), dict(model.named_parameters())
    for ours in adapter.whole:
        parameter = in_file(whole[ours].detach(), ours, config)
        stored = parameter.T if is_transposed(ours, parameter, config) else parameter
        found |= {start + names[ours][0]: stored}
    return {name: x.detach().cpu().contiguous().clone() for name, x in found.items()}


def _spread(lora: LoRA, body: nn.Module) -> Tensor:
    """(3C, parts * r): the B of all parts as one."""
    whole = lora.a.weight.new_zeros(3 * body.config.dim, len(lora.parts) * lora.r)
    for i, ((begin, end), b) in enumerate(zip(lora.parts, lora.b, strict=True)):
        whole[begin:end, i * lora.r : (i + 1) * lora.r] = b.weight
    return whole


def peft_config(model: nn.Module) -> dict[str, Any]:
    """The content of adapter_config.json."""
    adapter, config = model.adapter, model.config
    start, names = config.kind.prefix, hf_names(config)
    whole = [names[ours][0].removeprefix(start).split(".")[0] for ours in adapter.whole]
    found = {
        "base_model_name_or_path": config.adapter.get("base"),
        "inference_mode": True,
        "modules_to_save": list(dict.fromkeys(whole)) or None,
        "peft_type": TYPES[adapter.method],
        "revision": None,
        "task_type": TASK_TYPES.get(config.head, "CAUSAL_LM" if config.kind.decoder else None),
    }
    if adapter.method == "lora":
        return found | _lora_config(model)
    found |= {
        "num_attention_heads": config.n_head,
        "num_layers": config.n_layer,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": adapter.count,
        "token_dim": config.dim,
    }
    if adapter.method == "prompt":
        return found | {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
    hidden = adapter.hidden or config.dim
    return found | {"prefix_projection": adapter.projection, "encoder_hidden_size": hidden}


def _lora_config(model: nn.Module) -> dict[str, Any]:
    adapter, config, found = model.adapter, model.config, {}
    usual = adapter.r, adapter.alpha
    for names, lora, some in _loras(model):
        parts = len(lora.parts) if some else 1
        same = lora.r == adapter.r and lora.scale == adapter.alpha / adapter.r
        alpha = adapter.alpha if same else lora.scale * lora.r
        found |= dict.fromkeys(names, (parts * lora.r, parts * alpha))
    others = {}  # other ranks and alphas -> modules that have them
    for name, size in found.items():
        if size != usual:
            others.setdefault(size, []).append(name)
    patterns = [
        {name: size[i] for size, names in others.items() for name in _ends(names, config)}
        for i in (0, 1)
    ]
    return {
        "bias": "none",
        "fan_in_fan_out": config.kind.transposed,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "r": adapter.r,
        "target_modules": _ends(found, config),
        "rank_pattern": patterns[0],
        "alpha_pattern": patterns[1],
    }


def _ends(names: Collection[str], config: ModelConfig) -> list[str]:
    """The ends that names have in all layers, by which PEFT finds modules; or the names, where
    other modules end so too: BERT's `output.dense` is one of `attention.output.dense`."""
    start = f"{config.kind.prefix}{config.kind.layers}."
    ends = list(dict.fromkeys(n.removeprefix(start).partition(".")[2] for n in names))
    every = [
        name
        for i in range(config.n_layer)
        for ours in SHORT
        for name in _layer_names(config, ours, i)
    ]
    fit = {name for name in every if name.endswith(tuple("." + end for end in ends))}
    return ends if fit == set(names) else list(names)


def in_peft(config: ModelConfig, adapter: Adapter) -> bool:
    """Whether PEFT has a model for it."""
    if config.head == "lm":  # of masked words PEFT would save the token table with the head
        return config.kind.decoder
    return adapter.method != "prefix"


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes a model's adapter, each file whole or not at all.

    Raises:
        InputError: they cannot be written.
    """
    adapter, tensors = model.adapter, adapter_tensors(model)
    noted = {"targets": list(adapter.targets), "peft": in_peft(model.config, adapter)}
    config = replace(model.config, adapter=model.config.adapter | noted)
    write_file(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    if adapter.projection:
        parts = {k: x.detach().cpu() for k, x in body_of(model).prefix.named_parameters()}
        write_file(folder / PROJECTION, lambda path: save_file(parts, path))
    write_json(folder / CONFIG, peft_config(model))
    write_json(folder / "config.json", config.to_hf())


# ----------------------------------------------------------------------- load


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Which adapter a folder holds, for a model of that configuration.

    Raises:
        InputError: a file is missing or damaged, or it is of a kind that is not built.
    """
    raw, where = read_json(folder / CONFIG, ("peft_type",)), folder / CONFIG
    kinds = {theirs: ours for ours, theirs in TYPES.items()}
    method = kinds.get(raw["peft_type"])
    if method is None:
        known = ", ".join(kinds)
        raise InputError(f"{where}: expected peft_type {known}, got {raw['peft_type']!r}")
    if method == "lora":
        bad = [name for name in NOT_BUILT if raw.get(name)]
        bad += ["bias"] if raw.get("bias", "none") != "none" else []
        if bad:
            raise InputError(f"{where}: has {', '.join(bad)}, which is not built")
        return Adapter("lora", tuple(config.adapter.get("targets", ())))
    count, dim = raw.get("num_virtual_tokens"), raw.get("token_dim")
    if dim not in (None, config.dim):
        raise InputError(f"{where}: is for a model of width {dim}, this one's is {config.dim}")
    if not isinstance(count, int) or not 0 < count < config.max_len:
        raise InputError(
            f"{where}: expected num_virtual_tokens in 1 to {config.max_len - 1}, got {count!r}"
        )
    projection = method == "prefix" and (folder / PROJECTION).is_file()
    hidden = raw.get("encoder_hidden_size") or config.dim
    return Adapter(method, count=count, projection=projection, hidden=hidden)


def attach_adapter(model: nn.Module, folder: Path, new: tuple[str, ...] = ()) -> None:
    """Gives a base model the adapter of a folder, and the head that was trained with it.

    Args:
        model: without an adapter.
        folder: see above.
        new: parameters of the model that its own file does not have.

    Raises:
        InputError: a file is missing or damaged, or the adapter is of another base.
    """
    adapter = read_adapter(folder, model.config)
    before = model.config.adapter.get("fingerprint")
    if before and before != fingerprint(model):
        raise InputError(
            f"{folder}: is an adapter of another base than this {model.config.family}: its weights "
            f"are others; it was trained over {model.config.adapter.get('base')}"
        )
    if adapter.method == "lora":
        _attach_lora(model, adapter, folder, new)
    else:
        adapt(model, adapter, new)
    model.adapter = replace(model.adapter, whole=_held(model, folder, new))
    fill_adapter(model, folder)


def _held(model: nn.Module, folder: Path, new: tuple[str, ...]) -> tuple[str, ...]:
    """Of the parameters above the body those that an adapter's file holds, and those that it must
    hold: its head if it is ours, and of PEFT's at least what the base does not have."""
    adapter, config = model.adapter, model.config
    with open_tensors(folder / WEIGHTS) as tensors:
        stored = {name.removeprefix(_start(adapter)) for name in tensors.names}
    must = adapter.whole if config.adapter.get("fingerprint") else new
    above = {ours: names for ours, names in hf_names(config).items()
             if not ours.startswith(config.kind.body)}  # fmt: skip
    return tuple(n for n, (theirs, *_) in above.items() if theirs in stored or n in must)


def _attach_lora(model: nn.Module, adapter: Adapter, folder: Path, new: tuple[str, ...]) -> None:
    """LoRA where the file has some; ranks are its tensors', scales as adapter_config.json says."""
    config, raw, body = model.config, read_json(folder / CONFIG), body_of(model)
    with open_tensors(folder / WEIGHTS) as tensors:
        ranks = {
            name.removeprefix(_start(adapter)).removesuffix(".lora_A.weight"): tensors.get(name)
            for name in tensors.names
            if name.endswith(".lora_A.weight")
        }
    adapt(model, replace(adapter, targets=()), new)
    targets, kinds = set(), []
    for i in range(config.n_layer):
        for ours, shorts in SHORT.items():
            found = _found(_layer_names(config, ours, i), shorts, ranks, adapter.targets)
            if not found:
                continue
            shared = len(found) // len(set(found.values()))  # parts of one pair
            sizes = {
                (len(ranks[n]) // shared, _scale(raw, n, len(ranks[n]))) for n in found.values()
            }
            if len(sizes) > 1:
                names = " and ".join(found.values())
                raise InputError(f"{folder}: has other ranks in {names}: not built")
            (r, scale), parts = sizes.pop(), parts_of(found, config)[ours]
            add_lora(body, i, ours, parts, r, scale)
            targets |= set(found)
            kinds.append((r, scale * r))
    r, alpha = kinds[0] if kinds else (adapter.r, adapter.alpha)
    known = tuple(sorted(targets, key=ORDER.index))
    model.adapter = replace(model.adapter, targets=known, r=r, alpha=alpha)


def _found(
    names: list[str], shorts: tuple[str, ...], ranks: dict[str, Tensor], noted: tuple[str, ...]
) -> dict[str, str]:
    """Of a product the targets that a file has -> its name of each."""
    if len(names) == len(shorts):
        return {short: name for short, name in zip(shorts, names, strict=True) if name in ranks}
    split = [short for short in noted if short in shorts] or ["qkv"]
    return dict.fromkeys(split, names[0]) if names[0] in ranks else {}


def _scale(raw: dict[str, Any], name: str, r: int) -> float:
    """What B A is multiplied by in a module: PEFT's patterns fit the ends of names."""
    patterns = (raw.get("alpha_pattern") or {}).items()  # the first that fits decides
    fits = (value for end, value in patterns if re.fullmatch(rf"(.*\.)?({end})", name))
    alpha = next(fits, raw.get("lora_alpha", 8))
    return alpha / (r**0.5 if raw.get("use_rslora") else r)


class _File:
    """The tensors of a file, each of which somebody must take."""

    def __init__(self, path: Path):
        self.path, self.taken = path, set()
        with open_tensors(path) as tensors:
            self.tensors = {name: tensors.get(name) for name in tensors.names}

    def take(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """One of them; `shape` is what it must have.

        Raises:
            InputError: it is not there, or has another shape.
        """
        self.taken.add(name)
        if name not in self.tensors:
            raise InputError(
                f"{self.path}: expected a tensor {name!r}, found none: is the file whole?"
            )
        found = self.tensors[name]
        if shape is not None and found.shape != tuple(shape):
            raise InputError(
                f"{self.path}: expected {tuple(shape)} for {name}, the file holds "
                f"{tuple(found.shape)}: is it of another base?"
            )
        return found

    def check(self) -> None:
        """Raises InputError when something is left."""
        if left := sorted(set(self.tensors) - self.taken):
            raise InputError(
                f"{self.path}: {len(left)} tensors that this adapter does not have, the first "
                f"{left[0]!r}"
            )


@torch.no_grad()
def fill_adapter(model: nn.Module, folder: Path) -> None:
    """Copies the tensors of an adapter's file into the parts that a model has for them, strictly.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape.
    """
    adapter, config, body = model.adapter, model.config, body_of(model)
    start, file = _start(adapter), _File(folder / WEIGHTS)
    for names, lora, some in _loras(model):
        names = [start + name for name in names]
        (_fill_some if some else _fill_lora)(lora, names, body, file)
    if adapter.projection:
        parts = _File(folder / PROJECTION)
        for name, p in body.prefix.named_parameters():
            p.copy_(parts.take(name, p.shape))
        parts.check()
        file.take("prompt_embeddings")
    elif body.virtual is not None:
        own = (body.prompt if body.prompt is not None else body.prefix).weight
        own.copy_(file.take("prompt_embeddings", own.shape))
    names = hf_names(config)
    for ours in adapter.whole:
        name = start + names[ours][0]
        inside = in_file(model.get_parameter(ours), ours, config)
        copy_parts(inside, {name: file.take(name)}, ours, config, file.path)
    file.check()


def _fill_lora(lora: LoRA, names: list[str], body: nn.Module, file: _File) -> None:
    for name, a, b in zip(names, lora.a.weight.split(lora.r), lora.b, strict=True):
        a.copy_(file.take(name + ".lora_A.weight", a.shape))
        b.weight.copy_(file.take(name + ".lora_B.weight", b.weight.shape))


def _fill_some(lora: LoRA, names: list[str], body: nn.Module, file: _File) -> None:
    a, r = lora.a.weight, lora.r
    a.copy_(file.take(names[0] + ".lora_A.weight", a.shape))
    whole = file.take(names[0] + ".lora_B.weight", _spread(lora, body).shape)
    for i, ((begin, end), b) in enumerate(zip(lora.parts, lora.b, strict=True)):
        b.weight.copy_(whole[begin:end, i * r : (i + 1) * r])
    if not torch.equal(_spread(lora, body), whole.to(a.dtype)):
        raise InputError(
            f"{file.path}: expected zeros in {names[0]}.lora_B.weight where queries, keys and "
            "values do not meet, found others: delete config.json beside it if it is of an "
            "earlier run"
        )
