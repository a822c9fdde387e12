"""minift.stream_text: pieces that make the whole text, never half a character, and stop strings."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel

from minift import load
from minift.generate import generate
from minift.sampling import GenerateConfig
from minift.stream_text import Pieces, generate_text, stream_text

EOS = "<|endoftext|>"


def by_bytes(tokens: list[int]) -> str:
    """A vocabulary of the 256 bytes."""
    return bytes(tokens).decode(errors="replace")


def by_words(tokens: list[int]) -> str:
    """A decoder that treats the first token in its own way."""
    return "".join(f" {'abcd'[token % 4]}" for token in tokens)[1:]


def shown(pieces: Pieces, tokens) -> list[str]:
    """What comes after each token, up to the one that stops it, and at the end."""
    parts = []
    for token in tokens:
        parts.append(pieces.add(token))
        if pieces.stopped:
            break
    return [*parts, pieces.rest()]


@settings(max_examples=60)
@given(st.one_of(st.binary(max_size=12), st.text(max_size=6).map(str.encode)))
@example("naïve 文字 🙂!".encode())
@example(b"\xf0\x9f\xe6\x96")
def test_pieces_make_the_text_and_cut_no_character(data):
    """Any bytes, a token each, also such that are no text: what was shown is never taken back, and
    only what can never become a character is shown as unknown."""
    parts = shown(Pieces(by_bytes), data)
    assert "".join(parts) == by_bytes([*data])
    for n, part in enumerate(parts[:-1], start=1):
        assert "".join(parts[:n]) == by_bytes([*data[:n]])[: len("".join(parts[:n]))]
        assert not part.endswith("\ufffd")


@given(st.lists(st.integers(0, 3), max_size=8))
def test_pieces_of_words(tokens):
    """A decoder that leaves out the first space: it is there between pieces."""
    assert "".join(shown(Pieces(by_words), tokens)) == by_words(tokens)


def stopped_text(text: str, stop) -> str:
    """The definition: letter by letter, up to the first stop string that is whole."""
    for n in range(len(text) + 1):
        ends = [text[:n].index(s) for s in stop if s in text[:n]]
        if ends:
            return text[: min(ends)]
    return text


@given(
    st.text("ab ", max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    st.integers(1, 3),
)
@example("xaab", ["aab"], 1)
@example("xabcd", ["abcd", "bc"], 3)
def test_a_stop_string_ends_the_text_before_it(text, stop, size):
    """Also when it spans tokens, however the text is cut into them, and nothing of it is shown
    before: pieces are a beginning of the answer at all times."""
    words = [text[i : i + size] for i in range(0, len(text), size)]
    pieces = Pieces(lambda tokens: "".join(words[i] for i in tokens), stop)
    parts = shown(pieces, range(len(words)))
    assert "".join(parts) == stopped_text(text, stop)
    assert pieces.stopped == any(s in text for s in stop)


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    """GPT-2 of random weights with a vocabulary of bytes and the end of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    made = tempfile.TemporaryDirectory()
    backend.save(f"{made.name}/tokenizer.json")
    torch.manual_seed(0)
    ends = dict(bos_token_id=256, eos_token_id=256, initializer_range=0.4)
    sizes = dict(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(GPT2Config(**sizes, **ends)).save_pretrained(made.name)
    return made


@pytest.fixture(scope="module")
def loaded():
    return load(Path(folder().name), head="lm")


TEXTS = ["Once upon", "a", "naïve 文字", "and then"]


def test_pieces_of_a_model_are_its_tokens_decoded(loaded):
    """Drawn bytes: pieces of all prompts, mixed, make the decoded tokens of each."""
    model, tokenizer = loaded
    config, answers, count = GenerateConfig(temperature=1.0, max_new_tokens=20), [""] * 4, 0
    for piece in stream_text(model, tokenizer, TEXTS, config):
        answers[piece.prompt] += piece.text
        count += 1
    tokens = generate(model, tokenizer.ids(TEXTS), config, tokenizer.eos)
    assert answers == [tokenizer.decode(ids) for ids in tokens]
    assert answers == generate_text(model, tokenizer, TEXTS, config)
    assert count > len(TEXTS)  # they came in pieces


def test_the_end_token_is_no_text(loaded):
    """An answer that ends by any token stands in for one that ends by the tokenizer's: it is cut
    before that token, and says so."""
    model, tokenizer = loaded
    config = GenerateConfig(max_new_tokens=10)
    tokens = generate(model, tokenizer.ids(TEXTS), config)
    eos = tokens[1][4]
    found = {}
    for piece in stream_text(model, tokenizer, TEXTS, config, eos=eos):
        text, _ = found.get(piece.prompt, ("", ""))
        found[piece.prompt] = text + piece.text, piece.end
    for i, ids in enumerate(tokens):
        ends = eos in ids
        kept = ids[: ids.index(eos)] if ends else ids
        assert found[i] == (tokenizer.decode(kept), "eos" if ends else "length")


def test_stop_strings_of_a_model(loaded):
    """Two letters of an answer, made by two tokens, end that answer before them and no other."""
    model, tokenizer = loaded
    config = GenerateConfig(max_new_tokens=16, temperature=1.0, seed=3)
    whole = generate_text(model, tokenizer, TEXTS, config)
    stop = whole[0][4:6]
    cut = GenerateConfig(max_new_tokens=16, temperature=1.0, seed=3, stop=(stop,))
    assert generate_text(model, tokenizer, TEXTS, cut) == [
        text[: text.index(stop)] if stop in text else text for text in whole
    ]
