"""minift.scratch: a model made from a configuration and texts, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from tiny import SPECIAL, call, rows, settings_kept, tiny_config, tiny_model
from transformers import GPT2LMHeadModel

from minift import Example, InputError, load, save
from minift.batch import collate
from minift.bert import BertMasked
from minift.config import ModelConfig
from minift.gpt import GPTClassifier, GPTLanguageModel
from minift.scratch import make_tokenizer, random_model, read_new_config
from minift.tokenizer import Tokenizer

TEXTS = [text for text, _ in rows(40)]
ROBERTA = {"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}


@pytest.fixture
def config(tmp_path) -> Path:
    """Of a model of two layers; the size of its vocabulary is open."""
    raw = {k: v for k, v in tiny_config().items() if k not in ("vocab_size", "architectures")}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(raw | {"max_position_embeddings": 64}))
    return path


def toml(raw: dict) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in raw.items())


def test_json_toml_and_folders_are_the_same_configuration(config, tmp_path):
    raw = json.loads(config.read_text())
    (tmp_path / "small.toml").write_text(toml(raw))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(raw))
    configs = [read_new_config(tmp_path / n) for n in ("small.json", "small.toml", "folder")]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].vocab_size == 8000


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.json", "cannot be read"),
        ("{", "bad.json", "expected JSON"),
        ("a = [", "bad.toml", "expected TOML"),
        ('{"model_type": "t5"}', "t5.json", "expected model_type bert, "),
        ('model_type = "bert"', "few.toml", "expected max_position_embeddings"),
    ],
)
def test_a_configuration_that_is_none(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_new_config(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_head_in_the_configuration_is_not_this_models(config):
    """A config.json taken from a trained model says labels and a class: neither is wanted."""
    raw = json.loads(config.read_text())
    raw |= {"architectures": ["BertForMaskedLM"], "id2label": {"0": "a", "1": "a"}}
    config.write_text(json.dumps(raw))
    assert read_new_config(config).labels == ()


@pytest.mark.parametrize("changes", [{}, ROBERTA])
def test_a_vocabulary_is_a_function_of_the_texts(config, changes):
    """The library's WordPiece trainer numbers pieces by hash: ours does not. Ten makings agree,
    to the last id, and special tokens stand where the configuration says."""
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    made = [make_tokenizer(config, None, TEXTS, False, 0) for _ in range(10)]
    tokenizer, model_config = made[0]
    first = tokenizer.backend.to_str()
    assert all(other.backend.to_str() == first for other, _ in made)
    assert model_config.vocab_size == tokenizer.vocab_size
    assert tokenizer.misfit(model_config) is None
    assert tokenizer.max_length == 64
    assert tokenizer.backend.token_to_id(tokenizer.special["pad"]) == model_config.pad
    unknown = tokenizer.backend.token_to_id(tokenizer.special["unk"])
    assert all(unknown not in ids for ids, _, _ in tokenizer.encode(TEXTS))


def test_a_vocabulary_has_no_more_tokens_than_asked(config):
    raw = json.loads(config.read_text()) | {"vocab_size": 60}
    config.write_text(json.dumps(raw))
    tokenizer, model_config = make_tokenizer(config, None, TEXTS, False, 0)
    assert 50 < tokenizer.vocab_size <= 60
    assert model_config.vocab_size == tokenizer.vocab_size


def test_every_frequent_character_of_chinese_is_in_the_vocabulary(config):
    """The library's own limit of 1,000 letters would leave a Chinese text unknown."""
    letters = [chr(0x4E00 + i) for i in range(3000)]
    texts = ["".join(letters[i : i + 10]) for i in range(0, 3000, 10)] * 2
    tokenizer, _ = make_tokenizer(config, None, texts, False, 0)
    assert all(tokenizer.backend.token_to_id(letter) is not None for letter in letters)


def test_capitals_are_kept_when_asked(config):
    texts = ["Ärger in Berlin", "ärger in berlin"] * 3
    small, _ = make_tokenizer(config, None, texts, False, 0)
    large, _ = make_tokenizer(config, None, texts, True, 0)
    assert small.encode(["ÄRGER"]) == small.encode(["arger"])
    assert large.encode(["Ärger"]) != large.encode(["arger"])


def test_a_given_vocabulary_sets_the_size(config, tmp_path):
    """Where the configuration does not; a configuration of fewer rows does not fit."""
    folder = tiny_model(tmp_path / "other")
    tokenizer, model_config = make_tokenizer(config, folder, TEXTS, False, 20)
    assert model_config.vocab_size == tokenizer.vocab_size == Tokenizer.load(folder, 9).vocab_size
    assert tokenizer.max_length == 20
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 50}))
    with pytest.raises(InputError, match="the embedding 50 rows"):
        make_tokenizer(config, folder, TEXTS, False, 20)


def test_random_weights_are_the_initialisers(config):
    """normal(0, init_std), zero, one; a function of the seed alone."""
    made = ModelConfig.from_hf(tiny_config(hidden_size=64, initializer_range=0.05))
    model, again = (random_model(made, ("a", "b"), 3) for _ in range(2))
    other = random_model(made, ("a", "b"), 4)
    for (name, p), q, r in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if p.ndim > 1:
            assert not torch.equal(p, r)
            assert abs(p.std().item() / 0.05 - 1) < 0.2 or p.numel() < 500
        else:
            assert (p == (1 if name.endswith("norm.weight") else 0)).all()


GPT2 = """
model_type = "gpt2"
n_embd = 128
n_layer = 4
n_head = 4
n_positions = 256
vocab_size = 1024
"""


