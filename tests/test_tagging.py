"""minift/tasks/tagging.py and minift/word_pieces.py: words to tokens and back, whole runs."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from tiny import assert_one_line, call, settings_kept, tiny_model

from minift.batch import collate
from minift.config import ModelConfig, RunConfig, TrainConfig
from minift.errors import InputError
from minift.ops import IGNORE_INDEX, TORCH
from minift.saving import load
from minift.scratch import random_model
from minift.tagged import Sentence, of_text
from minift.tasks.tagging import Tagging, logits_of_words
from minift.tasks.task import File, Setup
from minift.tokenizer import Tokenizer
from minift.word_pieces import Pieces, cuts

TAGS = ("O", "B-x", "I-x", "B-y", "I-y")
PEOPLE, PLACES = ("ada", "bob", "eve", "dan"), ("rome", "oslo", "bern", "lima")


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    """The tokenizer of a tiny BERT."""
    folder = tiny_model(tmp_path_factory.mktemp("bert"))
    return Tokenizer.load(folder, 32)


def byte_level(decoder: bool) -> Tokenizer:
    """A small vocabulary over bytes."""
    config = config_of("gpt2" if decoder else "roberta")
    return Tokenizer.train(["the cat sat on the mat, on the hat"] * 3, config, 64, True)


def config_of(family: str, **changes) -> ModelConfig:
    fields = dict(vocab_size=300, max_len=64, n_types=0, dim=16, n_layer=2, n_head=2, ffn_dim=24)
    fields |= dict(activation="gelu_tanh", norm_eps=1e-5, embedding_dropout=0.0, hidden_dropout=0.0)
    fields |= dict(attention_dropout=0.0, classifier_dropout=0.0, init_std=0.5, family=family)
    return ModelConfig(**fields | {"labels": TAGS, "head": "tokens"} | changes)


def sentence(words, tags=None, line=1) -> Sentence:
    words = tuple(words)
    return Sentence(words, tags and tuple(tags), line, "f.conll", " ".join(words))


def heard(said):
    """What is returned, and the notices on the way."""
    notices = []
    while True:
        try:
            notices.append(next(said).text)
        except StopIteration as done:
            return done.value, notices


# ------------------------------------------------------------------ words and tokens


def test_first_pieces_have_the_targets(wordpiece):
    """Other pieces and special tokens have none; a control character, which is nothing to
    WordPiece, is an unknown word and keeps its tag, and its neighbours theirs."""
    row = sentence(["Good", "zz", "\x01", "day"], ["B-x", "O", "B-y", "I-y"])
    (window,) = Tagging(TAGS).encode([row], wordpiece)
    names = [wordpiece.backend.id_to_token(i) for i in window.tokens]
    assert names == ["[CLS]", "good", "z", "##z", "[UNK]", "day", "[SEP]"]
    assert list(window.target) == [-100, 1, 0, -100, 3, 4, -100]


few = settings(max_examples=40)
TEXT = st.text(st.sampled_from("abZ,. \u00a0\té\u0301北京\x01\U0001f600"), max_size=24)
WORD = st.text(st.sampled_from("acthe,.-'12é北\x01\U0001f600\u2028"), min_size=1, max_size=5)


@few
@given(words=st.lists(WORD, min_size=1, max_size=6), decoder=st.booleans())
def test_words_of_bytes_are_those_of_the_sentence(words, decoder):
    """A word inside a sentence is encoded with the blank before it: all tokens together are what
    the tokenizer makes of the whole sentence, and a word begins where its blank does."""
    words = [word for word in words if not word[0].isspace() and not word[-1].isspace()] or ["a"]
    tokenizer = BYTES[decoder]
    pieces = Pieces(tokenizer, 0).of(sentence(words))
    (whole,) = tokenizer.ids([" ".join(words)])
    assert [i for word in pieces for i in word] == whole.tolist()
    assert len(pieces) == len(words)
    assert all(pieces)


BYTES = byte_level(False), byte_level(True)


@few
@given(words=st.lists(WORD, min_size=1, max_size=6))
def test_words_of_wordpiece_are_those_of_the_library(wordpiece, words):
    """Ids and word numbers of `tokenizers` itself for given words, but for words that it loses."""
    found = wordpiece.backend.encode(words, is_pretokenized=True, add_special_tokens=False)
    want = [[i for i, w in zip(found.ids, found.word_ids, strict=True) if w == n]
            for n in range(len(words))]  # fmt: skip
    unknown = [wordpiece.backend.token_to_id("[UNK]")]
    assert Pieces(wordpiece, 0).of(sentence(words)) == [ids or unknown for ids in want]


@few
@given(
    total=st.integers(1, 60), room=st.integers(3, 12), stride=st.integers(0, 20),
    decoder=st.booleans(),
)  # fmt: skip
def test_windows_score_every_token_once(total, room, stride, decoder):
    """In order, each in a window that holds it; none is larger than there is room for, and of all
    windows of the sentence its own shows as much around it as any."""
    windows = list(cuts(total, room, stride, decoder))
    assert [i for *_, mine in windows for i in mine] == list(range(total))

    def context(i, begin, end):
        left = i - begin if begin else total
        right = end - 1 - i if end < total else total
        return left if decoder else min(left, right)

    for begin, end, mine in windows:
        assert end - begin <= room
        for i in mine:
            assert begin <= i < end
            seen = [context(i, b, e) for b, e, _ in windows if b <= i < e]
            assert context(i, begin, end) >= max(seen) - (not decoder)
    shared = min(stride, room // 2)
    assert all(a[1] - b[0] >= shared for a, b in pairwise(windows))


def test_long_sentences_are_never_cut(wordpiece):
    """Each word has its target in one window; what is predicted has as many tags as words."""
    words = ["film", "zzz"] * 40
    row = sentence(words, [TAGS[i % 5] for i in range(80)])
    task = Tagging(TAGS, stride=8)
    windows, notices = heard(task.encode_file(File(RunConfig(), "train", "f"), [row], wordpiece))
    assert [t for w in windows for t in w.target if t != -100] == [i % 5 for i in range(80)]
    assert max(len(w.tokens) for w in windows) == wordpiece.max_length
    assert notices == ["train: 1 of 1 sentences are longer than 32 tokens and read in windows"]
    model = random_model(config_of("bert", n_types=2, max_len=32), TAGS, 0)
    (answer,) = task.predict(model, wordpiece, [row])
    assert len(answer["tags"]) == 80


# ------------------------------------------------------------------ loss, metrics


def examples_of(tokenizer, n=6):
    rng = np.random.default_rng(0)
    rows = []
    for size in range(2, 2 + n):
        words = rng.choice(["film", "zz", "good", "q"], size)
        rows.append(sentence(words.tolist(), [TAGS[i] for i in rng.integers(0, 5, size)]))
    return rows, Tagging(TAGS, 8).encode(rows, tokenizer)


def test_loss_is_torchs(wordpiece):
    """Weighted and smoothed, of first pieces alone; its divisor is the sum of their weights."""
    weights = (0.5, 1.0, 2.0, 3.0, 4.0)
    task = Tagging(TAGS, 8, weights, 0.1)
    _, examples = examples_of(wordpiece)
    batch = collate(examples, range(len(examples)))
    assert batch.at is not None
    logits = torch.randn(len(batch.at), 5, generator=torch.Generator().manual_seed(0))
    got = task.loss(logits, batch, TORCH) / task.weight(batch)
    want = F.cross_entropy(logits, batch.targets, torch.tensor(weights), label_smoothing=0.1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_outputs_are_those_of_each_sentence_alone(wordpiece, family):
    """Sorted and packed, with some rows listed: the same tags and losses in the order of the file,
    and a mark at the first word of each sentence, a long one's windows among them."""
    tokenizer = wordpiece if family == "bert" else BYTES[True]
    tokenizer = Tokenizer(tokenizer.backend, {}, 12) if family == "bert" else tokenizer
    model = random_model(config_of(family, n_types=2 * (family == "bert")), TAGS, 0)
    rows, examples = examples_of(tokenizer, 14)
    task = Tagging(TAGS, 8)
    outputs = task.outputs(model, examples, torch.float32, TORCH)
    assert (
        np.flatnonzero(outputs[:, 0]).tolist()
        == np.cumsum([0] + [len(row.words) for row in rows[:-1]]).tolist()
    )
    assert [TAGS[int(i)] for i in outputs[:, 1]] == [tag for row in rows for tag in row.tags]
    alone = [task.outputs(model, [e], torch.float32, TORCH) for e in examples]
    np.testing.assert_allclose(outputs[:, 2:], np.concatenate(alone)[:, 2:], rtol=1e-4, atol=1e-5)
    logits = dict(logits_of_words(model, examples, ops=TORCH))
    for i, example in enumerate(examples):
        whole = model(collate([replace(example, target=[0] * len(example.tokens))], [0]))
        rows_of_words = np.flatnonzero(np.array(example.target) != IGNORE_INDEX)
        want = whole.detach().numpy()[rows_of_words]
        np.testing.assert_allclose(logits[i], want, rtol=1e-4, atol=1e-5)


