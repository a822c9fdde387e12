"""LoRA, prompts and prefixes: outputs and gradients beside PEFT's, what they begin as, merging."""

import tempfile
from pathlib import Path

import pytest
import torch
from adapted import (
    ALL,
    FAMILIES,
    LENGTHS,
    QV,
    C,
    P,
    as_saved,
    assert_near,
    inputs,
    of_peft,
    ours_out,
    outs_near,
    peer,
    saved,
    theirs_out,
    weighted,
)
from tiny import VOCABULARY, tiny_model
from torch import nn

from minift import TrainConfig, load_model
from minift.adapters import (
    Adapter,
    adapt,
    begin,
    first_words,
    merge,
    read_targets,
    remove_adapter,
    unmerge,
)
from minift.batch import collate
from minift.errors import InputError
from minift.layers import Linear, body_of
from minift.saving import load_adapted
from minift.tokenizer import Tokenizer

CASES = [
    (family, head, method, settings)
    for family in FAMILIES
    for head, (method, settings) in [
        ("classifier", ("lora", dict(r=3, lora_alpha=5, target_modules=QV[family]))),
        ("classifier", ("prompt", {})),
        ("tokens", ("lora", dict(r=2, lora_alpha=7, target_modules=ALL[family]))),
        ("tokens", ("prompt", {})),
        ("span", ("lora", dict(r=2, lora_alpha=2, target_modules=ALL[family][-1:]))),
        ("span", ("prompt", {})),
    ]
] + [
    ("gpt2", "lm", "lora", dict(r=4, lora_alpha=8, target_modules=ALL["gpt2"])),
    ("gpt2", "lm", "prompt", {}),
    ("gpt2", "lm", "prefix", {}),
    ("gpt2", "lm", "prefix", dict(prefix_projection=True, encoder_hidden_size=11)),
]


def of(method: str, **settings) -> TrainConfig:
    settings = {} if method == "lora" else {"num_virtual_tokens": P} | settings
    return TrainConfig(method=method, **settings)


def small(family: str = "bert", head: str = "classifier", **changes) -> nn.Module:
    """A base of ours."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_model(saved(peer(family, head, **changes), Path(folder)), head=head)
    return model


def scattered(model: nn.Module, seed: int = 5) -> nn.Module:
    """Every number of its adapter is random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(f".{part}." in name for part in ("lora", "prompt", "prefix")):
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def adapted(method: str, family: str = "bert", head: str = "classifier", **settings) -> nn.Module:
    """A model of ours with an adapter of random numbers."""
    model = small(family, head)
    virtual = {} if method == "lora" else {"num_virtual_tokens": P}
    config = TrainConfig(method=method, **virtual | settings)
    adapt(model, Adapter.of(config, model.config))
    return scattered(model)


@pytest.mark.parametrize(("family", "head", "method", "settings"), CASES, ids=str)
def test_outputs_and_gradients_are_pefts(family, head, method, settings, tmp_path):
    """Of every parameter that is trained: of the adapter and of the head that belongs to it."""
    base = peer(family, head)
    theirs = of_peft(base, method, head, **settings)
    model = load_adapted(saved(theirs, tmp_path / "adapter"), saved(base, tmp_path / "base"))
    given = inputs()
    found, wanted = ours_out(model, given, head), theirs_out(theirs, given, head)
    outs_near(found, wanted)
    if settings.get("prefix_projection"):
        return  # PEFT writes what its MLP has made: that learns in test_adapter_training.py
    weighted(found).backward()
    weighted(wanted).backward()
    assert_near(as_saved(model, "grad"), as_saved(theirs, "grad"), "gradient", rtol=3e-5)


def test_queries_and_values_of_one_projection_are_those_of_pefts_with_zeros_between():
    """GPT-2 has one projection in its files: PEFT's LoRA of it, of twice the rank, whose B is 0
    where our parts do not meet, is ours; gradients too, but for those of the zeros."""
    ours = adapted("lora", "gpt2", "lm", lora_r=3, lora_alpha=5.0)
    base = peer("gpt2", "lm")
    theirs = of_peft(base, "lora", "lm", r=6, lora_alpha=10, target_modules=["c_attn"])
    with torch.no_grad():
        stored = as_saved(ours)
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(stored[name.replace(".default", "")])
    given = inputs()
    found, wanted = ours_out(ours, given, "lm"), theirs_out(theirs, given, "lm")
    outs_near(found, wanted)
    weighted(found).backward()
    weighted(wanted).backward()
    wanted = as_saved(theirs, "grad")
    for name, x in wanted.items():
        if name.endswith("lora_B.weight"):
            x[C : 2 * C] = x[:C, 3:] = x[2 * C :, :3] = 0
    assert_near(as_saved(ours, "grad"), wanted, "gradient", rtol=3e-5)


