"""A fine-tuning method is a table of parameter rules: pattern -> trained? learning rate, decay.

    full        *                 learning_rate
    partial     embeddings        frozen          --freeze embeddings,layers:0-3
                layers:0-3        frozen
                *                 learning_rate
    adaptive    layers:0-9        1e-6            --lr_rules 'layers:0-9=1e-6,*=1e-5'
                *                 1e-5            --layer_lr_decay 0.9   --head_lr 1e-3
    bitfit      head              learning_rate   --method bitfit
                *.bias            learning_rate
                *                 frozen
    lora        head              learning_rate   --method lora, prompt or prefix: the adapter's
                *.lora.*          learning_rate   own parameters stand for *.lora.*
                *                 frozen

The first rule whose pattern fits a parameter decides. A pattern is a group (embeddings, layers:N,
norm, pooler, head), a span of layers (layers:0-9), `*`, or, where it has a dot, a glob over the
name (`*.bias`, `layers.*.attention.qkv.*`). Norms and biases are never decayed.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .config import TrainConfig
from .errors import InputError

OF_METHODS = {  # methods -> settings that no other reads
    ("lora",): ("lora_r", "lora_alpha", "lora_dropout", "lora_targets"),
    ("prompt", "prefix"): ("num_virtual_tokens", "prompt_init", "prompt_init_text"),
    ("prefix",): ("prefix_projection", "prefix_hidden_size"),
}
RATES = {"bitfit": 3e-3, "lora": 1e-3, "prompt": 3e-2, "prefix": 1e-2}  # of few parameters
ADDED = {"lora": "*.lora.*", "prompt": "prompt", "prefix": "prefix"}  # the adapters' parameters
_LAYER = re.compile(r"layers:(\d+)")
_SPAN = re.compile(r"layers:(\d{1,9})-(\d{1,9})")  # int() refuses thousands of digits


@dataclass(frozen=True)
class Rule:
    """What happens to the parameters that fit `pattern`."""

    pattern: str  # a group, `layers:0-9`, `*`, or a glob with a dot
    learning_rate: float  # at the peak of the schedule; 0: frozen


@dataclass(frozen=True)
class ParamGroup:
    """A row of the table that is printed, and a group of the optimizer."""

    pattern: str
    matrices: bool  # or the norms and biases, which are never decayed
    names: tuple[str, ...]
    numbers: int
    learning_rate: float
    weight_decay: float


def rate_of(given: Mapping[str, Any]) -> dict[str, float]:
    """The learning rate of a method that is given without one; nothing, if it is TrainConfig's."""
    rate = RATES.get(given.get("method"))
    return {} if rate is None or "learning_rate" in given else {"learning_rate": rate}


def check_read(given: Mapping[str, Any]) -> None:
    """Raises InputError when a setting is given that the method does not read."""
    method = given.get("method", "full")
    for methods, names in OF_METHODS.items():
        for name in names:
            if name in given and method not in methods:
                wanted = " or ".join(methods)
                raise InputError(f"--{name} is read by --method {wanted}, not {method}")


def group_of(name: str) -> str:
    """The group of a parameter: `bert.layers.3.mlp.up.bias` is in `layers:3`."""
    parts = _inner(name).split(".")
    return f"layers:{parts[1]}" if parts[0] == "layers" else parts[0]


def _inner(name: str) -> str:
    return name.removeprefix("bert.").removeprefix("gpt.")


def rules_of(config: TrainConfig, n_layer: int, head: tuple[str, ...] = ("head",)) -> list[Rule]:
    """The table that the flags of a run describe, most special first.

    Args:
        config: freeze, then head_lr, then what method, lr_rules and layer_lr_decay say.
        n_layer: of the model.
        head: the groups that are new with the task, where `head_lr` and bitfit mean the head.

    Raises:
        InputError: a flag does not read as a list of patterns or rules, or two exclude each other.
    """
    rate, decay = config.learning_rate, config.layer_lr_decay
    rules = [Rule(pattern, 0.0) for pattern in _split("freeze", config.freeze)]
    if config.head_lr and not head:
        raise InputError("expected no head_lr, this model's head is its token table: leave it out")
    if config.method != "full":  # bitfit: Ben Zaken et al. 2022, arXiv:2106.10199
        for name, empty in (("lr_rules", ""), ("layer_lr_decay", 1.0)):
            if getattr(config, name) != empty:
                given = f"method {config.method} or {name}"
                raise InputError(f"expected {given}, got both: leave one out")
        rules += [Rule(group, config.head_lr or rate) for group in head]
        return [*rules, Rule(ADDED.get(config.method, "*.bias"), rate), Rule("*", 0.0)]
    if config.head_lr:
        rules += [Rule(group, config.head_lr) for group in head]
    rules += [_read_rule(text) for text in _split("lr_rules", config.lr_rules)]
    if decay != 1:
        rules += [Rule(f"layers:{i}", rate * decay ** (n_layer - i)) for i in range(n_layer)]
        rules.append(Rule("embeddings", rate * decay ** (n_layer + 1)))
    return [*rules, Rule("*", rate)]