@pytest.mark.parametrize("given", [False, True])
def test_a_gpt2_made_from_nothing(tmp_path, given):
    """Its texts end with the first of its tokens, which config.json names whatever the file said,
    whether the vocabulary is made or given; transformers loads what is saved and has its logits."""
    (tmp_path / "gpt2.toml").write_text(GPT2 + "eos_token_id = 50256\n")
    path, folder = tmp_path / "gpt2.toml", None
    if given:
        folder = tmp_path / "vocabulary"
        folder.mkdir()
        make_tokenizer(path, None, TEXTS, False, 0)[0].save(folder)
    tokenizer, config = make_tokenizer(path, folder, TEXTS, False, 0, "lm")
    assert (config.head, config.max_len, tokenizer.max_length) == ("lm", 256, 256)
    assert given or config.vocab_size == tokenizer.vocab_size
    assert (tokenizer.eos, tokenizer.decode([0])) == (0, "")
    model = random_model(config, ("a", "b"), 0)
    assert isinstance(model, GPTLanguageModel)
    save(model, tokenizer, tmp_path / "lm")
    raw = json.loads((tmp_path / "lm" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (0, 0)
    assert raw["architectures"] == ["GPT2LMHeadModel"]
    peer = GPT2LMHeadModel.from_pretrained(tmp_path / "lm").eval()
    ours, _ = load(tmp_path / "lm", head="lm")
    (ids,) = tokenizer.ids(["we saw a good film"])
    with torch.no_grad():
        got = ours(collate([Example(ids, (), [*ids[1:].tolist(), 0])], [0])).logits()
        want = peer(input_ids=torch.from_numpy(ids).long()[None]).logits[0]
    torch.testing.assert_close(got[: len(ids)], want)
    classifier = random_model(config, ("a", "b"), 0, "classifier")
    assert isinstance(classifier, GPTClassifier)
    assert classifier.config.to_hf()["pad_token_id"] == 0


def test_random_weights_of_gpt2_are_its_initialisers(tmp_path):
    """normal(0, init_std), and smaller by the root of how many add to the stream where they do;
    padding is zero."""
    (tmp_path / "gpt2.toml").write_text(GPT2)
    model = random_model(read_new_config(tmp_path / "gpt2.toml", head="lm"), (), 3)
    again = random_model(read_new_config(tmp_path / "gpt2.toml"), (), 3, "lm")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.ndim > 1:
            std = 0.02 / (8**0.5 if name.endswith(("out.weight", "down.weight")) else 1)
            assert abs(p.std().item() / std - 1) < 0.05, name
        else:
            assert (p == (1 if name.endswith("norm.weight") else 0)).all()


def test_masked_words_of_a_new_model(config):
    """A head is made with the encoder; what else the configuration is of does not matter."""
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"task": "instruct", "template": ["a", "b"]}))
    tokenizer, made = make_tokenizer(config, None, TEXTS, False, 0, "lm")
    model = random_model(made, (), 0)
    assert isinstance(model, BertMasked)
    assert (made.task, made.template) == ("", None)
    assert model.head.dense.weight.std() > 0.1
    assert not model.head.bias.any()
    assert made.to_hf()["architectures"] == ["BertForMaskedLM"]
    assert tokenizer.misfit(made) is None


@pytest.mark.parametrize("changes", [{}, ROBERTA])
def test_from_nothing_to_a_model_that_answers(capsys, tmp_path, config, changes):
    """A configuration and a file of texts are enough, for the command line too; the folder is a
    model like any other, and going on after a stop makes the same vocabulary."""
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    lines = ["text,label", *(f"{text},{label}" for text, label in rows(120))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    words = ("train", "--config_name", config, "--train", tmp_path / "train.csv", "--threads", 1)
    words += ("--output", out, "--batch_size", 8, "--lr", 2e-3, "--epochs", 6)
    with settings_kept():
        first = call(capsys, *words)
        again = call(capsys, *words, "--resume_from_checkpoint", "auto")
        answers = call(capsys, "predict", "--model", out, "the film was good", "the film was bad")
    assert first.status == again.status == 0, again.err
    assert "made of the training texts" in first.err
    assert first.summary["eval_accuracy"] == 1.0
    assert "going on from" in again.err
    assert [answer["label"] for answer in answers.answers] == ["pos", "neg"]
    model, tokenizer = load(out)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert set(tokenizer.special.values()) == set(
        SPECIAL if not changes else tokenizer.special.values()
    )


def test_a_cased_vocabulary_of_texts_without_capitals_is_refused(config):
    """It would be a model that knows no word with a capital, and nobody would see why."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [f"{a}{b}{c}" for a in letters for b in letters for c in letters[:4]] * 3
    with pytest.raises(InputError, match="leave out --cased"):
        make_tokenizer(config, None, texts, True, 0)


def test_a_roberta_made_from_nothing_trains_on_pairs(capsys, tmp_path, config):
    """The second text decides, so both must reach the model: <s> a </s></s> b </s>."""
    config.write_text(json.dumps(json.loads(config.read_text()) | ROBERTA))
    lines = ["sentence1,sentence2,label"]
    for i, (text, label) in enumerate(rows(160)):
        lines.append(f"we saw a {('film', 'book')[i // 2 % 2]},{text},{label}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    words = ("train", "--config_name", config, "--train", tmp_path / "pairs.csv", "--threads", 1)
    with settings_kept():
        result = call(
            capsys, *words, "--output", out, "--batch_size", 8, "--lr", 2e-3, "--epochs", 6
        )
        answers = call(capsys, "predict", "--model", out, "--data", tmp_path / "pairs.csv").answers
    assert "pairs of texts" in result.err
    assert result.summary["eval_accuracy"] == 1.0
    assert [answer["label"] for answer in answers] == [label for _, label in rows(160)]
    ids, _, _ = load(out)[1].encode(["a"], ["b"])[0]
    assert [i for i in ids if i < 3] == [0, 2, 2, 2]
