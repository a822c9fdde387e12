"""minift/balance.py: weights by label, rows drawn by them, and the warning of an imbalance."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import call, rows, settings_kept, tiny_model, words, write_rows

from minift.balance import by_frequency, imbalance, label_weights, row_weights
from minift.batch import Batches
from minift.errors import InputError


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = ["a"] * 7 + ["b"] * 2 + ["c"]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    weights = by_frequency(("a", "b", "c"), labels)
    assert weights == pytest.approx(tuple(expected))


def test_weights_by_name():
    """In the order of the head, whatever the order of the flag; a label may hold '='."""
    assert label_weights("class_weights", "x=y=2, a=0.5", ("a", "x=y"), list) == (0.5, 2.0)
    assert label_weights("class_weights", "", ("a", "b"), list) is None


def test_labels_with_commas_have_weights():
    """As the error itself writes them."""
    names = ("a, b", "c,d=1", "e")
    with pytest.raises(InputError, match="'a, b=1,c,d=1=1,e=1'"):
        label_weights("class_weights", "a, b=1", names, list)
    text = "e=3,a, b=1,c,d=1=2e0"
    assert label_weights("class_weights", text, names, list) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("flag", ["class_weights", "sampling_weights"])
@pytest.mark.parametrize(
    "text",
    [
        *("a=1", "a=1,b=0", "a=1,b=nan", "a=1,b=x", "a=1,b=1,c=1", "balance"),
        *("a=1,a=2,b=1", "a=1,b=1,c", "a=,b=1", "=1,a=1,b=1"),
    ],
)
def test_wrong_weights_say_what_was_expected(flag, text):
    with pytest.raises(InputError, match=rf"expected {flag} 'balanced' or .* 'a=1,b=1', got"):
        label_weights(flag, text, ("a", "b"), list)


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=5),
    st.data(),
    st.integers(0, 2**63 - 1),
    st.integers(0, 9),
)
def test_rows_and_labels_are_drawn_as_often_as_expected(counts, data, seed, epoch):
    """Each within one of it in every epoch, labels of the same weight too; again the same."""
    weights = data.draw(
        st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(counts), max_size=len(counts))
    )
    targets = np.repeat(np.arange(len(counts)), counts)
    each = row_weights(weights, targets)
    order = Batches(range(len(targets)), 4, seed=seed, weights=each).order(epoch)
    assert len(order) == len(targets)
    expected = each / each.sum() * len(targets)
    drawn = np.bincount(order, minlength=len(targets))
    assert (np.abs(drawn - expected) < 1 + 1e-6).all()
    by_label = np.bincount(targets, drawn), np.bincount(targets, expected)
    assert (np.abs(by_label[0] - by_label[1]) < 1 + 1e-6).all()
    again = Batches(range(len(targets)), 7, 2, seed=seed, weights=each).order(epoch)
    assert order.tolist() == again.tolist()


def test_balanced_draws_reach_every_row_over_the_epochs():
    """90 rows of one label share 50 draws an epoch: other ones in each, none is forgotten. Chance
    that one is in 40 epochs: 90 * (4 / 9) ** 40 < 1e-12."""
    targets = np.repeat([0, 1], [90, 10])
    weights = by_frequency(("a", "b"), ["a"] * 90 + ["b"] * 10)
    batches = Batches(range(100), 8, weights=row_weights(weights, targets))
    orders = [batches.order(epoch) for epoch in range(40)]
    assert {tuple(np.bincount(targets[order])) for order in orders} == {(50, 50)}
    assert set(np.concatenate(orders).tolist()) == set(range(100))
    first = orders[0]
    assert 10 < (targets[first[:50]] == 1).sum() < 40  # mixed, not one label after the other


def test_an_imbalance_is_named_once_nothing_is_done():
    """From ten to one on, if the rarest has less than a tenth of the rows."""
    (notice,) = imbalance(["ham"] * 1000 + ["spam"] * 100)
    assert notice.loud
    assert "'ham' has 1,000 training rows, 'spam' 100" in notice.text
    assert "--sampling_weights balanced" in notice.text
    assert "--class_weights balanced" in notice.text
    assert not list(imbalance(["ham"] * 999 + ["spam"] * 100))
    assert not list(imbalance(["ham"] * 1000 + ["spam"] * 100, sampling_weights=(1, 2)))
    assert not list(imbalance(["ham"] * 1000 + ["spam"] * 100, class_weights=(1, 2)))
    (notice,) = imbalance(["ham", "spam"], (1, 2), (1, 2))
    assert "both" in notice.text


def test_a_run_that_draws_by_label_goes_on_to_the_same_bits(capsys, tmp_path):
    """In the middle of an epoch; drawing another way gives another model; the imbalance is warned
    of only where nothing is done."""
    model = tiny_model(tmp_path / "bert")
    kept = [row for i, row in enumerate(rows(80)) if i % 2 == 0 or i % 20 == 1]
    lines = ["text,label", *(f"{text},{label}" for text, label in kept)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_rows(tmp_path / "validation.jsonl", 24)
    given = words(model, tmp_path, tmp_path / "out", "--max_steps", 9, "--save_steps", 4)
    drawn = (*given, "--sampling_weights", "balanced")
    with settings_kept():
        assert "'pos' has 40 training rows, 'neg' 4" in call(capsys, *given).err
        plain = (tmp_path / "out" / "model.safetensors").read_bytes()
        whole = call(capsys, *drawn, "--overwrite_output_dir")
        assert whole.status == 0, whole.err
        assert "imbalanced" not in whole.err
        weights = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert weights != plain
        shutil.rmtree(tmp_path / "out" / "checkpoint-9")  # the one before is of step 8, of 6 + 3
        again = call(capsys, *drawn, "--resume_from_checkpoint", "auto")
        assert again.status == 0, again.err
        assert again.summary["eval_loss"] == whole.summary["eval_loss"]
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
        both = call(capsys, *drawn, "--class_weights", "balanced", "--overwrite_output_dir")
        assert "both set" in both.err