def _split(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text and not parts:
        raise InputError(f"expected {flag} with a pattern such as 'layers:0-3', got {text!r}")
    return parts


def _read_rule(text: str) -> Rule:
    pattern, _, rate = text.partition("=")
    try:
        rate = float(rate)
    except ValueError:
        rate = -1.0
    if not pattern.strip() or not 0 <= rate < 1e3:
        raise InputError(f"expected lr_rules as pattern=rate,..., got {text!r}: try '*=2e-5'")
    return Rule(pattern.strip(), rate)


def _fits(pattern: str, name: str) -> bool:
    """Whether the parameter `name` is in the group, the span or the glob."""
    group = group_of(name)
    if pattern in ("*", group):
        return True
    if "." in pattern:
        return fnmatchcase(_inner(name), pattern)
    span, layer = _SPAN.fullmatch(pattern), _LAYER.fullmatch(group)
    return bool(span and layer and int(span[1]) <= int(layer[1]) <= int(span[2]))


def _check(pattern: str, names: list[str]) -> None:
    """Raises InputError when a pattern cannot be meant, with what is nearest to it."""
    groups = list(dict.fromkeys(group_of(name) for name in names))
    known = ", ".join(groups)
    known = re.sub(r"layers:0, (layers:\d+, )*layers:(\d+)", r"layers:0-\2", known)
    if span := _SPAN.fullmatch(pattern):
        low, high = int(span[1]), int(span[2])
        if low > high:
            todo = f"write 'layers:{high}-{low}'"
            raise InputError(f"expected layers from low to high, got {pattern!r}: {todo}")
        if f"layers:{high}" not in groups:
            raise InputError(f"no parameter is in layers:{high} of {pattern!r}: groups are {known}")
    if any(_fits(pattern, name) for name in names):
        return
    what, near = "no parameter is in", known.split(", ")
    if pattern[-1:].isdigit():
        near += groups
    if "." in pattern:
        what, near = "no parameter's name fits", _globs(names)
    elif _LAYER.fullmatch(pattern):
        near = []  # every layer is as near as any other
    close = difflib.get_close_matches(pattern, near, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"{what} {pattern!r}: {guess}groups are {known}")


def _globs(names: list[str]) -> list[str]:
    """Names, and globs that fit some: `*` for the layer, and for all before or after a dot."""
    found = {}
    for name in names:
        parts = re.sub(r"\.\d+\.", ".*.", _inner(name)).split(".")
        for i in range(1, len(parts)):
            for glob in (parts, [*parts[:i], "*"], ["*", *parts[i:]]):
                found[".".join(glob)] = None
    return list(found)


def apply_rules(model: nn.Module, rules: list[Rule], weight_decay: float) -> list[ParamGroup]:
    """Freezes what the rules freeze, and returns the table.

    Args:
        model: its parameters' `requires_grad` is set.
        rules: the first that fits decides.
        weight_decay: of parameters with two dimensions or more.

    Raises:
        InputError: a pattern fits nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for rule in rules:
        _check(rule.pattern, names)
    table: dict[tuple[int, bool], list] = {}
    for name, parameter in model.named_parameters():
        index = next((i for i, r in enumerate(rules) if _fits(r.pattern, name)), None)
        if index is None:
            raise InputError(f"no rule for {name}: end the rules with '*=RATE'")
        parameter.requires_grad_(rules[index].learning_rate > 0)
        table.setdefault((index, parameter.ndim > 1), []).append((name, parameter.numel()))
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("every parameter is frozen: leave one to train")
    return [
        ParamGroup(
            pattern=rules[index].pattern,
            matrices=decayed,
            names=tuple(name for name, _ in members),
            numbers=sum(numel for _, numel in members),
            learning_rate=rules[index].learning_rate,
            weight_decay=weight_decay if decayed and rules[index].learning_rate else 0.0,
        )
        for (index, decayed), members in sorted(
            table.items(), key=lambda item: (item[0][0], not item[0][1])
        )
    ]


def format_rules(groups: list[ParamGroup]) -> str:
    """The table as text, with the number of parameters in each row."""
    what = [g.pattern + (", matrices" if g.matrices else ", norms and biases") for g in groups]
    wide = max(31, *map(len, what))
    lines = [f"  {'rule':<{wide}}   parameters  learning rate  weight decay"]
    for name, g in zip(what, groups, strict=True):
        rate = f"{g.learning_rate:.3g}" if g.learning_rate else "frozen"
        lines.append(f"  {name:<{wide}} {g.numbers:>12,}  {rate:>13}  {g.weight_decay:>12g}")
    trained = sum(g.numbers for g in groups if g.learning_rate)
    total = sum(g.numbers for g in groups)
    return "\n".join([*lines, f"  {'trained':<{wide}} {trained:>12,}  of {total:,}"])