def test_metrics_of_plain_tags_are_scikit_learns():
    """f1 is pooled over words, where it equals the accuracy; and as a mean over the tags."""
    rng = np.random.default_rng(0)
    target, predicted = rng.integers(0, 3, (2, 50))
    outputs = np.stack([np.arange(50) % 10 == 0, target, predicted, np.full(50, 0.5)], -1)
    got = Tagging(("ADJ", "NOUN", "VERB")).metrics(outputs)
    assert got["loss"] == 0.5
    assert got["f1"] == got["accuracy"] == accuracy_score(target, predicted)
    assert got["f1_macro"] == pytest.approx(f1_score(target, predicted, average="macro"))
    each = f1_score(target, predicted, average=None)
    assert [got[f"f1/{name}"] for name in ("ADJ", "NOUN", "VERB")] == pytest.approx(list(each))


def test_metrics_of_blocks_laid_end_to_end():
    """Sentences end where the next begins: an entity does not reach into another sentence."""
    one = np.array([[1, 1, 1, 0.1], [0, 2, 2, 0.1]])
    two = np.array([[1, 2, 0, 0.1], [0, 0, 0, 0.1]])
    got = Tagging(TAGS).metrics(np.concatenate([one, two]))
    assert (got["entities"], got["precision"], got["recall"]) == (2, 1, 0.5)
    assert got["f1_strict"] == 1  # the second begins with I
    assert got["n"] == 4


