"""Full, partial and adaptive fine-tuning as tables, and that a step does what its table says."""

import math
import re
from collections import Counter

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minift.batch import Example, collate
from minift.bert import BertClassifier
from minift.config import ModelConfig, TrainConfig
from minift.errors import InputError
from minift.layers import init_weights
from minift.methods import ParamGroup, Rule, apply_rules, format_rules, group_of, rules_of
from minift.ops import TORCH, Draw
from minift.scratch import random_model
from minift.tasks.classification import Classification
from minift.train import TrainState, train

GROUPS = "embeddings, layers:0-1, pooler, head"
ARE = f"groups are {GROUPS}"
EXAMPLES = [Example([2, i, 9 + i, 3], [0, 0, 0, 0], i % 2) for i in range(5, 21)]


def make_model(n_layer: int = 2, **changes) -> BertClassifier:
    config = tiny_config(num_hidden_layers=n_layer, id2label={"0": "a", "1": "b"}, **changes)
    model = BertClassifier(ModelConfig.from_hf(config))
    init_weights(model, 0.2, seed=3)
    return model


def table(n_layer: int = 2, **flags) -> list[ParamGroup]:
    config = TrainConfig(**flags)
    return apply_rules(make_model(n_layer), rules_of(config, n_layer), config.weight_decay)


def rates(groups: list[ParamGroup]) -> dict[str, float]:
    """Parameter name -> the rate that its row gives it."""
    return {name: g.learning_rate for g in groups for name in g.names}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("bert.embeddings.word.weight", "embeddings"),
        ("bert.embeddings.norm.bias", "embeddings"),
        ("bert.layers.0.attention.qkv.weight", "layers:0"),
        ("bert.layers.11.mlp.norm.bias", "layers:11"),
        ("pooler.weight", "pooler"),
        ("head.bias", "head"),
        ("head.dense.weight", "head"),
        ("gpt.embeddings.position.weight", "embeddings"),
        ("gpt.layers.11.mlp.norm.bias", "layers:11"),
        ("gpt.norm.weight", "norm"),
    ],
)
def test_groups_are_parts_of_the_model(name, group):
    assert group_of(name) == group


def test_full_fine_tuning_is_one_rule():
    assert rules_of(TrainConfig(learning_rate=3e-5), 4) == [Rule("*", 3e-5)]
    assert set(rates(table(learning_rate=3e-5)).values()) == {3e-5}


def test_frozen_groups_come_first():
    config = TrainConfig(learning_rate=1.0, freeze=" embeddings , layers:0-1,", head_lr=2.0)
    assert rules_of(config, 4) == [
        *(Rule("embeddings", 0.0), Rule("layers:0-1", 0.0), Rule("head", 2.0), Rule("*", 1.0)),
    ]


def test_layers_learn_slower_the_deeper_they_lie():
    """The embeddings lie below layer 0; pooler and head are at the top and learn at full rate."""
    config = TrainConfig(learning_rate=1.0, layer_lr_decay=0.5)
    assert rules_of(config, 3) == [
        *(Rule("layers:0", 0.125), Rule("layers:1", 0.25), Rule("layers:2", 0.5)),
        *(Rule("embeddings", 0.0625), Rule("*", 1.0)),
    ]


def test_any_table_can_be_given():
    config = TrainConfig(learning_rate=1.0, lr_rules="layers:0-9=1e-6, head = 3e-3,*=1e-5")
    assert rules_of(config, 12)[:3] == [
        *(Rule("layers:0-9", 1e-6), Rule("head", 3e-3), Rule("*", 1e-5)),
    ]


def test_the_first_rule_that_fits_decides():
    """freeze before head_lr before lr_rules before layer_lr_decay."""
    flags = dict(freeze="layers:0", head_lr=4.0, lr_rules="layers:0-1=2,head=3,pooler=5")
    found = rates(table(3, learning_rate=1.0, layer_lr_decay=0.5, **flags))
    by_group = {group_of(name): rate for name, rate in found.items()}
    assert by_group == {
        **{"embeddings": 0.0625, "layers:0": 0.0, "layers:1": 2.0, "layers:2": 0.5},
        **{"pooler": 5.0, "head": 4.0},
    }


def test_a_span_holds_both_its_ends_and_counts_in_numbers():
    """Compared as text, 10 would lie between 1 and 2."""
    found = rates(table(12, learning_rate=1.0, freeze="layers:2-10"))
    frozen = {group_of(name) for name, rate in found.items() if not rate}
    assert frozen == {f"layers:{i}" for i in range(2, 11)}