# --------------------------------------------------------- prefixes of encoders

BODIES = {"bert": "bert", "roberta": "roberta", "distilbert": "distilbert"}


def with_prefix(theirs: nn.Module, prefix: torch.Tensor, family: str) -> list:
    """Hooks that put a prefix (P, N * 2 * C) into the first rows of all keys and values."""
    body, hooks = getattr(theirs, BODIES[family]), []
    each = prefix.view(len(prefix), -1, 2, C)
    layers = body.transformer.layer if family == "distilbert" else body.encoder.layer
    for i, layer in enumerate(layers):
        own = layer.attention if family == "distilbert" else layer.attention.self
        names = ("k_lin", "v_lin") if family == "distilbert" else ("key", "value")
        for j, name in enumerate(names):

            def put(module, args, out, i=i, j=j):
                return torch.cat([each[None, :, i, j], out[:, len(prefix) :]], 1)

            hooks.append(getattr(own, name).register_forward_hook(put))
    return hooks


def first_logits(theirs: nn.Module, hidden: torch.Tensor, family: str) -> torch.Tensor:
    """Of a classifier, from the hidden state of its first real token."""
    if family == "bert":
        return theirs.classifier(torch.tanh(theirs.bert.pooler.dense(hidden)))
    if family == "roberta":
        return theirs.classifier(hidden[:, None])
    return theirs.classifier(torch.relu(theirs.pre_classifier(hidden)))


@pytest.mark.parametrize("head", ["classifier", "tokens", "span"])
@pytest.mark.parametrize("family", BODIES)
def test_a_prefix_of_an_encoder_is_tokens_whose_keys_and_values_it_is(family, head):
    """PEFT has none. transformers' own model of P more tokens at the head of a sequence, whatever
    they are, with the prefix in place of their keys and values, says the same of all others."""
    base, model = peer(family, head), adapted("prefix", family, head)
    prefix = body_of(model).prefix.weight
    theirs = prefix.detach().clone().requires_grad_()
    with_prefix(base, theirs, family)
    given, wanted = inputs(), []
    for example in given:
        ids = torch.cat([torch.full((P,), 7), torch.tensor(example.tokens)])[None]
        if head == "classifier":
            body = getattr(base, BODIES[family])
            hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            wanted.append(first_logits(base, hidden[:, P], family)[0])
            continue
        out = base(input_ids=ids, attention_mask=torch.ones_like(ids))
        both = head == "span"
        rows = torch.stack([out.start_logits, out.end_logits], -1) if both else out.logits
        wanted.append(rows[0, P:])
    found = ours_out(model, given, head)
    outs_near(found, wanted)
    weighted(found).backward()
    weighted(wanted).backward()
    assert_near({"": prefix.grad}, {"": theirs.grad}, "gradient of the prefix", rtol=3e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_text_that_fills_the_positions_beside_virtual_tokens_is_the_longest(method):
    """They have positions, too, so there are P fewer for a text."""
    model = adapted(method)
    assert model.config.room == body_of(model).room == 32 - P
    model(collate(inputs([32 - P]), [0]))
    with pytest.raises(ValueError, match="cut the text"):
        model(collate(inputs([33 - P]), [0]))


# --------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("family", "text", "wanted"),
    [
        ("bert", "q,v", ("q", "v")),
        ("bert", " v , q", ("q", "v")),
        ("bert", "query,value", ("q", "v")),
        ("bert", "attention.self.key", ("k",)),
        ("bert", "all", ("q", "k", "v", "out", "up", "down")),
        ("bert", "dense", ("out", "up", "down")),
        ("bert", "output.dense", ("out", "down")),  # as PEFT reads it
        ("bert", "intermediate.dense", ("up",)),
        ("distilbert", "lin1,lin2,out_lin", ("out", "up", "down")),
        ("gpt2", "q,v", ("q", "v")),
        ("gpt2", "qkv,c_fc", ("qkv", "up")),
        ("gpt2", "c_attn", ("qkv",)),
        ("gpt2", "c_proj", ("out", "down")),
        ("gpt2", "attn.c_proj", ("out",)),
        ("gpt2", "all", ("qkv", "out", "up", "down")),
    ],
)
def test_targets_are_short_names_or_ends_of_names_in_files(family, text, wanted):
    assert read_targets(text, small(family).config) == wanted


