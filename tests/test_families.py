"""minift.families against transformers: names, heads, positions and defaults of each family."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from minift import Example, InputError, ModelConfig, load_model, save
from minift.batch import collate
from minift.families import FAMILIES
from minift.scratch import random_model
from minift.tokenizer import Tokenizer

TEXTS = ("Hello, naïve wörld!", "two texts", "a third one, of 3 words")


def raw_config(family: str, **changes) -> dict:
    """A small config.json of a family, with its own names."""
    sizes = dict(
        vocab_size=90, max_position_embeddings=24, pad_token_id=FAMILIES[family].defaults["pad"]
    )
    if family == "distilbert":
        sizes |= dict(dim=12, n_layers=2, n_heads=3, hidden_dim=20)
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
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind]
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
    assert sorted(report.new) == ["head.bias", "head.weight"]
    assert torch.equal(other.pooler.weight, model.pooler.weight)
    assert not torch.equal(other.head.weight, model.head.weight)


def test_a_tagger_is_no_classifier(tmp_path):
    """It has id2label and a tensor called classifier.weight, of tags: to predict with it is an
    error, and labels that happen to be its tags are learned anew."""
    peer = peer_of("bert", AutoModelForTokenClassification, tmp_path, labels=3)
    with pytest.raises(InputError, match="expected a classifier of texts, config"):
        load_model(tmp_path)
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
    floats |= {"init_std": 0.24, "norm_eps": 0.25}
    for name, value in floats.items():
        if kind.keys[name]:
            config = ModelConfig.from_hf(raw | {kind.keys[name]: value})
            assert getattr(config, name) == value
    integers = dict(vocab_size=90, dim=12, n_layer=2, n_head=3, ffn_dim=20)
    config = ModelConfig.from_hf(raw)
    assert {name: getattr(config, name) for name in integers} == integers
    assert config.n_types == {"bert": 2, "distilbert": 0}.get(family, 1)


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