def test_every_parameter_is_in_one_row():
    groups = table(freeze="layers:0", head_lr=1e-3)
    names = [name for g in groups for name in g.names]
    assert sorted(names) == sorted(name for name, _ in make_model().named_parameters())


def test_norms_and_biases_are_not_decayed_and_frozen_rows_neither():
    for g in table(weight_decay=0.25, freeze="layers:0", learning_rate=1.0):
        vectors = all(name.endswith("bias") or ".norm." in name for name in g.names)
        matrices = not any(name.endswith("bias") or ".norm." in name for name in g.names)
        assert vectors or matrices
        assert g.weight_decay == (0.25 if matrices and g.learning_rate else 0.0)


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("bert.layers.1.attention.qkv.bias", ["*.bias", "layers.*.attention.qkv.*", "layers.1.*"]),
        ("bert.layers.1.attention.qkv.bias", ["layers.[0-1].*.bias", "layers:1", "*.qkv.????"]),
        (
            "bert.embeddings.word.weight",
            ["embeddings.word.*", "embeddings.word.weight", "*.word.*"],
        ),
        ("head.weight", ["head.*", "*.weight", "head.weight"]),
    ],
)
def test_a_pattern_with_a_dot_is_a_glob_over_the_name(name, patterns):
    for pattern in patterns:
        groups = apply_rules(make_model(), [Rule(pattern, 2.0), Rule("*", 1.0)], 0.0)
        found = rates(groups)
        assert found[name] == 2.0, pattern
        assert found["pooler.weight"] == (2.0 if pattern == "*.weight" else 1.0), pattern


def test_a_glob_takes_what_it_says_and_no_more():
    found = rates(table(learning_rate=1.0, freeze="layers.*.attention.qkv.*,pooler.bias"))
    assert {name for name, rate in found.items() if not rate} == {
        *(f"bert.layers.{i}.attention.qkv.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
        "pooler.bias",
    }


def test_bitfit_is_the_head_and_every_bias():
    """Norms' biases too, their weights not; the matrix of BERT's pooler is pretrained and stays."""
    found = rates(table(learning_rate=1e-3, method="bitfit"))
    for name, rate in found.items():
        assert rate == (1e-3 if name.endswith(".bias") or name == "head.weight" else 0), name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"head.weight": 1.0, "pooler.bias": 1.0, "bert.layers.0.mlp.up.bias": 1.0}),
        ({"head_lr": 3.0}, {"head.weight": 3.0, "head.bias": 3.0, "pooler.bias": 1.0}),
        ({"freeze": "layers:0,head.bias"},
         {"head.weight": 1.0, "head.bias": 0.0, "bert.layers.0.mlp.up.bias": 0.0,
          "bert.layers.1.mlp.up.bias": 1.0}),
        ({"freeze": "embeddings", "head_lr": 3.0},
         {"bert.embeddings.norm.bias": 0.0, "head.weight": 3.0, "pooler.bias": 1.0}),
    ],
)  # fmt: skip
def test_freezing_and_the_heads_rate_come_before_bitfit(flags, expected):
    found = rates(table(learning_rate=1.0, method="bitfit", **flags))
    assert {name: found[name] for name in expected} == expected


def test_a_family_may_say_what_its_head_is():
    """In some the dense layer before the head is new: head_lr and bitfit mean it too."""
    new = ("pooler", "head")
    config = TrainConfig(learning_rate=1.0, head_lr=2.0)
    assert rules_of(config, 2, new) == [Rule("pooler", 2.0), Rule("head", 2.0), Rule("*", 1.0)]
    assert rules_of(TrainConfig(learning_rate=1.0, method="bitfit"), 2, new) == [
        *(Rule("pooler", 1.0), Rule("head", 1.0), Rule("*.bias", 1.0), Rule("*", 0.0)),
    ]


@pytest.mark.parametrize(("family", "trained"), [("roberta", True), ("bert", False)])
def test_training_asks_the_model_what_its_head_is(family, trained):
    """RoBERTa's dense layer is new with the head, BERT's pooler is pretrained."""
    model = make_model(model_type=family)
    TrainState.new(model, TrainConfig(method="bitfit"))
    assert model.pooler.weight.requires_grad == trained
    assert model.head.weight.requires_grad


def make_gpt2(head: str) -> nn.Module:
    raw = dict(model_type="gpt2", vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=9)
    return random_model(ModelConfig.from_hf(raw), ("a", "b"), 0, head)


