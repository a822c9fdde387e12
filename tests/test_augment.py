"""minift/augment.py: words that are left out, swapped and masked, and all that must stay."""

import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, call, settings_kept, tiny_model, words, write_rows

from minift.augment import Augment, Augmenter, augmented
from minift.batch import Batches, Example
from minift.errors import InputError
from minift.saving import load

CLS, SEP, MASK = (VOCABULARY.index(name) for name in ("[CLS]", "[SEP]", "[MASK]"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tiny_model(tmp_path_factory.mktemp("bert")), ("a", "b"))[1]


def examples_of(tokenizer, texts, pairs=None):
    return [
        Example(np.array(ids, np.int32), np.array(types, np.int8), i)
        for i, (ids, types, _) in enumerate(tokenizer.encode(texts, pairs))
    ]


def word_list(tokens) -> list[tuple[int, ...]]:
    """Pieces of each word, as a reader would put them together."""
    found = []
    for token in tokens:
        if VOCABULARY[token].startswith("##"):
            found[-1] += (int(token),)
        else:
            found.append((int(token),))
    return found


@given(
    st.lists(st.sampled_from("the film was surprising odd good".split()), min_size=1, max_size=9),
    st.lists(st.sampled_from("we saw a strange book".split()), min_size=1, max_size=9),
    st.tuples(*[st.sampled_from([0.0, 0.3, 0.9])] * 2),
    st.integers(0, 2**63 - 1),
)
def test_words_stay_whole_in_their_text(tokenizer, first, second, shares, seed):
    """Special tokens, the boundary, types and target are what they were; each text keeps one word
    at least; only words that were there are there, as often at most; without drop all are."""
    drop, swap = shares
    (whole,) = examples_of(tokenizer, [" ".join(first)], [" ".join(second)])
    made = Augmenter(Augment(drop, swap), tokenizer).vary(whole, seed, 5, 2)
    before, after = whole.tokens.tolist(), made.tokens.tolist()
    assert [t for t in after if t in (CLS, SEP)] == [CLS, SEP, SEP]
    assert (after[0], after[-1]) == (CLS, SEP)
    edges = before.index(SEP), after.index(SEP)
    parts = [(x[1:e], x[e + 1 : -1]) for x, e in zip((before, after), edges, strict=True)]
    for old, new in zip(*parts, strict=True):
        assert new
        assert Counter(word_list(new)) <= Counter(word_list(old))
        assert drop or Counter(word_list(new)) == Counter(word_list(old))
        assert drop or swap or new == old
    assert made.types.tolist() == [0] * (edges[1] + 1) + [1] * (len(after) - edges[1] - 1)
    assert made.target == whole.target


def test_shares_are_those_asked_for(tokenizer):
    """Of 20,000 words, within four deviations; a swap needs that the one before is none, so of
    swaps with p there are p / (1 + p) or fewer, and p (1 - p) or more."""
    n = 20_000
    tokens = np.array([CLS, *np.arange(n) % 20 + VOCABULARY.index("good"), SEP], np.int32)
    whole, error = Example(tokens, (), 0), 4 * (0.1 * 0.9 / n) ** 0.5
    dropped, masked, swapped = (
        Augmenter(Augment(**{name: 0.1}), tokenizer).vary(whole, 0, 0, 0).tokens
        for name in ("drop", "mask", "swap")
    )
    assert 1 - len(dropped) / len(tokens) == pytest.approx(0.1, abs=error)
    assert (masked == MASK).mean() == pytest.approx(0.1, abs=error)
    assert (masked[masked != MASK] == tokens[masked != MASK]).all()
    moved = (swapped != tokens).sum() / 2 / n
    assert 0.09 - error < moved < 0.1 / 1.1 + error


def test_a_word_is_masked_whole(tokenizer):
    (whole,) = examples_of(tokenizer, ["surprising " * 3 + "good"])
    augmenter = Augmenter(Augment(mask=0.5), tokenizer, fixed=True)
    seen = set()
    for row in range(20):
        tokens = augmenter.vary(whole, 0, row, 0).tokens
        assert len(tokens) == len(whole.tokens)
        for i in range(3):
            part = tokens[1 + 10 * i : 11 + 10 * i] == MASK
            assert part.all() or not part.any()
            seen.add(bool(part.all()))
    assert seen == {True, False}


def test_it_is_a_function_of_seed_epoch_and_row(tokenizer):
    """The same steps with any accumulation and from any start; other ones in other epochs."""
    examples = examples_of(tokenizer, ["the film was good and it is very fine today"] * 16)
    augmenter = Augmenter(Augment(0.2, 0.2, 0.2), tokenizer)

    def texts(size, accumulation, epoch, start=0, seed=3):
        vary = augmented(examples, augmenter, seed)
        batches = Batches(examples, size, accumulation, 0, vary)
        found = {}
        for step in batches.epoch(epoch, start):
            for batch in step:
                ends = batch.layout.cu_seqlens.tolist()
                for i, row in enumerate(batch.rows):
                    found[row] = tuple(batch.tokens[ends[i] : ends[i + 1]].tolist())
        return found

    whole = texts(4, 2, 1)
    assert len(set(whole.values())) > 10
    assert texts(2, 4, 1) == whole
    later = texts(4, 2, 1, start=1)
    assert later == {row: whole[row] for row in later}
    assert texts(4, 2, 2) != whole != texts(4, 2, 1, seed=4)


@pytest.mark.parametrize(
    "text", ["drop", "drop=1", "drop=-0.1", "drop=nan", "cut=0.1", "drop=0.1,drop=0.2"]
)
def test_wrong_flags_say_what_was_expected(text):
    with pytest.raises(InputError, match=r"^expected augment as 'drop=0\.1,swap=0\.05,mask=0\.1'"):
        Augment.parse(text)


def test_what_answers_point_to_does_not_move(tokenizer):
    assert Augment.parse("") is None
    assert Augment.parse("mask=0.1, drop=0.2") == Augment(0.2, 0.0, 0.1)
    for augment in (Augment(drop=0.1), Augment(swap=0.1)):
        with pytest.raises(InputError, match="use mask alone"):
            Augmenter(augment, tokenizer, fixed=True)


def test_a_run_goes_on_to_the_same_bits(capsys, tmp_path):
    """In the middle of an epoch."""
    model = tiny_model(tmp_path / "bert")
    write_rows(tmp_path / "train.csv", 40)
    write_rows(tmp_path / "validation.jsonl", 8)
    given = words(model, tmp_path, tmp_path / "out", "--max_steps", 8, "--save_steps", 7)
    given += ["--augment", "drop=0.2,swap=0.2,mask=0.2"]
    with settings_kept():
        whole = call(capsys, *given)
        assert whole.status == 0, whole.err
        weights = (tmp_path / "out" / "model.safetensors").read_bytes()
        shutil.rmtree(tmp_path / "out" / "checkpoint-8")
        again = call(capsys, *given, "--resume_from_checkpoint", "auto")
        assert again.status == 0, again.err
        assert again.summary["train_loss"] == pytest.approx(whole.summary["train_loss"])
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
