"""How adapters learn: the same run as PEFT's, what a step costs and leaves alone, and dropout that
a split of the batch does not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapted import (
    LAYERS,
    QV,
    VOCAB,
    P,
    as_saved,
    assert_near,
    of_peft,
    peer,
    saved,
    theirs_out,
)
from test_adapters import adapted, scattered, small
from torch.utils._python_dispatch import TorchDispatchMode

from minift import Example, TrainConfig, train
from minift.adapters import Adapter, Prefix, adapt
from minift.batch import Batches, collate
from minift.layers import body_of
from minift.ops import TORCH, Draw, Virtual
from minift.saving import load_adapted
from minift.tasks.classification import Classification
from minift.tasks.language import LanguageModel
from minift.tasks.tagging import Tagging
from minift.train import TrainState

LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")
TASKS = {
    "classifier": Classification(LABELS),
    "tokens": Tagging(LABELS),
    "lm": LanguageModel(),
}


def rows_for(head: str, n: int = 24, seed: int = 1) -> list[Example]:
    """Rows to learn: sequences of 1 to 9 tokens."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        ids = rng.integers(2, VOCAB, 1 + i % 9 + (head == "lm"))
        if head == "classifier":
            found.append(Example(ids, (), int(ids[0]) % 3))
        elif head == "tokens":
            found.append(Example(ids, (), ids % 3))
        else:
            found.append(Example(ids[:-1], (), ids[1:]))
    return found


def their_loss(model, rows: list[Example], head: str) -> torch.Tensor:
    """The mean over all targets of a step."""
    outs = theirs_out(model, rows, head)
    if head == "classifier":
        return F.cross_entropy(torch.stack(outs), torch.tensor([row.target for row in rows]))
    targets = torch.cat([torch.tensor(np.asarray(row.target)) for row in rows])
    return F.cross_entropy(torch.cat(outs), targets)


RUNS = [
    ("bert", "classifier", "lora", dict(r=3, lora_alpha=5, target_modules=QV["bert"]), {}),
    ("roberta", "tokens", "lora", dict(r=2, lora_alpha=4, target_modules=["query", "dense"]), {}),
    ("distilbert", "classifier", "prompt", {}, dict(max_grad_norm=0.05)),
    ("bert", "tokens", "prompt", {}, dict(weight_decay=0.0)),
    ("gpt2", "lm", "lora", dict(r=2, lora_alpha=4, target_modules=["c_attn", "mlp.c_proj"]), {}),
    ("gpt2", "lm", "prompt", {}, dict(max_grad_norm=0.05)),
    ("gpt2", "lm", "prefix", {}, {}),
    ("gpt2", "lm", "prefix", dict(prefix_projection=True, encoder_hidden_size=7), {}),
    ("gpt2", "classifier", "prompt", {}, {}),
]


@pytest.mark.parametrize(("family", "head", "method", "settings", "flags"), RUNS, ids=str)
def test_ten_steps_are_pefts(family, head, method, settings, flags, tmp_path):
    """Loss after loss, and every parameter of adapter and head in the end: AdamW, a warm-up, decay
    of matrices, clipped and not. PEFT's model is trained by a plain loop."""
    base = peer(family, head)
    theirs = of_peft(base, method, head, **settings)
    model = load_adapted(saved(theirs, tmp_path / "adapter"), saved(base, tmp_path / "base"))
    if settings.get("prefix_projection"):
        with_projection(model, theirs)
    rows = rows_for(head)
    flags = dict(max_grad_norm=0.0, weight_decay=0.1) | flags
    config = TrainConfig(method=method, learning_rate=1e-2, max_steps=10, warmup_steps=3.0,
                         per_device_train_batch_size=4, **flags)  # fmt: skip
    trained = [p for p in theirs.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0)
    rates = []
    for step in train(model, rows, config, TASKS[head]):
        loss = their_loss(theirs, [rows[i] for i in step.rows], head)
        assert step.loss == pytest.approx(loss.item(), rel=2e-5)
        optimizer.zero_grad()
        loss.backward()
        if config.max_grad_norm:
            norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            assert norm > 2 * config.max_grad_norm  # so that clipping is seen
        for group in optimizer.param_groups:
            group["lr"] = step.learning_rate
        rates.append(step.learning_rate)
        optimizer.step()
    assert max(rates) == pytest.approx(1e-2)
    assert len(set(rates)) > 5
    assert_near(as_saved(model), as_saved(theirs), "parameter", rtol=2e-4)


def with_projection(model, theirs) -> None:
    """Our MLP of a prefix with the numbers of PEFT's, in place of what that makes."""
    encoder = theirs.prompt_encoder.default
    own = Prefix(model.config, P, 7)
    pairs = [(own.embedding, encoder.embedding.weight)]
    for name, other in (("up", encoder.transform[0]), ("down", encoder.transform[2])):
        pairs += [(getattr(own, name), other.weight), (getattr(own, f"{name}_bias"), other.bias)]
    with torch.no_grad():
        for ours, other in pairs:
            ours.copy_(other)
    body_of(model).prefix = own


# -------------------------------------------------------------------- what a step costs