def test_a_decoder_has_the_same_patterns_and_a_norm_at_its_end():
    """Groups, spans and globs; what is above the layers learns at full rate."""
    model = make_gpt2("classifier")
    flags = dict(freeze="embeddings,layers.0.attention.*", layer_lr_decay=0.5, head_lr=3.0)
    rules = rules_of(TrainConfig(learning_rate=1.0, **flags), 2, model.head_groups)
    found = rates(apply_rules(model, rules, 0.0))
    assert found["gpt.embeddings.word.weight"] == found["gpt.layers.0.attention.qkv.bias"] == 0
    assert (found["gpt.layers.0.mlp.up.weight"], found["gpt.layers.1.mlp.up.bias"]) == (0.25, 0.5)
    assert (found["gpt.norm.weight"], found["head.weight"]) == (1.0, 3.0)
    found = rates(apply_rules(model, [Rule("norm", 2.0), Rule("*", 1.0)], 0.0))
    assert {name for name, rate in found.items() if rate == 2} == {
        "gpt.norm.weight",
        "gpt.norm.bias",
    }
    with pytest.raises(InputError, match="groups are embeddings, layers:0-1, norm, head"):
        apply_rules(model, [Rule("norms", 0.0), Rule("*", 1.0)], 0.0)


def test_a_language_model_has_no_head_to_learn_faster():
    """Its projection is the token table: a rate for the head would go nowhere unseen. bitfit
    trains its biases."""
    model = make_gpt2("lm")
    with pytest.raises(InputError, match="head_lr, this model's head is its token table"):
        rules_of(TrainConfig(head_lr=1e-3), 2, model.head_groups)
    TrainState.new(model, TrainConfig(method="bitfit"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith(".bias")}


FLAGS = [
    *({}, {"freeze": "layers:0,embeddings"}, {"layer_lr_decay": 0.9}, {"method": "bitfit"}),
    {"freeze": "layers.*.attention.qkv.weight"},  # wider than the column
]


@pytest.mark.parametrize("flags", FLAGS)
def test_the_printed_numbers_add_up(flags):
    model, groups = make_model(), table(**flags)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    lines = format_rules(groups).splitlines()
    rows = [
        re.fullmatch(r"  (\S+, [a-z ]+\w) +([\d,]+) +(\S+) +(\S+)", line) for line in lines[1:-1]
    ]
    assert len(rows) == len(groups)
    for row, g in zip(rows, groups, strict=True):
        number = int(row[2].replace(",", ""))
        assert number == g.numbers == sum(sizes[name] for name in g.names)
        assert (row[3] == "frozen") == (g.learning_rate == 0)
        assert float(row[4]) == g.weight_decay
    assert len({len(line) for line in lines[:-1]}) == 1
    total = re.fullmatch(r"  trained +([\d,]+)  of ([\d,]+)", lines[-1])
    trained = sum(g.numbers for g in groups if g.learning_rate)
    assert [int(x.replace(",", "")) for x in total.groups()] == [trained, sum(sizes.values())]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze": "layers:5"}, f"no parameter is in 'layers:5': groups are {GROUPS}"),
        ({"freeze": "layer:0"}, f"no parameter is in 'layer:0': did you mean 'layers:0'? {ARE}"),
        (
            {"freeze": "layers:*"},
            f"no parameter is in 'layers:*': did you mean 'layers:0-1'? {ARE}",
        ),
        ({"freeze": "layer:0-1"}, "'layer:0-1': did you mean 'layers:0-1'?"),
        ({"freeze": "embedding"}, "'embedding': did you mean 'embeddings'?"),
        ({"freeze": "bert.head"}, "no parameter's name fits 'bert.head'"),
        ({"freeze": "layers:1-0"}, "low to high, got 'layers:1-0': write 'layers:0-1'"),
        ({"freeze": "layers:0-" + "9" * 5000}, "no parameter is in 'layers:0-999"),
        ({"freeze": "layers:0-99"}, f"no parameter is in layers:99 of 'layers:0-99': {ARE}"),
        ({"lr_rules": "layers:3-9=1e-3"}, "no parameter is in layers:9 of 'layers:3-9'"),
        ({"lr_rules": "encoder=1e-3"}, "no parameter is in 'encoder': "),
        ({"freeze": "*.biases"}, "no parameter's name fits '*.biases': did you mean '*.bias'?"),
        ({"freeze": "bert.layers.*.mlp.*"}, "did you mean 'layers.*.mlp.*'?"),
        ({"freeze": "layers.*.attention.kqv.*"}, "did you mean 'layers.*.attention.qkv.*'?"),
        (
            {"freeze": "Head.bias"},
            "fits 'Head.bias': did you mean 'head.bias'?",
        ),
        ({"freeze": "x.y"}, f"no parameter's name fits 'x.y': {ARE}"),
        ({"freeze": ","}, "expected freeze with a pattern such as 'layers:0-3', got ','"),
        ({"lr_rules": " "}, "expected lr_rules with a pattern such as 'layers:0-3', got ' '"),
        ({"method": "bitfit", "lr_rules": "*=1"}, "expected method bitfit or lr_rules, got both"),
        ({"method": "bitfit", "layer_lr_decay": 0.9}, "expected method bitfit or layer_lr_decay"),
        ({"method": "bitfit", "freeze": "*.bias,head"}, "every parameter is frozen"),
        ({"freeze": "*.*"}, "every parameter is frozen: leave one to train"),
        ({"freeze": "*"}, "every parameter is frozen: leave one to train"),
        ({"freeze": "embeddings,layers:0-1,pooler,head"}, "every parameter is frozen"),
        ({"lr_rules": "*=0"}, "every parameter is frozen"),
        ({"learning_rate": 0.0}, "every parameter is frozen"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(flags, message):
    with pytest.raises(InputError) as caught:
        table(**flags)
    assert str(caught.value).count("\n") == 0
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "=1e-3",
        "head",
        "head=",
        "head=x",
        "head=-1",
        "head=nan",
        "head=inf",
        "head=1e3",
        "=",
        "a=b=1",
    ],
)
def test_lr_rules_that_do_not_read_as_rules(text):
    with pytest.raises(InputError, match="expected lr_rules as pattern=rate,") as caught:
        rules_of(TrainConfig(lr_rules=text), 2)
    assert repr(text) in str(caught.value)


