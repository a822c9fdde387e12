"""A fine-tuning method is a table of parameter rules: pattern -> trained? learning rate, decay.

    full        *                 learning_rate
    partial     embeddings        frozen          --freeze embeddings,layers:0-3
                layers:0-3        frozen
                *                 learning_rate
    adaptive    layers:0-9        1e-6            --lr_rules 'layers:0-9=1e-6,*=1e-5'
                *                 1e-5            --layer_lr_decay 0.9   --head_lr 1e-3

The first rule whose pattern fits a parameter's group decides. Groups: embeddings, layers:N, pooler,
head. Norms and biases are never decayed.
"""

import re
from dataclasses import dataclass

from torch import nn

from .config import TrainConfig
from .errors import InputError


@dataclass(frozen=True)
class Rule:
    """What happens to the parameters whose group fits `pattern`."""

    pattern: str  # a group, `layers:0-9`, or `*`
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


def group_of(name: str) -> str:
    """The group of a parameter: `bert.layers.3.mlp.up.bias` is in `layers:3`."""
    parts = name.removeprefix("bert.").split(".")
    return f"layers:{parts[1]}" if parts[0] == "layers" else parts[0]


def rules_of(config: TrainConfig, n_layer: int) -> list[Rule]:
    """The table that the flags of a run describe, most special first.

    Raises:
        InputError: a flag does not read as a list of patterns or rules.
    """
    rules = [Rule(pattern, 0.0) for pattern in _split(config.freeze)]
    if config.head_lr:
        rules.append(Rule("head", config.head_lr))
    for text in _split(config.lr_rules):
        pattern, _, rate = text.partition("=")
        try:
            rate = float(rate)
        except ValueError:
            rate = -1.0
        if not 0 <= rate < 1e3:
            raise InputError(f"expected lr_rules as pattern=rate,..., got {text!r}: try '*=2e-5'")
        rules.append(Rule(pattern.strip(), rate))
    decay, rate = config.layer_lr_decay, config.learning_rate
    if decay != 1:
        rules += [Rule(f"layers:{i}", rate * decay ** (n_layer - i)) for i in range(n_layer)]
        rules.append(Rule("embeddings", rate * decay ** (n_layer + 1)))
    return [*rules, Rule("*", rate)]


def _split(text):
    return [part.strip() for part in text.split(",") if part.strip()]


def _fits(pattern: str, group: str) -> bool:
    if pattern in ("*", group):
        return True
    span = re.fullmatch(r"layers:(\d+)-(\d+)", pattern)
    layer = re.fullmatch(r"layers:(\d+)", group)
    return bool(span and layer and int(span[1]) <= int(layer[1]) <= int(span[2]))


def apply_rules(model: nn.Module, rules: list[Rule], weight_decay: float) -> list[ParamGroup]:
    """Freezes what the rules freeze, and returns the table.

    Args:
        model: its parameters' `requires_grad` is set.
        rules: the first that fits decides.
        weight_decay: of parameters with two dimensions or more.

    Raises:
        InputError: a pattern fits nothing, or nothing is left to train.
    """
    groups = sorted({group_of(name) for name, _ in model.named_parameters()})
    for rule in rules[:-1]:
        if not any(_fits(rule.pattern, group) for group in groups):
            raise InputError(f"no parameter is in {rule.pattern!r}: groups are {', '.join(groups)}")
    table: dict[tuple[int, bool], list] = {}
    for name, parameter in model.named_parameters():
        index = next((i for i, r in enumerate(rules) if _fits(r.pattern, group_of(name))), None)
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
    lines = ["  rule                              parameters  learning rate  weight decay"]
    for g in groups:
        rate = f"{g.learning_rate:.3g}" if g.learning_rate else "frozen"
        what = g.pattern + (", matrices" if g.matrices else ", norms and biases")
        lines.append(f"  {what:<31} {g.numbers:>12,}  {rate:>13}  {g.weight_decay:>12g}")
    trained = sum(g.numbers for g in groups if g.learning_rate)
    total = sum(g.numbers for g in groups)
    return "\n".join([*lines, f"  {'trained':<31} {trained:>12,}  of {total:,}"])