# ------------------------------------------------------------------ files


def read(folder, content, **flags):
    path = folder / "x.conll"
    path.write_text("".join(f"{line}\n" for line in content.split("|")), encoding="utf-8")
    run = RunConfig(train_file=str(path), **flags)
    file = File(run, "train", str(path))
    return *heard(Tagging.read_file(file)), file


def test_tags_that_break_their_scheme_are_repaired(tmp_path):
    """As seqeval reads them, counted and told; or they stop the run, with their line."""
    content = "a O|b I-x|c I-y||d B-x|e I-x"
    rows, notices, file = read(tmp_path, content)
    assert [row.tags for row in rows] == [("O", "B-x", "B-y"), ("B-x", "I-x")]
    assert f"2 ({file.path}:2, {file.path}:3) tags do not follow IOB2" in notices[0]
    with pytest.raises(InputError, match=r"conll:2: expected IOB2, got tag 'I-x' behind 'O'"):
        read(tmp_path, content, bad_tags="error")
    with pytest.raises(InputError, match=r"at the begin of a sentence"):
        list(Tagging.blocks(File(RunConfig(bad_tags="error"), "d", _path(tmp_path, "b I-x|c B-x"))))


def _path(folder, content):
    path = folder / "y.conll"
    path.write_text(content.replace("|", "\n") + "\n")
    return str(path)


def test_schemes_are_told(tmp_path):
    """IOB1 is read as IOB2 and is no mistake, IOBES is kept, other tags are no entities'."""
    rows, notices, _ = read(tmp_path, "a I-x|b I-x|c B-x|d O", bad_tags="error")
    assert rows[0].tags == ("B-x", "I-x", "B-x", "O")
    assert notices == ["train: tags are IOB2, written as IOB1, 1 types"]
    rows, notices, _ = read(tmp_path, "a S-x|b B-y|c E-y")
    assert (rows[0].tags, notices) == (("S-x", "B-y", "E-y"), ["train: tags are IOBES, 2 types"])
    assert read(tmp_path, "a NOUN|b VERB")[1] == ["train: tags are no parts of entities"]