def test_rules_without_an_end_are_refused():
    """From Python a table may lack the last rule that the flags always add."""
    with pytest.raises(InputError, match=r"no rule for pooler.weight: end the rules with '\*=RATE"):
        apply_rules(make_model(), [Rule("embeddings", 1.0), Rule("layers:0-1", 1.0)], 0.0)


def test_a_later_table_thaws_what_an_earlier_one_froze():
    model = make_model()
    apply_rules(model, [Rule("embeddings", 0.0), Rule("*", 1.0)], 0.0)
    apply_rules(model, [Rule("*", 1.0)], 0.0)
    assert all(p.requires_grad for p in model.parameters())


FROZEN = pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ("embeddings", {"layers:0", "layers:1", "pooler", "head"}),
        ("embeddings,layers:0", {"layers:1", "pooler", "head"}),
        ("layers:1", {"embeddings", "layers:0", "pooler", "head"}),
        ("embeddings,layers:0-1,pooler", {"head"}),
    ],
)


@FROZEN
def test_a_step_changes_what_is_trained_and_nothing_else(freeze, trained):
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(freeze=freeze, learning_rate=1e-2, max_steps=1, weight_decay=0.1)
    for _ in train(model, EXAMPLES, config):
        pass
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == (group_of(name) not in trained), name


@FROZEN
def test_backward_stops_below_the_lowest_trained_group(freeze, trained):
    """No gradient is computed for nothing: neither of a frozen parameter nor of an activation
    below the lowest trained one."""
    model, needed = make_model(), []
    TrainState.new(model, TrainConfig(freeze=freeze))
    for layer in model.bert.layers:
        layer.register_forward_hook(lambda *args: needed.append(args[-1][0].requires_grad))
    batch, task = collate(EXAMPLES, range(8)), Classification(("a", "b"))
    task.loss(model(batch), batch, TORCH).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (group_of(name) in trained), name
    groups = ["embeddings", "layers:0", "layers:1"]
    lowest = min((groups.index(g) for g in trained if g in groups), default=math.inf)
    assert needed == [lowest <= 1, lowest <= 2]


class Products(TorchDispatchMode):
    """Counts matrix products while it is on: those of layers, and the batched ones of attention."""

    layers = attention = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        self.layers += name in ("mm", "addmm")
        self.attention += name in ("bmm", "baddbmm")
        return op(*args, **(kwargs or {}))


