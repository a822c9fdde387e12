"""Eighteen ways in which loading somebody's checkpoint goes wrong without a word, and the test that
each of them meets. Where no file is named the test is here.

 1  Conv1D weights (in, out)        cannot arise: only GPT-2 has them, and its model_type is refused
 2  prefixes, wrappers' too         test_every_prefix_is_the_same_model
 3  LayerNorm.gamma and .beta       test_weights.py: test_norms_under_their_old_names
 4  tied embeddings                 test_a_tied_decoder_is_not_a_second_table
 5  buffers in the file             test_weights.py: test_buffers_are_ignored
 6  RoBERTa's positions             test_families.py: test_positions_of_roberta_start_behind...
 7  DistilBERT's names and head     test_bert.py: test_random_models_equal_transformers
 8  no pooler                       test_families.py: test_every_encoder_of_another_task_loads...
 9  gelu or gelu_new                test_the_activation_is_the_configurations
10  shards, .bin, variants          test_every_way_to_store_weights_is_the_same_model
11  precision                       test_weights.py: test_other_precisions_load_to_fp32; and
                                    test_what_is_saved_says_its_precision
12  padded vocabularies             test_rows_that_no_token_has_stay; no language model's head is
                                    loaded, so no padded logit can win
13  order and number of labels      test_labels_are_sorted_as_numbers; test_weights.py:
                                    test_the_same_labels_in_another_order_keep_the_folders
14  cased or uncased                test_tokenizer.py: test_casing_that_does_not_fit
15  token types of pairs            test_families.py: test_our_files_are_transformers
16  names of dropouts               test_families.py: test_every_setting_is_read_from_its_own_name;
                                    nothing is dropped without a draw: test_bert.py
17  metadata of safetensors         test_weights.py: test_saved_files_are_readable_by_others
18  overwriting a mapped file       test_weights.py: test_saving_over_a_model_replaces_it
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import peer_of
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForPreTraining,
)

from minift import Example, InputError, load_model
from minift.batch import collate
from minift.families import FAMILIES
from minift.weights import save_model

HERE = Path(__file__).parent
EXAMPLES = [Example([5, 6, 7, 8], [0] * 4, 0), Example([9, 3], [0] * 2, 1)]


def logits(folder: Path) -> torch.Tensor:
    model, _ = load_model(folder, None)
    with torch.no_grad():
        return model(collate(EXAMPLES, [0, 1]))


def restore(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Puts other tensors in place of a folder's."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_every_named_test_exists():
    """The table above is no fiction."""
    for file, name in re.findall(r"(test_\w+\.py): (test_\w+)", __doc__):
        assert f"def {name}" in (HERE / file).read_text(), name
    own = re.findall(r"\n.{36}(test_\w+)", __doc__)
    assert len(own) > 5
    for name in own:
        assert name in globals() or any(name in f.read_text() for f in HERE.glob("*.py")), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_every_prefix_is_the_same_model(family, wrapper, tmp_path):
    """DDP and torch.compile write their own; a compiled part writes it in the middle."""
    peer_of(family, AutoModelForSequenceClassification, tmp_path)
    want, tensors = logits(tmp_path), load_file(tmp_path / "model.safetensors")
    restore(tmp_path, {wrapper + name: t for name, t in tensors.items()})
    assert torch.equal(logits(tmp_path), want)
    middle = FAMILIES[family].layers + "."
    restore(tmp_path, {n.replace(middle, middle + "_orig_mod."): t for n, t in tensors.items()})
    assert torch.equal(logits(tmp_path), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_encoder_is_the_same_encoder(family, tmp_path):
    """Saved by itself it has no prefix; a classifier's file has one."""
    peer = peer_of(family, AutoModel, tmp_path)
    model, report = load_model(tmp_path, ("a", "b"))
    prefix, tensors = FAMILIES[family].prefix, load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith(prefix) for name in tensors)
    restore(tmp_path, {prefix + name: t for name, t in tensors.items()})
    again, same = load_model(tmp_path, ("a", "b"))
    assert same.loaded == report.loaded
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    table = model.get_parameter(model.config.kind.body + "embeddings.word.weight")
    assert torch.equal(table[: model.config.vocab_size], peer.get_input_embeddings().weight)


