"""minift/explain.py: attention weights, beside transformers'."""

import pytest
import torch
from accuracy import DEVICE
from tiny import tiny_model
from transformers import BertModel

from minift import Example, attention_probs, load_model
from minift.batch import collate
from minift.ops import TORCH, TRITON

TEXTS = ([2, 60, 61, 62, 3], [2, 70, 3], [2, 80, 81, 82, 83, 84, 85, 3])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(transformers' encoder, our classifier, a batch): two layers of two heads."""
    folder = tiny_model(tmp_path_factory.mktemp("explain") / "model")
    peer = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    model, _ = load_model(folder, labels=("a", "b"))
    examples = [Example(ids, [0] * len(ids), 0) for ids in TEXTS]
    return peer, model.to(DEVICE), collate(examples, [0, 1, 2]).to(DEVICE)


@pytest.mark.parametrize("ops", [None, TORCH, TRITON], ids=["default", "torch", "triton"])
def test_equals_transformers(models, ops):
    """Every layer, head and pair of tokens; whoever computes the rest of the model."""
    peer, model, batch = models
    seen = attention_probs(model, batch, ops=ops)
    assert list(seen) == [0, 1]
    for n, row in enumerate(batch.rows):
        with torch.no_grad():
            expected = peer(torch.tensor([TEXTS[row]]), output_attentions=True).attentions
        for layer, probs in seen.items():
            assert probs[n].dtype == torch.float32
            torch.testing.assert_close(probs[n].cpu(), expected[layer][0], rtol=1e-4, atol=1e-5)


def test_chosen_layers_and_heads(models):
    """In the order asked for; only what was asked for is kept."""
    _, model, batch = models
    every, some = attention_probs(model, batch), attention_probs(model, batch, [1], [1, 0])
    assert list(some) == [1]
    for a, b in zip(some[1], every[1], strict=True):
        assert torch.equal(a, b[[1, 0]])


def test_empty_sequences_of_a_training_batch_are_left_out(models):
    _, model, batch = models
    examples = [Example(TEXTS[row], [0] * len(TEXTS[row]), 0) for row in range(3)]
    filled = collate(examples, [0, 1, 2], train=True, sequences=5).to(batch.tokens.device)
    for layer, probs in attention_probs(model, filled).items():
        for a, b in zip(probs, attention_probs(model, batch)[layer], strict=True):
            assert torch.equal(a, b)


def test_looking_changes_nothing(models):
    """The logits are those of a model that nobody watches; no gradient is kept."""
    _, model, batch = models
    before = model(batch)
    seen = attention_probs(model, batch)
    assert not any(p.requires_grad for probs in seen.values() for p in probs)
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layers": [2]}, r"expected layers in 0 to 1, got \[2\]"),
        ({"layers": [-1]}, r"expected layers in 0 to 1, got \[-1\]"),
        ({"heads": [0, 5]}, r"expected heads in 0 to 1, got \[0, 5\]"),
    ],
)
def test_what_is_not_there_is_named(models, chosen, message):
    with pytest.raises(ValueError, match=message):
        attention_probs(*models[1:], **chosen)
