"""minift.families against transformers: names, heads, positions and defaults of each family."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from minift import Example, InputError, ModelConfig, load_model, save
from minift.batch import collate
from minift.bert import BertTokens
from minift.families import FAMILIES
from minift.scratch import random_model
from minift.tokenizer import Tokenizer
from minift.weights import read_weights, save_model

TEXTS = ("Hello, naïve wörld!", "two texts", "a third one, of 3 words")


def raw_config(family: str, **changes) -> dict:
    """A small config.json of a family, with its own names."""
    sizes = dict(
        vocab_size=90, max_position_embeddings=24, pad_token_id=FAMILIES[family].defaults["pad"]
    )
    if family == "distilbert":
        sizes |= dict(dim=12, n_layers=2, n_heads=3, hidden_dim=20)
    elif family == "gpt2":
        sizes = dict(vocab_size=90, n_positions=24, n_embd=12, n_layer=2, n_head=3, n_inner=20)
        sizes |= dict(bos_token_id=0, eos_token_id=0)
    else:
        sizes |= dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3)
        sizes |= dict(intermediate_size=20, type_vocab_size=1 if family != "bert" else 2)
    return {"model_type": family, **sizes, **changes}


def peer_of(family: str, kind, folder: Path, labels: int = 3, **changes):
    """transformers' model of random numbers, saved."""
    config = AutoConfig.for_model(**raw_config(family, **changes))
    config.num_labels = labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = kind.from_config(config).eval()
        with torch.no_grad():
            for p in peer.parameters():
                p += 0.3 * torch.randn_like(p)
    peer.save_pretrained(folder)
    return peer


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


ENCODERS = [name for name, family in FAMILIES.items() if not family.decoder]
WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def test_our_files_are_transformers(family, tmp_path):
    """A model and a vocabulary made by us, saved: transformers finds every tensor, its own
    tokenizer gives our ids and asks for no more than the model takes, and the logits are ours."""
    config = ModelConfig.from_hf(raw_config(family, vocab_size=400))
    tokenizer = Tokenizer.train(TEXTS * 3, config, config.max_len)
    model = random_model(config, ("x", "y", "z"), seed=0)
    save(model, tokenizer, tmp_path)
    peer, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[kind] for kind in WRONG)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for pairs in (None, TEXTS[::-1]):
        encoded = tokenizer.encode(TEXTS, pairs)
        inputs = theirs(list(TEXTS), pairs and list(pairs), padding=True, return_tensors="pt")
        for row, (ids, _, _) in zip(inputs["input_ids"], encoded, strict=True):
            assert row[: len(ids)].tolist() == ids
        with torch.no_grad():
            want = peer.eval()(**inputs).logits
            batch = collate([Example(ids, types, 0) for ids, types, _ in encoded], range(3))
            torch.testing.assert_close(model(batch), want[list(batch.rows)])
    assert peer.config.id2label == {0: "x", 1: "y", 2: "z"}


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize(
    "kind",
    [
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForQuestionAnswering,
        AutoModelForTokenClassification,
    ],
)
def test_every_encoder_of_another_task_loads_under_a_new_head(family, kind, tmp_path):
    """With its prefix or without, whatever head it has: the encoder's tensors are all used, the
    others are named, and what is new is the task's."""
    peer = peer_of(family, kind, tmp_path, labels=2)
    _, report = load_model(tmp_path, labels=("a", "b"))
    pooled = any(name.startswith("pooler.") for name in report.loaded)
    assert pooled == (family == "bert" and kind is AutoModel)
    assert set(report.new) == {
        *("head.weight", "head.bias"),
        *(() if pooled else ("pooler.weight", "pooler.bias")),
    }
    stored = load_file(tmp_path / "model.safetensors")
    assert set(report.ignored) <= set(stored)
    encoder = sum(
        p.numel() for n, p in peer.base_model.named_parameters() if not n.startswith("pooler.")
    )
    assert sum(n for name, n in report.loaded.items() if name.startswith("bert.")) == encoder


def test_a_trained_head_is_kept_only_for_its_own_labels(family, tmp_path):
    """Other labels: a new head, on the same dense layer where the file has one."""
    peer = peer_of(family, AutoModelForSequenceClassification, tmp_path)
    names = tuple(peer.config.id2label.values())
    model, report = load_model(tmp_path, labels=names)
    assert not report.new
    other, report = load_model(tmp_path, labels=("a", "b", "c"))
    if family == "gpt2":
        assert list(report.new) == ["head.weight"]
        assert report.ignored == ["score.weight"]
    else:
        assert sorted(report.new) == ["head.bias", "head.weight"]
        assert torch.equal(other.pooler.weight, model.pooler.weight)
    assert not torch.equal(other.head.weight, model.head.weight)