def test_blocks_are_the_rows_of_the_file(tmp_path):
    """All of them, in their order, repaired likewise; to predict, tags are not needed."""
    path = _path(tmp_path, "||".join(f"w{i} {'I-x' if i % 2 else 'O'}" for i in range(1500)))
    blocks = list(Tagging.blocks(File(RunConfig(), "data", path)))
    assert [len(block) for block in blocks] == [1024, 476]
    rows, _ = heard(Tagging.read_file(File(RunConfig(), "data", path)))
    assert [row for block in blocks for row in block] == rows
    asked = [row for block in Tagging.blocks(File(RunConfig(), "d", path), False) for row in block]
    assert [row.words for row in asked] == [row.words for row in rows]
    assert {row.tags for row in asked} == {None}


def test_tags_that_were_not_trained_are_dropped(wordpiece):
    """With the sentence and its line; the others are encoded."""
    file = File(RunConfig(), "validation", "f")
    rows = [sentence("ab", ["O", "B-z"], 7), sentence("ab", ["O", "B-x"], 9)]
    examples, _ = heard(Tagging(TAGS).encode_file(file, rows, wordpiece))
    assert file.dropped == [("f.conll:7", "have a tag that was not trained, 'B-z'")]
    assert len(examples) == 1


def test_labels_of_rows():
    """Every letter of every type, so that a validation row with another one is no mistake."""
    rows = [sentence("ab", ["B-y", "O"])]
    assert Tagging.labels_of(rows, RunConfig()) == ("O", "B-y", "I-y")
    assert Tagging.labels_of(rows, RunConfig(labels="O,B-y")) == ("O", "B-y")
    with pytest.raises(InputError, match="two tags or more, every word has 'X'"):
        Tagging.labels_of([sentence("ab", ["X", "X"])], RunConfig(train_file="t"))


# ------------------------------------------------------------------ answers


@given(
    st.text(st.sampled_from("abZ,. \u00a0\té\u0301北京\x01\U0001f600"), max_size=24), st.booleans()
)
def test_entities_are_where_they_say(text, plain):
    """Whatever the tokenizer does to the text: lower case, accents, ideograms, lost characters."""
    labels = ("DET", "NOUN") if plain else TAGS
    row = of_text(text, 1)
    tags = [labels[i % len(labels)] for i in range(len(row.words))]
    answer = Tagging(labels).answer(row, tags, np.full(len(tags), 0.25))
    assert answer["text"] == text
    for said in answer["words" if plain else "entities"]:
        assert text[said["start"] : said["end"]] == said["text"]
        assert said["score"] == 0.25
    if plain:
        assert [said["tag"] for said in answer["words"]] == tags


def test_answers_to_given_words():
    """Their tags, and entities with places among the words; of plain tags a score each."""
    scores = np.array([0.5, 0.7, 1.0])
    answer = Tagging(TAGS).answer(sentence(["New", "York", "is"]), ["B-x", "I-x", "O"], scores)
    assert answer["tags"] == ["B-x", "I-x", "O"]
    assert answer["entities"] == [
        {"text": "New York", "label": "x", "start": 0, "end": 2, "score": 0.6}
    ]
    plain = Tagging(("DET", "NOUN")).answer(sentence(["a", "b"]), ["DET", "NOUN"], scores[:2])
    assert plain == {"tokens": ["a", "b"], "tags": ["DET", "NOUN"], "scores": [0.5, 0.7]}


# ------------------------------------------------------------------ whole runs