@pytest.mark.parametrize("i", range(3))
def test_a_part_of_the_projection_is_the_one_that_is_named(i):
    """In a file that has three, by its name; in one that has one, by its rows."""
    short, name = "qkv"[i], ("query", "key", "value")[i]
    stored = as_saved(adapted("lora", lora_targets=short))
    assert all(f".{name}." in key for key in stored if ".lora_" in key)
    stored = as_saved(adapted("lora", "gpt2", lora_targets=short))
    for key, x in stored.items():
        if key.endswith("lora_B.weight"):
            rows = x.abs().sum(1).nonzero()[:, 0].tolist()
            assert rows == list(range(i * C, (i + 1) * C))


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("bert", dict(lora_targets="querry"), "did you mean 'query'"),
        ("bert", dict(lora_targets="q,qkv"), "lora_targets 'qkv' is no product of a bert layer"),
        ("gpt2", dict(lora_targets="query"), "lora_targets 'query' is no product of a gpt2 layer"),
        ("gpt2", dict(lora_targets="qkv,q"), "q, k, v or the projection as one, got both"),
        ("gpt2", dict(lora_targets="c_attn,v"), "got both"),
        ("bert", dict(lora_targets=","), "expected lora_targets such as 'q,v' or 'all', got ','"),
        ("bert", dict(lora_targets=""), "expected lora_targets such as"),
        ("bert", dict(lora_r=C + 1), f"expected lora_r of at most {C}, the model's width, got 17"),
        ("bert", dict(method="prompt", num_virtual_tokens=29), "expected at most 28 num_virtual"),
        ("roberta", dict(method="prefix", num_virtual_tokens=40), "of the model's 32 positions"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(family, flags, message):
    with pytest.raises(InputError) as caught:
        Adapter.of(TrainConfig(**{"method": "lora"} | flags), small(family).config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------- how it begins


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Tokenizer]:
    """A BERT with a vocabulary: its folder, and that."""
    folder = tiny_model(tmp_path_factory.mktemp("base"))
    return folder, Tokenizer.load(folder, 32, "BertTokenizer", False)


def begun(texts, **flags) -> nn.Module:
    folder, tokenizer = texts
    model, _ = load_model(folder, ("a", "b"))
    config = TrainConfig(**{"num_virtual_tokens": 9} | flags)
    adapt(model, Adapter.of(config, model.config))
    begin(model, config, tokenizer)
    return model


METHODS = [
    dict(method="lora"),
    dict(method="prompt"),
    dict(method="prompt", prompt_init="random"),
    dict(method="prefix"),
    dict(method="prefix", prompt_init="random"),
    dict(method="prefix", prefix_projection=True, prefix_hidden_size=5),
]


@pytest.mark.parametrize("flags", METHODS, ids=str)
def test_the_first_numbers_are_a_function_of_the_seed(flags, texts):
    a, b, c = (as_saved(begun(texts, seed=seed, **flags)) for seed in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    own = [name for name in a if "lora_A" in name or "prompt" in name]
    assert own
    assert not any(torch.equal(a[name], c[name]) for name in own)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        begun(texts, seed=3, **flags)
        assert torch.equal(torch.get_rng_state(), before)


def test_lora_begins_as_the_base(texts):
    """B is 0, A is not, and uniform within 1 / sqrt(n_in) as PEFT's is."""
    model = begun(texts, method="lora", lora_targets="all")
    given, batch = model.bert.layers[0].mlp.down.lora, collate(inputs(), range(4))
    base, _ = load_model(texts[0], ("a", "b"))
    assert torch.equal(model(batch), base(batch))
    bound = given.a.weight.shape[1] ** -0.5
    assert 0.9 * bound < given.a.weight.abs().max() <= bound


def test_a_prompt_begins_as_words(texts):
    """Those of a text, over and over; or drawn from the vocabulary, without special tokens."""
    model = begun(texts, method="prompt", prompt_init_text="good film")
    table = model.bert.embeddings.word.weight
    ids = [VOCABULARY.index(word) for word in ("good", "film") * 5][:9]
    assert torch.equal(model.bert.prompt.weight, table[ids])
    model = begun(texts, method="prompt", num_virtual_tokens=27)
    same = (model.bert.prompt.weight[:, None] == table).all(-1)  # (P, vocabulary)
    assert same.any(1).all()
    drawn = same.int().argmax(1)
    assert len(set(drawn.tolist())) > 15
    assert drawn.max() < len(VOCABULARY)
    assert drawn.min() >= 5  # the first five are special


def test_no_special_token_is_drawn(texts):
    config, generator = TrainConfig(), torch.Generator().manual_seed(0)
    found = set(first_words(config, 5000, texts[1], generator))
    assert found == set(range(5, len(VOCABULARY)))


def test_random_prompts_are_as_large_as_the_models_own_words(texts):
    model = begun(texts, method="prompt", prompt_init="random", num_virtual_tokens=28)
    assert model.bert.prompt.weight.std().item() == pytest.approx(0.2, rel=0.1)  # init_std


def test_a_text_without_tokens_is_refused(texts):
    with pytest.raises(InputError, match="prompt_init_text '  ' has no tokens"):
        begun(texts, method="prompt", prompt_init_text="  ")


def test_a_prefix_begins_as_keys_and_values_of_words_in_the_base(texts):
    """A text behind such a prefix is a text behind these words, but that they do not see it. So in
    a decoder nothing is other at all."""
    model = small("gpt2", "lm")
    words, given = [7, 8, 9], inputs()

    class Fixed:
        vocab_size, special = 60, {}

        class backend:
            @staticmethod
            def encode_batch(texts, add_special_tokens):
                assert (texts, add_special_tokens) == (["x y z"], False)
                return [type("Found", (), {"ids": words})]

            token_to_id = staticmethod(lambda token: None)

    longer = [type(e)([*words, *e.tokens], (), 0) for e in given]
    wanted = [out[len(words) :] for out in ours_out(model, longer, "lm")]
    config = TrainConfig(method="prefix", num_virtual_tokens=3, prompt_init_text="x y z")
    adapt(model, Adapter.of(config, model.config))
    begin(model, config, Fixed)
    outs_near(ours_out(model, given, "lm"), wanted)


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["q,v", "all"])
def test_merging_changes_no_answer_and_unmerging_no_bit(family, targets):
    model = adapted("lora", family, lora_r=3, lora_targets=targets)
    given, before = inputs(), {n: p.detach().clone() for n, p in model.named_parameters()}
    config, adapter = model.config, model.adapter
    wanted = ours_out(model, given, "classifier")
    kept = merge(model)
    assert model.adapter is None
    assert not model.config.adapter
    assert all(m.lora is None for m in model.modules() if isinstance(m, Linear))
    name = f"{config.kind.body}layers.0.attention.qkv.weight"
    assert not torch.equal(model.get_parameter(name), before[name])
    outs_near(ours_out(model, given, "classifier"), wanted)
    unmerge(model, kept)
    assert (model.config, model.adapter) == (config, adapter)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merging_rounds_once():
    """W + s B A in fp64, then to fp32."""
    model = adapted("lora", lora_r=3, lora_alpha=5.0, lora_targets="up")
    layer = model.bert.layers[1].mlp.up
    a, b = layer.lora.a.weight, layer.lora.b[0].weight
    wanted = (layer.weight.double() + 5 / 3 * (b.double() @ a.double())).float()
    merge(model)
    assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize(
    ("method", "what"), [("prompt", "a prompt, wh"), ("prefix", "a prefix, wh"), ("", "a model w")]
)
def test_what_no_weight_can_hold_is_not_merged(method, what):
    model = adapted(method) if method else small()
    with pytest.raises(InputError, match=f"an adapter of LoRA to merge, got {what}"):
        merge(model)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_without_its_adapter_a_model_is_its_base(method):
    base = small()
    batch = collate(inputs(), range(len(LENGTHS)))
    model = adapted(method)
    assert not torch.equal(model(batch), base(batch))
    remove_adapter(model)
    assert torch.equal(model(batch), base(batch))
    assert dict(model.named_parameters()).keys() == dict(base.named_parameters()).keys()
    assert model.config == base.config
