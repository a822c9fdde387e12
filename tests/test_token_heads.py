"""Heads that label tokens, or find a span of them, against transformers, of every family, on
random weights.

transformers gets every sequence alone, ours are packed; only some rows are asked for, so our last
layer computes those alone, and every gradient must be the same all the same.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForTokenClassification,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForTokenClassification,
)

from minift import Example, load_model, save_model
from minift.batch import collate
from minift.names import is_transposed
from minift.ops import IGNORE_INDEX, TORCH
from minift.tasks.qa import SHIFT, QuestionAnswering
from minift.tasks.tagging import Tagging
from minift.weights import hf_names, hf_tensors

KINDS = {  # configuration, a head for labels, one for spans
    "bert": (BertConfig, BertForTokenClassification, BertForQuestionAnswering),
    "roberta": (RobertaConfig, RobertaForTokenClassification, RobertaForQuestionAnswering),
    "distilbert": (
        *(DistilBertConfig, DistilBertForTokenClassification),
        DistilBertForQuestionAnswering,
    ),
    "gpt2": (GPT2Config, GPT2ForTokenClassification, GPT2ForQuestionAnswering),
}


@st.composite
def cases(draw):
    """A peer's configuration, lengths of sequences, which rows have a target, and a seed."""
    family, n_head = draw(st.sampled_from(list(KINDS))), draw(st.integers(1, 3))
    dim, most, wide = n_head * draw(st.integers(5, 8)), draw(st.integers(4, 20)), 24
    depth, labels = draw(st.integers(1, 2)), draw(st.integers(2, 7))
    sizes = {
        "distilbert": dict(dim=dim, n_heads=n_head, n_layers=depth, hidden_dim=wide),
        "gpt2": dict(n_embd=dim, n_head=n_head, n_layer=depth, n_inner=wide, bos_token_id=0,
                     eos_token_id=0),
    }.get(family, dict(hidden_size=dim, num_attention_heads=n_head, num_hidden_layers=depth,
                       intermediate_size=wide))  # fmt: skip
    room = {"gpt2": "n_positions"}.get(family, "max_position_embeddings")
    sizes |= {room: most + 2 * (family == "roberta"), "vocab_size": 40, "num_labels": labels}
    lengths = draw(st.lists(st.integers(1, most), min_size=1, max_size=5))
    share = draw(st.sampled_from([0.3, 0.7, 1.0]))
    return family, KINDS[family][0](**sizes), lengths, share, draw(st.integers(0, 1000))


def random_peer(kind: type, config, seed: int):
    """Every number is random and large, so that nothing hides."""
    with torch.random.fork_rng():
        peer = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            if ("ln_" in name or "norm" in name.lower()) and name.endswith("weight"):
                p += 1
    return peer


def random_examples(lengths, share, labels, seed):
    rng, examples = np.random.default_rng(seed), []
    for n in lengths:
        target = np.where(rng.random(n) < share, rng.integers(0, labels, n), IGNORE_INDEX)
        target[0] = 0
        examples.append(Example(rng.integers(2, 40, n), (), target))
    return examples


def assert_close(got, want, what, rtol=2e-5, floor=1e-6):
    """Within `rtol` of the largest value of the tensor, or of `floor` if that is larger."""
    assert got.shape == want.shape, what
    error = (got.detach() - want.detach()).abs().max().item()
    assert error <= rtol * max(want.detach().abs().max().item(), floor), f"{what}: off by {error}"


def assert_gradients(peer, model):
    """Every one: ours may be several of theirs, one below the other."""
    theirs = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None}
    floor = 0.1 * max(g.abs().max().item() for g in theirs.values())  # for what cancels
    for ours, names in hf_names(model.config).items():
        parameter = model.get_parameter(ours)
        want = torch.cat([theirs.pop(name) for name in names])
        want = want.T if is_transposed(ours, parameter, model.config) else want
        assert_close(parameter.grad[: len(want)], want, f"gradient of {ours}", floor=floor)
    assert not theirs


