"""minift.gpt against transformers on random weights, to predict tokens and to classify, and what
packing, listing rows and dropout may not change.

transformers gets every sequence alone, or a padded batch. Its gradients reach our parameters
through `hf_names`, and its matrices lie the other way round: a swapped name or a matrix that is not
turned shows as well as a wrong formula.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from minift import Example, load_model
from minift.batch import Batch, collate
from minift.config import ModelConfig
from minift.gpt import ALIGNED, GPTClassifier, GPTLanguageModel
from minift.layers import init_weights
from minift.names import is_transposed
from minift.ops import TORCH, Draw
from minift.weights import hf_names, hf_tensors

IGNORED = -100


def make_config(**changes) -> ModelConfig:
    fields = dict(vocab_size=40, max_len=24, n_types=0, dim=20, n_layer=3, n_head=4, ffn_dim=36)
    fields |= dict(activation="gelu_tanh", norm_eps=1e-5, embedding_dropout=0.3, hidden_dropout=0.1)
    fields |= dict(attention_dropout=0.2, classifier_dropout=0.0, init_std=0.2, family="gpt2")
    return ModelConfig(**fields | {"labels": ("a", "b", "c")} | changes)


def make_model(kind=GPTLanguageModel, **changes):
    """Random weights; biases and norms too, since a zero bias hides its own absence."""
    model = kind(make_config(**changes))
    init_weights(model, 0.2, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def make_examples(lengths: list[int], vocab: int = 40, seed: int = 0, every: int = 1) -> list:
    """Texts whose targets are their own next tokens, of one token in `every`."""
    rng, examples = np.random.default_rng(seed), []
    for n in lengths:
        tokens = rng.integers(0, vocab, n)
        targets = np.append(tokens[1:], IGNORED)
        targets[np.arange(n) % every > 0] = IGNORED
        examples.append(Example(tokens, (), targets))
    return examples


def classified(examples: list, labels: int = 2) -> list:
    return [replace(e, target=i % labels) for i, e in enumerate(examples)]


def together(examples: list[Example]) -> Batch:
    return collate(examples, range(len(examples)))


def loss_of(out, targets: torch.Tensor) -> torch.Tensor:
    """The mean over the targets that there are."""
    scale = torch.tensor(1 / max(1, int((targets != IGNORED).sum())))
    return TORCH.linear_cross_entropy(
        out.x, out.weight, targets, None, scale, out.bias, vocab=out.vocab
    )


def assert_close(got, want, what="", rtol: float = 2e-5, floor: float = 1e-6) -> None:
    """Within `rtol` of the largest value of the tensor, or of `floor` if that is larger."""
    assert got.shape == want.shape, what
    error = (got.detach().double() - want.detach().double()).abs().max().item()
    largest = want.detach().abs().max().item()
    assert error <= rtol * max(largest, floor), f"{what}: off by {error} where {largest} is largest"


# ---------------------------------------------------------------- parity


def random_peer(kind, config: GPT2Config, seed: int):
    """Every number is random and large, so that nothing hides."""
    with torch.random.fork_rng():
        model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            if "ln_" in name and name.endswith("weight"):
                p += 1
    return model


def loaded(peer, **arguments):
    """Our model of a peer's files, and the tensors in them, which ours must save again."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model, report = load_model(folder, **arguments)
        tensors = load_file(Path(folder) / "model.safetensors")
    assert not report.new
    saved = hf_tensors(model)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    return model


def assert_gradients(peer, model) -> None:
    """Every one, and none of rows that stand for no token."""
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    floor = 0.1 * max(g.abs().max().item() for g in gradients.values())  # for what cancels
    for ours, (name,) in hf_names(model.config).items():
        parameter, want = model.get_parameter(ours), gradients.pop(name)
        want = want.T if is_transposed(ours, parameter, model.config) else want
        got = parameter.grad[: len(want)]
        assert_close(got, want, f"gradient of {ours}", floor=floor)
        assert not parameter.grad[len(want) :].any()
    assert not gradients  # the table names all of them


