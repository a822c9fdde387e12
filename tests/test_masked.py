"""Masked words: which, how often, and again the same."""

import shutil

import numpy as np
import pytest
from tiny import call, settings_kept, tiny_model, words, write_rows

from minift.batch import Example, collate
from minift.ops import IGNORE_INDEX
from minift.tasks.masked import Masked, MaskedWords

TASK = MaskedWords(mask=3, vocab=1000, probability=0.15, seed=7)


def example(n: int) -> Example:
    tokens = np.array([1, *range(10, 8 + n), 2], np.int32)
    return Example(tokens, (), tokens)


def test_shares_are_those_of_the_paper():
    """15 % of the words have a target; of those 80 % are masked, 10 % are another, 10 % stand. The
    special tokens at the ends never have one. Four deviations of 200,000 draws."""
    whole = example(200_002)
    made = TASK.masked(whole, 0, 0)
    found = made.target != IGNORE_INDEX
    assert not found[0]
    assert not found[-1]
    np.testing.assert_array_equal(made.target[found], whole.tokens[found])
    np.testing.assert_array_equal(made.tokens[~found], whole.tokens[~found])
    n, many = found.sum(), 200_000
    assert n / many == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / many) ** 0.5)
    masked, stands = made.tokens == TASK.mask, made.tokens == whole.tokens
    for share, which in ((0.8, masked), (0.1, stands), (0.1, ~masked & ~stands)):
        error = 4 * (share * (1 - share) / n) ** 0.5 + 2 / 1000  # some token may be any
        assert (which & found).sum() / n == pytest.approx(share, abs=error)
    other = made.tokens[found & ~masked & ~stands]
    assert other.min() < 20
    assert 980 < other.max() < 1000


def test_the_ends_of_a_piece_are_never_masked():
    """In none of 200 rows, of which a seventh would have a target there."""
    for row in range(200):
        made = TASK.masked(example(8), row, 0)
        assert made.target[0] == made.target[-1] == IGNORE_INDEX
        assert (made.tokens[0], made.tokens[-1]) == (1, 2)


def test_masks_are_a_function_of_seed_epoch_and_row():
    """And of nothing else: other rows, other epochs, other seeds have other masks."""
    one = example(64)

    def tokens(row, epoch, seed=7):
        task = MaskedWords(TASK.mask, TASK.vocab, 0.15, seed)
        return task.masked(one, row, epoch).tokens.tolist()

    assert tokens(0, 1) == tokens(0, 1)
    different = [tokens(0, 1), tokens(1, 1), tokens(0, 2), tokens(0, 1, seed=8), tokens(1, 0)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_every_epoch_masks_anew_and_validation_never():
    """The validation rows are masked as in an epoch that is never trained."""
    validation = Masked([example(40), example(50)], TASK, 0)
    of = TASK.vary(validation, 7)
    assert len(of(0)) == 2
    assert of(0)[1].tokens.tolist() == of(0)[1].tokens.tolist() != of(1)[1].tokens.tolist()
    assert of(0)[0].tokens.tolist() != validation[0].tokens.tolist()
    assert [e.tokens.tolist() for e in validation[:1]] == [validation[0].tokens.tolist()]


def test_only_masked_rows_reach_the_head():
    """The batch lists the rows that have a target, and no other."""
    batch = collate(Masked([example(300), example(200)], TASK, 0), [0, 1])
    real = batch.targets != IGNORE_INDEX
    assert 0 < real.sum() < 150
    assert len(batch.at) < 160
    assert len(set(batch.at[real].tolist())) == real.sum()


def test_pretraining_goes_on_to_the_same_bits_and_then_to_labels(capsys, tmp_path):
    """A BERT learns masked words, is interrupted, and is fine-tuned afterwards; transformers reads
    what lies in between without a missing key."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(tmp_path / "bert")
    write_rows(tmp_path / "train.csv", 80)
    write_rows(tmp_path / "validation.jsonl", 24)
    given = words(model, tmp_path, tmp_path / "out", "--task", "mlm", "--max_steps", 6)
    with settings_kept():
        whole = call(capsys, *given, "--save_steps", 2)
        assert whole.status == 0, whole.err
        weights = (tmp_path / "out" / "model.safetensors").read_bytes()
        shutil.rmtree(tmp_path / "out" / "checkpoint-6")
        again = call(capsys, *given, "--save_steps", 2, "--resume_from_checkpoint", "auto")
        assert again.summary["eval_loss"] == whole.summary["eval_loss"]
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
        found = call(capsys, "eval", "--model", tmp_path / "out", "--data", tmp_path / "train.csv")
        assert found.summary["eval_perplexity"] > 1
        labels = words(tmp_path / "out", tmp_path, tmp_path / "labels", "--max_steps", 2)
        assert call(capsys, *labels).status == 0
    _, report = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report


def test_a_text_without_a_masked_word_is_refused(capsys, tmp_path):
    """Its loss would be that of nothing."""
    (tmp_path / "train.txt").write_text("the film was good\n" * 40)
    (tmp_path / "tiny.txt").write_text("a")
    flags = ("--task", "mlm", "--model", tiny_model(tmp_path / "bert"), "--mlm_probability", 0.01)
    files = ("--train", tmp_path / "train.txt", "--validation", tmp_path / "tiny.txt")
    with settings_kept():
        result = call(capsys, "train", *flags, *files, "--output", tmp_path / "out", "--quiet")
    assert result.status == 2
    assert "tiny.txt: too short" in result.err