def costs(dtype: torch.dtype, **flags) -> tuple[tuple[int, int], Counter]:
    """One step of three layers: products of the backward, and tensors that the forward keeps for
    it, by the part of the model that keeps them."""
    model, part, kept = make_model(3), ["embeddings"], Counter()
    TrainState.new(model, TrainConfig(**flags))
    for i, layer in enumerate(model.bert.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: part.append(f"layers:{i}"))
    layer.register_forward_hook(lambda *_: part.append("top"))
    batch, task = collate(EXAMPLES, range(8)), Classification(("a", "b"))
    draw = Draw(torch.tensor(1), torch.tensor(0))  # dropout is on

    def keep(tensor):
        kept[part[-1]] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model(batch, TORCH, dtype, draw), batch, TORCH)
    with Products() as products:
        loss.backward()
    return (products.layers, products.attention), kept


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
LAYERS = ["layers:0", "layers:1", "layers:2"]


@BOTH
@pytest.mark.parametrize(
    ("flags", "products", "keeping"),
    [
        # A layer has four products (qkv, out, up, down), each with a gradient of its input and one
        # of its weight; pooler and head have one product each; attention's backward has four.
        ({}, (3 * 8 + 4, 12), ["embeddings", *LAYERS, "top"]),
        ({"freeze": "embeddings"}, (3 * 8 - 1 + 4, 12), [*LAYERS, "top"]),
        ({"freeze": "embeddings,layers:0"}, (2 * 8 - 1 + 4, 8), [*LAYERS[1:], "top"]),
        ({"freeze": "embeddings,layers:0-1"}, (8 - 1 + 4, 4), ["layers:2", "top"]),
        ({"freeze": "embeddings,layers:0-2"}, (3, 0), ["top"]),
        ({"freeze": "embeddings,layers:0-2,pooler"}, (1, 0), ["top"]),
        # Above what is trained, gradients of inputs alone.
        ({"freeze": "layers:0-2,pooler"}, (3 * 4 + 1 + 2, 12), ["embeddings", *LAYERS, "top"]),
        ({"freeze": "layers.*.weight"}, (3 * 4 + 4, 12), ["embeddings", *LAYERS, "top"]),
        ({"method": "bitfit"}, (3 * 4 + 1 + 2, 12), ["embeddings", *LAYERS, "top"]),
        (
            {"method": "bitfit", "freeze": "embeddings,layers:0-1"},
            *((4 - 1 + 1 + 2, 4), ["layers:2", "top"]),
        ),
    ],
    ids=str,
)
def test_what_is_frozen_costs_no_product_and_keeps_nothing(flags, products, keeping, dtype):
    """Exact numbers: below the lowest trained parameter there is no backward at all, and nothing is
    kept for one; above it no frozen weight has a gradient computed."""
    found, kept = costs(dtype, **flags)
    assert found == products
    assert sorted(kept) == sorted(keeping)


@BOTH
def test_bitfit_keeps_no_input_of_a_product(dtype):
    """They are what a weight's gradient is made of: four a layer, and the pooler's."""
    (_, full), (_, bitfit) = costs(dtype), costs(dtype, method="bitfit")
    fewer = {part: full[part] - bitfit[part] for part in [*LAYERS, "top"]}
    assert fewer == {"layers:0": 4, "layers:1": 4, "layers:2": 4, "top": 1}


@pytest.mark.parametrize(
    "flags",
    [
        *({}, {"method": "bitfit"}, {"freeze": "embeddings,layers:0"}),
        {"freeze": "embeddings,layers:0-1,pooler", "optim": "sgd"},
    ],
)
def test_gradients_and_moments_are_as_many_numbers_as_are_trained(flags):
    model, config = make_model(), TrainConfig(max_steps=1, **flags)
    state, numbers = TrainState.new(model, config), []

    def count(*_):
        numbers.append(sum(p.grad.numel() for p in model.parameters() if p.grad is not None))

    state.optimizer.register_step_pre_hook(count)
    list(train(model, EXAMPLES, config, state=state))
    trained = sum(g.numbers for g in state.groups if g.learning_rate)
    assert numbers == [trained]
    moments = [t for kinds in state.optimizer.state.values() for n, t in kinds.items()
               if n != "step"]  # fmt: skip
    assert sum(t.numel() for t in moments) == trained * (1 if "optim" in flags else 2)


def test_groups_learn_at_their_own_rates():
    """A first Adam step is as long as the learning rate, whatever the gradient."""
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = dict(learning_rate=1e-3, head_lr=1e-2, lr_rules="layers:1=1e-4", weight_decay=0.0)
    for _ in train(model, EXAMPLES, TrainConfig(max_steps=1, adam_epsilon=1e-30, **flags)):
        pass
    for name, parameter in model.named_parameters():
        longest = (parameter - before[name]).abs().max().item()
        rate = {"head": 1e-2, "layers:1": 1e-4}.get(group_of(name), 1e-3)
        assert longest == pytest.approx(rate, rel=0.01), name