@st.composite
def cases(draw, **settings_of_peer):
    n_head, vocab = draw(st.integers(1, 4)), draw(st.integers(2, 150))
    head_dim = draw(st.integers(-(-5 // n_head), 9))  # a norm over fewer than 5 is ill-conditioned
    max_len = draw(st.integers(2, 30))
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=max_len,
        n_embd=n_head * head_dim,
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_inner=draw(st.sampled_from([None, 7, 40])),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
        **settings_of_peer,
    )
    lengths = [*draw(st.lists(st.integers(1, max_len), max_size=6)), draw(st.integers(2, max_len))]
    return config, lengths, draw(st.integers(0, 1000))


few = settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])


@few
@given(case=cases(), every=st.sampled_from([1, 3]))
def test_random_language_models_equal_transformers(case, every):
    """Any configuration: hidden states, logits, loss and every gradient, whether all tokens have a
    target or few do. And what we save of it is what transformers saved, tensor by tensor."""
    config, lengths, seed = case
    peer = random_peer(GPT2LMHeadModel, config, seed)
    model = loaded(peer, head="lm")
    assert isinstance(model, GPTLanguageModel)
    examples = make_examples(lengths, config.vocab_size, seed, every)
    batch, rows = together(examples), []
    theirs, targets = [], []
    for i in batch.rows:
        out = peer(input_ids=torch.tensor(examples[i].tokens)[None], output_hidden_states=True)
        rows.append(out.hidden_states[-1][0])
        theirs.append(out.logits[0])
        targets.append(torch.tensor(examples[i].target))
    real, wanted = sum(lengths), torch.cat(targets)
    assert_close(model.gpt(batch)[:real], torch.cat(rows), "hidden states")
    got, want = model(batch), torch.cat(theirs)
    if batch.at is not None:
        listed = batch.targets != IGNORED
        assert_close(got.logits()[listed], want[batch.at[listed]], "logits of listed rows")
    else:
        assert_close(got.logits()[:real], want, "logits")
    loss, of_peer = loss_of(got, batch.targets), F.cross_entropy(want, wanted)
    loss.backward()
    of_peer.backward()
    assert_close(loss, of_peer, "loss")
    assert_gradients(peer, model)


@few
@given(case=cases(num_labels=3))
def test_random_classifiers_equal_transformers(case):
    """It reads the last token, wherever that is: texts of different lengths together, where the
    peer pads them and without a padding token knows one text only."""
    config, lengths, seed = case
    config.pad_token_id = config.vocab_size  # of no text
    config.vocab_size += 1
    peer = random_peer(GPT2ForSequenceClassification, config, seed)
    model = loaded(peer)
    assert isinstance(model, GPTClassifier)
    examples = classified(make_examples(lengths, config.vocab_size - 1, seed), 3)
    ids = torch.full((len(lengths), max(lengths)), config.pad_token_id)
    for row, e in zip(ids, examples, strict=True):
        row[: len(e.tokens)] = torch.tensor(e.tokens)
    mask = ids != config.pad_token_id
    labels = torch.tensor([e.target for e in examples])
    theirs = peer(input_ids=ids, attention_mask=mask.long(), labels=labels)
    theirs.loss.backward()
    batch = together(examples)
    logits = model(batch)
    loss = F.cross_entropy(logits, batch.targets)
    loss.backward()
    assert_close(logits, theirs.logits[list(batch.rows)], "logits")
    assert_close(loss, theirs.loss, "loss")
    assert_gradients(peer, model)
    peer.config.pad_token_id = None
    with torch.no_grad():
        alone = peer(input_ids=ids[:1, : lengths[0]]).logits
        assert_close(model(collate(examples, [0])), alone, "one text")


# ---------------------------------------------------------------- packing