def loaded(peer, head: str):
    """Our model of it. Files go both ways: what we save is what transformers saved, tensor by
    tensor, and it loads it without a tensor missing."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model, report = load_model(folder)
    assert not report.new
    assert model.config.head == head
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        again, found = type(peer).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    saved, theirs = hf_tensors(model), peer.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in saved.items())
    assert all(torch.equal(theirs[name], x) for name, x in again.state_dict().items())
    return model


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases())
def test_random_taggers_equal_transformers(case):
    """Logits of the listed rows, the loss and every gradient; and files both ways."""
    family, config, lengths, share, seed = case
    peer = random_peer(KINDS[family][1], config, seed)
    model = loaded(peer, "tokens")
    examples = random_examples(lengths, share, config.num_labels, seed)
    batch = collate(examples, range(len(examples)))
    task = Tagging(model.config.labels)
    logits = model(batch)
    loss = task.loss(logits, batch, TORCH) / task.weight(batch)
    outs = [peer(input_ids=torch.tensor(examples[i].tokens)[None]).logits[0] for i in batch.rows]
    want = torch.cat(outs)
    targets = torch.cat([torch.tensor(examples[i].target) for i in batch.rows])
    listed = targets != IGNORE_INDEX
    assert_close(logits[batch.targets != IGNORE_INDEX], want[listed], "logits")
    of_peer = F.cross_entropy(want, targets)
    loss.backward()
    of_peer.backward()
    assert_close(loss, of_peer, "loss")
    assert_gradients(peer, model)


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases())
def test_random_finders_of_spans_equal_transformers(case):
    """Logits of begin and end of all rows, transformers' own loss and every gradient; and files
    both ways."""
    family, config, lengths, _, seed = case
    config.num_labels = 2
    peer = random_peer(KINDS[family][2], config, seed)
    if family == "distilbert":
        peer.dropout.p = 0.0
    model, rng = loaded(peer, "span"), np.random.default_rng(seed)
    spans = [sorted(rng.integers(0, n, 2).tolist()) for n in lengths]
    examples = [
        Example(rng.integers(2, 40, n), (), begin << SHIFT | end)
        for n, (begin, end) in zip(lengths, spans, strict=True)
    ]
    batch = collate(examples, range(len(examples)))
    task = QuestionAnswering()
    logits = model(batch)
    loss = task.loss(logits, batch, TORCH) / task.weight(batch)
    outs = [
        peer(
            input_ids=torch.tensor(examples[i].tokens)[None],
            start_positions=torch.tensor([spans[i][0]]),
            end_positions=torch.tensor([spans[i][1]]),
        )
        for i in batch.rows
    ]
    want = torch.cat([torch.stack([o.start_logits[0], o.end_logits[0]], -1) for o in outs])
    assert_close(logits[: len(want)], want, "logits")
    of_peer = torch.stack([o.loss for o in outs]).mean()
    loss.backward()
    of_peer.backward()
    assert_close(loss, of_peer, "loss")
    assert_gradients(peer, model)


@pytest.mark.parametrize("family", list(KINDS))
def test_names_of_tags_are_kept_in_files(family, tmp_path):
    """transformers reads the tags' names of what we save, and we those of what it saves."""
    config = KINDS[family][0](
        **(dict(dim=8, n_heads=1, n_layers=1, hidden_dim=8) if family == "distilbert" else
           dict(n_embd=8, n_head=1, n_layer=1, bos_token_id=0, eos_token_id=0) if family == "gpt2"
           else dict(hidden_size=8, num_attention_heads=1, num_hidden_layers=1,
                     intermediate_size=8)),
        vocab_size=20, id2label={0: "O", 1: "B-x", 2: "I-x"}, label2id={"O": 0, "B-x": 1, "I-x": 2},
    )  # fmt: skip
    KINDS[family][1](config).save_pretrained(tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs")
    assert model.config.labels == ("O", "B-x", "I-x")
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours")
    again = KINDS[family][1].from_pretrained(tmp_path / "ours")
    assert again.config.id2label == {0: "O", 1: "B-x", 2: "I-x"}