def test_a_tagger_is_no_classifier(tmp_path):
    """It has id2label and a tensor called classifier.weight, of tags: it loads as a tagger, and
    labels that happen to be its tags are learned anew."""
    peer = peer_of("bert", AutoModelForTokenClassification, tmp_path, labels=3)
    model, _ = load_model(tmp_path)
    assert isinstance(model, BertTokens)
    with pytest.raises(InputError, match="expected a trained classifier, config"):
        load_model(tmp_path, head="classifier")
    _, report = load_model(tmp_path, labels=tuple(peer.config.id2label.values()))
    assert "head.weight" in report.new
    assert "classifier.weight" in report.ignored


def test_positions_of_roberta_start_behind_the_padding():
    """514 rows are 512 tokens: rows 0 and 1 are never read, whatever stands beside a sequence."""
    config = ModelConfig.from_hf(raw_config("roberta", max_position_embeddings=514))
    assert (config.max_len, config.position_offset) == (512, 2)
    model = random_model(config, ("a", "b"), seed=0)
    batch = collate([Example([5] * 512, [0] * 512, 0), Example([6] * 3, [0] * 3, 0)], [0, 1])
    model(batch).sum().backward()
    used = model.bert.embeddings.position.weight.grad.abs().sum(1)
    assert used.shape == (514,)
    assert used[:2].tolist() == [0, 0]
    assert (used[2:] > 0).all()


@pytest.mark.parametrize(
    ("family", "expected"),
    [("bert", 0.1), ("roberta", 0.1), ("distilbert", 0.2)],
)
def test_dropout_before_the_head(family, expected):
    assert ModelConfig.from_hf(raw_config(family)).classifier_dropout == expected
    assert AutoConfig.for_model(family).to_dict().get("seq_classif_dropout", 0.1) == expected


def test_roberta_drops_before_both_layers_of_its_head():
    """As transformers' does; the two places have their own masks."""
    config = ModelConfig.from_hf(raw_config("roberta", classifier_dropout=0.5))
    assert config.kind.drop_first
    assert not FAMILIES["bert"].drop_first
    assert FAMILIES["bert"].head_groups == ("head",)
    assert (
        FAMILIES["roberta"].head_groups == FAMILIES["distilbert"].head_groups == ("pooler", "head")
    )


def test_every_setting_is_read_from_its_own_name(family):
    """All numbers differ from the defaults and from each other."""
    kind, raw = FAMILIES[family], raw_config(family)
    floats = {"hidden_dropout": 0.21, "attention_dropout": 0.22, "classifier_dropout": 0.23}
    floats |= {"init_std": 0.24, "norm_eps": 0.25, "embedding_dropout": 0.26}
    for name, value in floats.items():
        if kind.keys[name]:
            config = ModelConfig.from_hf(raw | {kind.keys[name]: value})
            assert getattr(config, name) == value
    integers = dict(vocab_size=90, dim=12, n_layer=2, n_head=3, ffn_dim=20)
    config = ModelConfig.from_hf(raw)
    assert {name: getattr(config, name) for name in integers} == integers
    assert config.n_types == {"bert": 2, "distilbert": 0, "gpt2": 0}.get(family, 1)


def test_defaults_are_transformers(family):
    """What config.json may leave out means what it means there."""
    kind, theirs = FAMILIES[family], AutoConfig.for_model(family).to_dict()
    needed = {"vocab_size", "positions", "dim", "n_layer", "n_head", "ffn_dim"}
    raw = {kind.keys[name]: theirs[kind.keys[name]] for name in needed}
    config = ModelConfig.from_hf({"model_type": family, **raw})
    full = ModelConfig.from_hf(theirs | {"model_type": family})
    assert replace(full, labels=()) == config


def test_a_configuration_says_what_it_is_saved_as(family):
    """The class names are transformers' own."""
    model = random_model(ModelConfig.from_hf(raw_config(family)), ("a", "b"), 0)
    saved = json.loads(json.dumps(model.config.to_hf()))
    peer = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**saved))
    assert saved["architectures"] == [type(peer).__name__]


# ---------------------------------------------------------------- heads that predict tokens