def test_two_names_for_one_tensor_are_an_error(tmp_path):
    """Which of them would it be? A file that was saved twice into one dictionary."""
    peer_of("bert", AutoModelForSequenceClassification, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"module.classifier.bias": torch.zeros(3)}
    restore(tmp_path, tensors)
    with pytest.raises(InputError, match=r"holds 'classifier.bias' twice, as "):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, BertForPreTraining])
def test_a_tied_decoder_is_not_a_second_table(kind, tmp_path):
    """Old files carry the decoder's copy of the word table: it is named, and not loaded."""
    make = kind if kind is AutoModelForMaskedLM else type("", (), {"from_config": kind})
    peer = peer_of("bert", make, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = torch.zeros(90, 12)
    tensors["cls.predictions.decoder.bias"] = torch.zeros(90)
    restore(tmp_path, tensors)
    model, report = load_model(tmp_path, ("a", "b"))
    assert "cls.predictions.decoder.weight" in report.ignored
    table = model.get_parameter(model.config.kind.body + "embeddings.word.weight")
    assert torch.equal(table[: model.config.vocab_size], peer.get_input_embeddings().weight)
    save_model(model, tmp_path)
    assert sum(t.shape == (90, 12) for t in load_file(tmp_path / "model.safetensors").values()) == 1


def test_the_activation_is_the_configurations(tmp_path):
    """The two GELUs differ by 1e-3 and by no error message; others are refused."""
    peer_of("bert", AutoModelForSequenceClassification, tmp_path)
    raw, found = json.loads((tmp_path / "config.json").read_text()), {}
    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"hidden_act": name}))
        found[name] = logits(tmp_path)
    assert torch.equal(found["gelu_new"], found["gelu_pytorch_tanh"])
    assert not torch.equal(found["gelu"], found["gelu_new"])
    (tmp_path / "config.json").write_text(json.dumps(raw | {"hidden_act": "silu"}))
    with pytest.raises(InputError, match=r"expected hidden_act gelu or .*, got 'silu'"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_store_weights_is_the_same_model(family, tmp_path):
    """One file, shards, a variant's name, a .bin whole or in shards: the same bits."""
    peer = peer_of(family, AutoModelForSequenceClassification, tmp_path / "one")
    want, config = logits(tmp_path / "one"), (tmp_path / "one" / "config.json").read_text()
    peer.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("variant", "bin", "bin shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    state = peer.state_dict()
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "variant" / "model.fp16.safetensors")
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    where = {}
    for i, names in enumerate((list(state)[:7], list(state)[7:])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({name: state[name] for name in names}, tmp_path / "bin shards" / file)
        where |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (tmp_path / "bin shards" / "pytorch_model.bin.index.json").write_text(index)
    for name in ("shards", "variant", "bin", "bin shards"):
        assert torch.equal(logits(tmp_path / name), want), name


def test_what_is_saved_says_its_precision(tmp_path):
    """A bf16 folder becomes fp32 masters, and config.json says so under both of its names."""
    peer_of("bert", AutoModelForSequenceClassification, tmp_path)
    tensors = {n: t.bfloat16() for n, t in load_file(tmp_path / "model.safetensors").items()}
    restore(tmp_path, tensors)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    model, report = load_model(tmp_path)
    assert set(report.dtypes.values()) == {"bfloat16"}
    save_model(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dtype"] == "float32"
    assert "torch_dtype" not in raw
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_rows_that_no_token_has_stay(tmp_path):
    """A vocabulary padded to a multiple of 64: all rows are loaded, saved, and counted."""
    peer_of("bert", AutoModelForSequenceClassification, tmp_path, vocab_size=128)
    model, _ = load_model(tmp_path)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 128
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["bert.embeddings.word_embeddings.weight"].shape == (128, 12)


def test_labels_are_sorted_as_numbers(tmp_path):
    """JSON's keys are strings, where "10" stands before "2"."""
    peer = peer_of("bert", AutoModelForSequenceClassification, tmp_path, labels=12)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["id2label"] = {str(i): f"name {i}" for i in sorted(range(12), key=str)}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, _ = load_model(tmp_path)
    assert model.config.labels == tuple(f"name {i}" for i in range(12))
    assert torch.equal(model.head.weight, peer.classifier.weight)