def sentences(n):
    """Sentences in which people and places are known by their names."""
    made = []
    for i in range(n):
        person, place = PEOPLE[i % 4], PLACES[i // 4 % 4]
        words = [*(["the"] * (i % 3)), person, "saw", place, "today", "."]
        tags = ["O"] * (i % 3) + ["B-person", "O", "B-place", "I-place" if i % 2 else "O", "O"]
        made.append((words, tags))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train.conll of 48 sentences, 6 steps an epoch, and validation.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    blocks = ["".join(f"{w}\t{t}\n" for w, t in zip(*s, strict=True)) for s in sentences(48)]
    (folder / "train.conll").write_text("\n".join(blocks))
    lines = [json.dumps({"tokens": w, "tags": t}) for w, t in sentences(12)]
    (folder / "validation.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def words(model, data, output, *more):
    files = ("--train", data / "train.conll", "--validation", data / "validation.jsonl")
    flags = ("--threads", 1, "--batch_size", 8, "--lr", 1e-2, "--task", "tagging", *more)
    return "train", "--model", model, *files, "--output", output, *flags


def test_a_run_learns_and_answers(capsys, model, data, tmp_path):
    """From files to a folder whose evaluation is the same, and which finds names in a text."""
    output = tmp_path / "out"
    result = call(capsys, *words(model, data, output, "--epochs", 6))
    assert result.status == 0, result.err
    assert result.summary["eval_f1"] > 0.9
    assert "train: tags are IOB2, 2 types" in result.err
    evaluated = call(capsys, "eval", "--model", output, "--data", data / "validation.jsonl")
    assert evaluated.status == 0, evaluated.err
    same = ("eval_f1", "eval_f1_strict", "eval_accuracy", "eval_entities")
    assert {k: evaluated.summary[k] for k in same} == {k: result.summary[k] for k in same}
    trained, tokenizer = load(output)
    task = Tagging.trained(Setup(RunConfig(), TrainConfig(), trained, tokenizer))
    text = "  The Ada  saw OSLO."
    (answer,) = task.predict(trained, tokenizer, [Tagging.row_of(text, 1)])
    found = [(said["text"], said["label"]) for said in answer["entities"]]
    assert ("Ada", "person") in found
    assert "OSLO" in " ".join(part for part, _ in found)
    empty, given_words = task.predict(trained, tokenizer, [of_text(" ", 1), sentence(["ada"])])
    assert empty == {"text": " ", "entities": []}
    assert given_words["tags"] == ["B-person"]


def test_a_run_resumed_inside_an_epoch_is_the_same(capsys, model, data, tmp_path):
    """Bit for bit: model, moments, metrics."""
    flags = ("--max_steps", 8, "--save_steps", 2, "--save_total_limit", 0, "--quiet")
    flags += ("--class_weights", "balanced", "--label_smoothing_factor", 0.1, "--doc_stride", 4)
    one, other = tmp_path / "one", tmp_path / "other"
    assert call(capsys, *words(model, data, one, *flags)).status == 0
    shutil.copytree(one, other)
    for step in (6, 8):
        shutil.rmtree(other / f"checkpoint-{step}")
    resumed = call(capsys, *words(model, data, other, *flags, "--resume_from_checkpoint", "auto"))
    assert resumed.status == 0, resumed.err
    for name in ("model", "optimizer"):
        path = Path("checkpoint-8") / f"{name}.safetensors"
        assert (one / path).read_bytes() == (other / path).read_bytes()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_gpt_made_from_nothing_learns(capsys, data, tmp_path):
    """A decoder, whose words carry their blanks, without a validation file."""
    small = 'model_type = "gpt2"\nn_embd = 16\nn_layer = 1\nn_head = 2\nn_positions = 32\n'
    (tmp_path / "small.toml").write_text(small + "vocab_size = 300\n")
    flags = ("--train", data / "train.conll", "--epochs", 4, "--lr", 1e-2, "--batch_size", 8)
    flags += ("--threads", 1, "--output", tmp_path / "out", "--task", "tagging")
    result = call(capsys, "train", "--config_name", tmp_path / "small.toml", *flags)
    assert result.status == 0, result.err
    assert result.summary["eval_f1"] > 0.5
    assert "5 of the training sentences, drawn with seed 0, are kept" in result.err


def test_mistakes_are_one_line(capsys, model, data, tmp_path):
    """A file without tags, too many sentences that cannot be used, a flag of other tasks."""
    (tmp_path / "train.conll").write_text("a\nb\n")
    bad = tmp_path / "train.conll"
    flags = (
        "--model",
        model,
        "--output",
        tmp_path / "out",
        "--task",
        "tagging",
        "--quiet",
        "--train",
    )
    assert_one_line(call(capsys, "train", *flags, bad), f"{bad}:1: expected a word and its tag")
    bad.write_text("a\tO\n\nb\n\nc\tB-x\n")
    result = call(capsys, "train", *flags, bad)
    assert_one_line(result, "1 of 3 rows cannot be used", f"({bad}:3)", "--max_dropped 0.01")
    bad.write_text("-DOCSTART- -X-\n\n")
    assert_one_line(call(capsys, "train", *flags, bad), "expected words with tags, found none")
    good = data / "train.conll"
    result = call(capsys, "train", *flags, good, "--overflow", "error")
    assert_one_line(result, "--overflow is not read by --task tagging")