def peer_of_tokens(family: str):
    return AutoModelForCausalLM if FAMILIES[family].decoder else AutoModelForMaskedLM


def test_models_that_predict_tokens_come_and_go(family, tmp_path):
    """transformers' folder to ours and back: no tensor is new, ignored, missing or left over, all
    are equal, and the class and the tie are said."""
    peer = peer_of(family, peer_of_tokens(family), tmp_path)
    model, report = load_model(tmp_path, head="lm")
    assert (report.new, report.ignored) == ({}, [])
    assert (model.config.head, model.config.labels) == ("lm", ())
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out")
    again, info = peer_of_tokens(family).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in WRONG)
    assert type(again) is type(peer)
    for (name, p), q in zip(peer.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["architectures"] == [type(peer).__name__]
    assert saved["tie_word_embeddings"] is True
    assert not {"id2label", "label2id", "problem_type"} & saved.keys()


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_head_that_predicts_tokens_is_new_where_there_is_none(family, kind, tmp_path):
    """On a bare body and on a classifier's, whose head is ignored; a decoder's is its table."""
    peer = peer_of(family, kind, tmp_path)
    model, report = load_model(tmp_path, head="lm", seed=3)
    new = ["head.bias", "head.dense.bias", "head.dense.weight"]
    new += ["head.norm.bias", "head.norm.weight"]
    assert sorted(report.new) == ([] if family == "gpt2" else new)
    inside = {id(p) for p in peer.base_model.parameters()}
    others = {name for name, p in peer.named_parameters() if id(p) not in inside}
    others |= {name for name, _ in peer.named_parameters() if "pooler." in name}
    assert set(report.ignored) == others
    if report.new:
        assert not model.head.bias.any()
        assert model.head.norm.weight.eq(1).all()
        again, _ = load_model(tmp_path, head="lm", seed=3)
        assert torch.equal(again.head.dense.weight, model.head.dense.weight)


def test_a_head_that_should_be_there_is_not_made(tmp_path):
    """config.json says that it was trained: random numbers in its place would say nothing."""
    peer_of("bert", AutoModelForMaskedLM, tmp_path)
    rewrite(tmp_path, without="cls.predictions.transform.dense")
    with pytest.raises(InputError, match=r"expected a tensor 'cls.predictions.transform.dense"):
        load_model(tmp_path, head="lm")


def rewrite(folder: Path, without: str = "?", **more: torch.Tensor) -> None:
    """The weights without some and with others; `__` in a name is a dot."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items() if not k.startswith(without)}
    path.unlink()
    save_file(tensors | {k.replace("__", "."): v for k, v in more.items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "decoder", "table", "bias"),
    [
        ("bert", "cls__predictions__decoder", "bert.embeddings.word_embeddings.weight",
         "cls.predictions.bias"),
        ("roberta", "lm_head__decoder", "roberta.embeddings.word_embeddings.weight",
         "lm_head.bias"),
        ("distilbert", "vocab_projector", "distilbert.embeddings.word_embeddings.weight", None),
        ("gpt2", "lm_head", "transformer.wte.weight", None),
    ],
)  # fmt: skip
def test_what_a_file_stores_twice_is_one_parameter(tmp_path, family, decoder, table, bias):
    """The same numbers are ignored; others would be lost, so they stop."""
    peer_of(family, peer_of_tokens(family), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    copies = {decoder + "__weight": stored[table].clone()}
    copies |= {decoder + "__bias": stored[bias].clone()} if bias else {}
    rewrite(tmp_path, **copies)
    _, report = load_model(tmp_path, head="lm")
    assert report.ignored == sorted(name.replace("__", ".") for name in copies)
    for name, tensor in copies.items():
        rewrite(tmp_path, **{name: tensor + 1})
        with pytest.raises(InputError, match="found others: projections of their own") as error:
            load_model(tmp_path, head="lm")
        assert name.replace("__", ".") in str(error.value)
        rewrite(tmp_path, **{name: tensor})


# ---------------------------------------------------------------- GPT-2


def gpt2_folder(folder: Path, kind=AutoModelForCausalLM, **changes):
    return peer_of("gpt2", kind, folder, **changes)


def test_names_of_gpt2_without_their_prefix_and_with_buffers(tmp_path):
    """As its first files have them; a mask is no bias, and a bias no mask."""
    gpt2_folder(tmp_path)
    model, _ = load_model(tmp_path, head="lm")
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v.clone() for k, v in load_file(path).items()}
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, 24, 24)
             for i in range(2) for name in ("bias", "masked_bias")}  # fmt: skip
    path.unlink()
    save_file(tensors | masks, path, {"format": "pt"})
    bare, report = load_model(tmp_path, head="lm")
    assert report.ignored == sorted(masks)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), bare.parameters(), strict=True)
    )
    rewrite(tmp_path, without="h.0.attn.c_attn.bias")
    with pytest.raises(InputError, match=r"'transformer.h.0.attn.c_attn.bias', found none"):
        load_model(tmp_path, head="lm")


def test_matrices_of_gpt2_are_turned(tmp_path):
    """All four of a layer, the square one too, whose shape would not tell."""
    gpt2_folder(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path, head="lm")
    block, there = model.gpt.layers[1], "transformer.h.1."
    for layer, name in (
        (block.attention.qkv, "attn.c_attn"),
        (block.attention.out, "attn.c_proj"),
        (block.mlp.up, "mlp.c_fc"),
        (block.mlp.down, "mlp.c_proj"),
    ):
        assert torch.equal(layer.weight, stored[f"{there}{name}.weight"].T)
        assert layer.weight.is_contiguous()


def test_reading_weights_leaves_the_padding_zero(tmp_path):
    """Whatever stood in memory; and no file holds it."""
    gpt2_folder(tmp_path)
    model, _ = load_model(tmp_path, head="lm")
    table = model.gpt.embeddings.word.weight
    with torch.no_grad():
        table.fill_(1)
    report = read_weights(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    assert (len(table), len(stored)) == (128, 90)
    assert torch.equal(table[:90], stored)
    assert not table[90:].any()
    assert report.loaded["gpt.embeddings.word.weight"] == stored.numel()


def test_a_language_model_becomes_a_classifier(tmp_path):
    """Its head is new; what it was trained for is not kept, and transformers finds a padding token
    in what is saved."""
    gpt2_folder(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"task": "instruct", "template": ["{prompt}:", " {response}"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_model(tmp_path, head="lm")[0].config
    assert (config.task, config.template) == ("instruct", ("{prompt}:", " {response}"))
    assert config.to_hf()["template"] == raw["template"]
    model, report = load_model(tmp_path, labels=("a", "b"))
    assert list(report.new) == ["head.weight"]
    assert (model.config.task, model.config.template) == ("", None)
    saved = model.config.to_hf()
    assert not {"task", "template"} & saved.keys()
    assert saved["architectures"] == ["GPT2ForSequenceClassification"]
    assert saved["pad_token_id"] == 0
    assert replace(model.config, raw={**raw, "pad_token_id": 5}).to_hf()["pad_token_id"] == 5
    assert "pad_token_id" not in replace(model.config, raw={"eos_token_id": 90}).to_hf()


def test_widths_of_gpt2():
    """n_inner may be null, and then is four times the width; all sizes have transformers'
    defaults."""
    assert ModelConfig.from_hf(raw_config("gpt2", n_inner=None)).ffn_dim == 48
    config = ModelConfig.from_hf({"model_type": "gpt2"})
    sizes = config.vocab_size, config.max_len, config.dim, config.n_layer, config.n_head
    assert (*sizes, config.ffn_dim) == (50257, 1024, 768, 12, 12, 3072)
    assert config.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "expected add_cross_attention false in config.json, got "
         "true: not built"),
        ({"scale_attn_by_inverse_layer_idx": True}, "expected scale_attn_by_inverse_layer_idx "
         "false in config.json, got true: not built"),
        ({"reorder_and_upcast_attn": True}, "expected reorder_and_upcast_attn false in "
         "config.json, got true: not built"),
        ({"scale_attn_weights": False}, "expected scale_attn_weights true in config.json, got "
         "false: not built"),
        ({"tie_word_embeddings": False}, "expected tie_word_embeddings true in config.json, got "
         "false: not built"),
        ({"activation_function": "relu"}, "expected activation_function gelu or gelu_new or "
         "gelu_pytorch_tanh, got 'relu'"),
        ({"n_embd": 13}, "n_embd=13 is not divisible by 3 heads"),
        ({"n_inner": 0}, "expected n_inner in config.json as a number in [1, 2147483648), got 0"),
    ],
)  # fmt: skip
def test_a_gpt2_that_is_not_built(changes, message):
    """One line, and no other model under its name."""
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf(raw_config("gpt2", **changes))
    assert str(error.value) == message