EXAMPLES = [Example([2, i, 9 + i, 3], (), i % 3) for i in range(5, 21)]
METHODS = ("lora", "prompt", "prefix")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_a_step_changes_the_adapter_and_the_head_and_nothing_else(method, family):
    """No frozen parameter has a gradient or a moment."""
    model = adapted(method, family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(method=method, learning_rate=1e-2, max_steps=2, weight_decay=0.1)
    state = TrainState.new(model, config)
    for _ in train(model, EXAMPLES, config, state=state):
        frozen = [p.grad is None for p in model.parameters() if not p.requires_grad]
        assert all(frozen)
    heads = {"bert": ("head",), "distilbert": ("pooler", "head"), "gpt2": ("head",)}[family]
    trained = {
        name
        for name in before
        if name.split(".")[0] in heads or any(f".{part}." in name for part in METHODS)
    }
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    own = dict(model.named_parameters())
    assert {id(p) for p in state.optimizer.state} == {id(own[name]) for name in trained}


class Products(TorchDispatchMode):
    """Counts matrix products while it is on: those of layers, and the batched ones of attention."""

    layers = attention = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__.removesuffix("_")
        self.layers += name in ("mm", "addmm")
        self.attention += name in ("bmm", "baddbmm")
        return op(*args, **(kwargs or {}))


def products(method: str, **flags) -> tuple[int, int]:
    """Matrix products of a backward pass: of layers, and of attention."""
    keys = {k: v for k, v in flags.items() if k.startswith("lora") or k == "num_virtual_tokens"}
    model = adapted(method, **keys)
    TrainState.new(model, TrainConfig(method=method, **flags))
    batch, task = collate(EXAMPLES, range(8)), TASKS["classifier"]
    loss = task.loss(model(batch, TORCH), batch, TORCH)
    with Products() as found:
        loss.backward()
    return found.layers, found.attention


@pytest.mark.parametrize(
    ("method", "flags", "wanted"),
    [
        # A layer has 4 products (qkv, out, up, down), of which only gradients of inputs are made;
        # the head has both of its own, the pooler before it one; attention's backward has 4. A LoRA
        # has 2 for each B, 1 for A, and 1 for its input. Nothing is below the first layer's qkv.
        ("lora", {}, (2 * 4 - 1 + 3 + (5 + 1) + 5, 8)),
        ("lora", dict(lora_targets="all"), (2 * 4 - 1 + 3 + (7 + 12 + 1) + 7 + 12, 8)),
        ("lora", dict(freeze="layers:0"), (4 - 1 + 3 + 5, 4)),
        ("lora", dict(freeze="layers:1"), (2 * 4 - 1 + 3 + 5 + 3, 8)),
        ("lora", dict(lora_targets="down", freeze="layers:0"), (1 + 3 - 1 + 3, 0)),
        ("lora", dict(freeze="layers:0-1"), (2 - 1, 0)),
        ("prompt", {}, (2 * 4 + 3, 8)),
        ("prefix", {}, (2 * 4 - 1 + 3, 8)),
    ],
    ids=str,
)
def test_what_is_frozen_costs_no_product(method, flags, wanted):
    """Exact numbers: no product for the gradient of a frozen weight, and none at all below the
    lowest parameter that is trained."""
    assert products(method, **flags) == wanted


def test_forward_costs_two_products_more_for_a_lora():
    """All A of a projection are one."""
    counts = []
    for targets in ("", "q,v", "q,k,v", "up"):
        model = adapted("lora", lora_targets=targets or "q,v")
        if not targets:
            model = adapted("prompt")
            body_of(model).prompt = None
        with Products() as found:
            model(collate(EXAMPLES, range(8)), TORCH)
        counts.append(found.layers)
    assert [n - counts[0] for n in counts[1:]] == [LAYERS * 3, LAYERS * 4, LAYERS * 2]


# ----------------------------------------------------------------- checkpointing, dropout


DROPS = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
OF_GPT = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


def dropping(method: str, family: str = "bert", **settings):
    """A model with an adapter whose dropouts all drop."""
    model = small(family, **(OF_GPT if family == "gpt2" else DROPS))
    virtual = dict(lora_dropout=0.2, lora_targets="all")
    virtual = virtual if method == "lora" else dict(num_virtual_tokens=P)
    config = TrainConfig(method=method, **virtual | settings)
    adapt(model, Adapter.of(config, model.config))
    TrainState.new(model, config)
    return scattered(model)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_8_is_2_of_4_with_every_dropout_on(method, family):
    """A mask depends on the example and the position, virtual ones too; so accumulation gives the
    same loss and gradients. Another step drops others."""
    model = dropping(method, family)
    one, two, other = (
        losses_and_gradients(model, splits, step)
        for splits, step in (([(0, 8)], 5), ([(0, 4), (4, 8)], 5), ([(0, 8)], 6))
    )
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert abs(other[0] - one[0]) > 1e-3
    assert_near(two[1], one[1], "gradient", rtol=1e-5)


def losses_and_gradients(model, splits, step, checkpointing=False):
    """The loss of a step of so many micro-batches, and the gradients by name."""
    draw, task = Draw(torch.tensor(3), torch.tensor(step)), TASKS["classifier"]
    virtual, total, rows = body_of(model).virtual, 0.0, splits[-1][1]
    model.zero_grad(set_to_none=True)
    for a, b in splits:
        batch = collate(EXAMPLES, range(a, b), a, True, b - a, virtual)
        out = model(batch, TORCH, torch.float32, draw, checkpointing)
        loss = task.loss(out, batch, TORCH) / rows
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_bits(method):
    """With every dropout on, LoRA's too: in backward a block is computed again."""
    for settings in ({}, dict(lora_dropout=0.0)) if method == "lora" else ({},):
        model = dropping(method, **settings)
        plain, again = (losses_and_gradients(model, [(0, 8)], 5, on) for on in (False, True))
        assert plain[0] == again[0]
        assert plain[1].keys() == again[1].keys()
        assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_prompt_drops_as_the_words_do(family):
    """Behind the embeddings, by the keys of its own rows."""
    model = dropping("prompt", family)
    body, batch = body_of(model), body_of(model).seen(collate(EXAMPLES, range(4)))
    dropout = body.draw(Draw(torch.tensor(3), torch.tensor(5)), batch, TORCH).at(0, 0.4)
    whole = body.embed(batch, TORCH, torch.float32, None)
    found = body.embed(batch, TORCH, torch.float32, dropout)
    torch.testing.assert_close(found, TORCH.drop(whole, dropout))
    own = found[batch.virtual.rows]
    assert 0.25 < (own == 0).float().mean() < 0.55
    assert not torch.equal(own[:P] == 0, own[P : 2 * P] == 0)  # of another example, another


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_longest_text_has_a_column_for_each_key(method):
    """Of dropout: as many as the text has tokens, and P."""
    model, draw = dropping(method), Draw(torch.tensor(3), torch.tensor(5))
    batch = collate([Example([2] * (32 - P), (), 0)], [0])
    assert model(batch, TORCH, torch.float32, draw).isfinite().all()


def test_lora_drops_at_a_place_of_its_own_in_each_product():
    """As many masks as products; a product of the last layer whose rows are few drops as ever."""
    model = dropping("lora", lora_targets="all")
    sites = [layer.get_submodule(ours).lora.site for layer in model.bert.layers
             for ours in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]  # fmt: skip
    assert len(set(sites)) == 4 * LAYERS
    assert min(sites) > 2 + 3 * LAYERS  # the head's last
    assert max(sites) < model.bert.sites


def test_lora_dropout_drops_without_gradients_too():
    """What a mask is does not depend on whether somebody differentiates."""
    model, batch = dropping("lora"), collate(EXAMPLES, range(8))
    draw = Draw(torch.tensor(3), torch.tensor(5))
    wanted = model(batch, TORCH, torch.float32, draw)
    with torch.no_grad():
        found = model(batch, TORCH, torch.float32, draw)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_model_with_a_prefix_takes_its_attention_from_its_table(family):
    """A model that reached around its table would never run a kernel."""

    class Called(Exception):
        pass

    def attention_prefix(*given):
        raise Called

    table = replace(TORCH, attention_prefix=attention_prefix)
    with pytest.raises(Called):
        adapted("prefix", family)(collate(EXAMPLES, range(2)), table)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_batch_that_names_its_virtual_tokens_is_one_that_does_not(method, family):
    """Made beside the batch, in its memory, or found by the model; and documents that share an
    example have virtual tokens each."""
    model = dropping(method, family)
    draw = Draw(torch.tensor(3), torch.tensor(5))
    given = [*EXAMPLES[:3], Example([2, 9, 3, 2, 8, 7, 3], (), 1, lengths=(3, 4))]
    known, bare = (
        collate(given, range(4), 0, True, 4, virtual) for virtual in (body_of(model).virtual, None)
    )
    assert known.virtual is not None
    moved = known.within(known.memory.clone())
    outs = [model(batch, TORCH, torch.float32, draw) for batch in (known, moved)]
    assert torch.equal(*outs)
    torch.testing.assert_close(model(bare, TORCH, torch.float32, draw)[:5], outs[0][:5])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_places_of_virtual_tokens_are_found_once_for_all_layers(method, monkeypatch):
    """On a GPU each time would wait for it; none, where the batch says them."""
    model, made, pack = adapted(method), [], Virtual.pack

    def counted(*given, **more):
        made.append(1)
        return pack(*given, **more)

    monkeypatch.setattr(Virtual, "pack", counted)
    batch = collate(EXAMPLES, range(4))
    model(batch)
    assert len(made) == 1
    known = collate(EXAMPLES, range(4), 0, True, 4, body_of(model).virtual)
    made.clear()
    model(known)
    assert not made


def test_training_tells_the_batches_of_the_models_virtual_tokens():
    """Whoever made them: what the model puts before a sequence is known beside it."""
    losses = []
    for given in (EXAMPLES, Batches(EXAMPLES, 32)):
        model = adapted("prompt")
        losses.append(
            [s.loss for s in train(model, given, TrainConfig(method="prompt", max_steps=2))]
        )
    assert losses[0] == losses[1]