def test_what_comes_later_is_not_seen():
    """The first tokens of two texts that differ behind them have the same logits, bit for bit."""
    model, (first,) = make_model(), make_examples([12])
    second = replace(first, tokens=np.append(first.tokens[:7], (first.tokens[7:] + 1) % 40))
    with torch.no_grad():
        a, b = (model(together([e])).logits() for e in (first, second))
    assert torch.equal(a[:7], b[:7])
    assert not torch.equal(a[7], b[7])


def test_neighbours_change_nothing():
    """A sequence alone and in a batch is the same, all of it and its last token."""
    model, examples = make_model(GPTClassifier), classified(make_examples([3, 9, 1, 24, 2]))
    batch = together(examples)
    with torch.no_grad():
        alone = [collate(examples, [i]) for i in batch.rows]
        assert_close(model(batch), torch.cat([model(one) for one in alone]), rtol=1e-5)
        states = [model.gpt(one)[: one.layout.lengths[0]] for one in alone]
        assert_close(model.gpt(batch)[:39], torch.cat(states), rtol=1e-5)


@pytest.mark.parametrize("draw", [None, Draw(torch.tensor(3), torch.tensor(4))])
def test_rows_are_the_full_computation_indexed(draw):
    """The last layer's cut saves work and changes no value, dropout included."""
    model, batch = make_model(), together(make_examples([5, 1, 12]))
    rows = torch.tensor([17, 0, 4, 4, 9])
    dropout = model.gpt.draw(draw, batch, TORCH)
    with torch.no_grad():
        full = model.gpt(batch, dropout=dropout)
        assert_close(model.gpt(batch, dropout=dropout, rows=rows), full[rows], rtol=1e-6)


def test_layers_computed_again_have_the_same_gradients():
    """Checkpointing keeps less and changes no bit, since dropout is keyed."""
    model, batch, grads = make_model(), together(make_examples([5, 1, 12])), []
    for checkpointing in (False, True):
        model.zero_grad()
        draw = Draw(torch.tensor(3), torch.tensor(4))
        out = model(batch, draw=draw, checkpointing=checkpointing)
        loss_of(out, batch.targets).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_token_table_is_padded_with_zeros():
    """Rows up to a multiple of 64 that no logit, gradient or random number belongs to."""
    for vocab in (40, ALIGNED, ALIGNED + 1):
        model = make_model(vocab_size=vocab)
        table = model.gpt.embeddings.word.weight
        assert len(table) % ALIGNED == 0
        assert 0 <= len(table) - vocab < ALIGNED
        assert not table[vocab:].any()
        assert table[:vocab].all(dim=1).all()
        assert model(together(make_examples([5]))).logits().shape[1] == vocab


# ---------------------------------------------------------------- dropout


def test_every_place_has_its_own_mask_and_probability():
    """Two places that share a mask are correlated, and no test of one operation sees it."""
    places = []

    def spied(name, at):
        def operation(*args, **kwargs):
            dropout = kwargs.get("dropout", args[at] if len(args) > at else None)
            if dropout is not None:
                places.append((name, dropout.site, dropout.p))
            return getattr(TORCH, name)(*args, **kwargs)

        return operation

    last = {"embed": 4, "attention": 4, "add_norm": 4}
    ops = replace(TORCH, **{name: spied(name, at) for name, at in last.items()})
    draw = Draw(torch.tensor(7), torch.tensor(0))
    make_model()(together(make_examples([4, 9])), ops=ops, draw=draw)
    want = [("embed", 0, 0.3)]
    for site in (1, 4, 7):
        want += [("attention", site, 0.2), ("add_norm", site + 1, 0.1), ("add_norm", site + 2, 0.1)]
    assert places == want


# ---------------------------------------------------------------- edges


def test_a_sequence_longer_than_the_position_table():
    """24 fit; 25 are an error before any table is read."""
    model = make_model(GPTClassifier)
    assert model(together(classified(make_examples([24, 2])))).shape == (2, 3)
    with pytest.raises(ValueError, match=r"^expected at most 24 tokens, got 25: cut the text$"):
        model(together(classified(make_examples([25, 2]))))
