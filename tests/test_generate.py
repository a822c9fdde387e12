"""minift.generate: token for token what transformers generates, what a full forward pass for every
token would, and the same for a prompt whoever is beside it.

The models have random weights, large ones: their answers go in many directions, and no two tokens
are equally probable.
"""

import functools
import importlib
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import Tape
from tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minift import InputError, load_model
from minift.batch import Example, collate
from minift.config import ModelConfig
from minift.decoder import Decoder, Room
from minift.generate import generate, stream
from minift.gpt import GPTLanguageModel
from minift.layers import init_weights
from minift.ops import TORCH, TRITON
from minift.sampling import (
    GenerateConfig,
    Sampling,
    draw,
    keep_top_k,
    keep_top_p,
    penalise,
    uniforms,
)

VOCAB, POSITIONS = 60, 48
LENGTHS = 1, 5, 2, 17, 9, 1
MADE = 10  # new tokens


@functools.cache
def pair(seed: int):
    """transformers' GPT-2 and ours with the same random weights."""
    sizes = dict(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(seed)
    ends = dict(bos_token_id=0, eos_token_id=0)
    peer = GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.4)).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model, _ = load_model(Path(folder), head="lm")
    return peer, model


def prompts_of(seed: int, lengths=LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def by_transformers(peer, prompt: list[int], **options) -> list[int]:
    ids = torch.tensor([prompt])
    given = dict(attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False)
    return peer.generate(ids, **given, max_new_tokens=MADE, **options)[0, len(prompt) :].tolist()


def full_forward(model, tokens: list[int]) -> torch.Tensor:
    """(1, V) logits of the last token, from all of them at once."""
    batch = collate([Example(tokens, (), -100)], [0])
    with torch.no_grad():
        return model(batch).logits()[len(tokens) - 1 : len(tokens)]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_answers_are_those_of_transformers(seed, penalty):
    """Prompts of different lengths in one call, each alone in theirs; one answer ends early."""
    peer, model = pair(seed)
    prompts = prompts_of(seed)
    config = GenerateConfig(max_new_tokens=MADE, repetition_penalty=penalty, batch_size=4)
    eos = generate(model, prompts, config)[3][4]
    options = dict(eos_token_id=eos, repetition_penalty=penalty)
    want = [by_transformers(peer, prompt, **options) for prompt in prompts]
    assert generate(model, prompts, config, eos=eos) == want
    assert {len(answer) < MADE for answer in want} == {True, False}


@pytest.mark.parametrize(
    ("beams", "length_penalty", "penalty"),
    [(2, 1.0, 1.0), (3, 2.0, 1.0), (4, -0.5, 1.2), (5, 1.0, 1.0), (5, 0.0, 1.3)],
)
@pytest.mark.parametrize("seed", [3, 4])
def test_beams_are_those_of_transformers(seed, beams, length_penalty, penalty):
    """The answer of each prompt, with searches that end, leave and let others in."""
    peer, model = pair(seed)
    prompts = prompts_of(seed)[:5]
    config = GenerateConfig(
        max_new_tokens=MADE,
        num_beams=beams,
        length_penalty=length_penalty,
        repetition_penalty=penalty,
        batch_size=2 * beams,
    )
    eos = generate(model, prompts, config)[3][4]
    options = dict(num_beams=beams, length_penalty=length_penalty, repetition_penalty=penalty)
    want = [by_transformers(peer, prompt, eos_token_id=eos, **options) for prompt in prompts]
    assert generate(model, prompts, config, eos=eos) == want


def test_beams_end_early_and_late():
    """What the test above compares has answers of both kinds."""
    lengths = set()
    for seed in (3, 4):
        _, model = pair(seed)
        prompts, config = prompts_of(seed)[:5], GenerateConfig(max_new_tokens=MADE, num_beams=3)
        eos = generate(model, prompts, config)[3][4]
        lengths |= {len(answer) for answer in generate(model, prompts, config, eos=eos)}
    assert max(lengths) == MADE > min(lengths)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_cache_changes_nothing(temperature):
    """A full forward pass for every token, and the same filters and numbers: the same answers."""
    _, model = pair(0)
    prompts = prompts_of(7)
    config = GenerateConfig(
        max_new_tokens=MADE, temperature=temperature, top_k=20, top_p=0.9, repetition_penalty=1.1
    )
    want = []
    for number, prompt in enumerate(prompts):
        tokens, numbers = list(prompt), uniforms(config.seed, number, MADE)
        for made in range(MADE):
            seen = torch.zeros(1, VOCAB, dtype=torch.bool)
            seen[0, tokens] = True
            scores = penalise(full_forward(model, tokens), seen, 1.1)
            if temperature:
                scores = keep_top_p(keep_top_k(scores / temperature, 20), 0.9)
                token = draw(scores, torch.tensor(numbers[made : made + 1]))
            else:
                token = scores.argmax(-1)
            tokens.append(int(token))
        want.append(tokens[len(prompt) :])
    assert generate(model, prompts, config) == want


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_logits_of_a_step_are_those_of_a_full_forward(dtype, rtol):
    """Prompts of different lengths, an empty slot between them, three steps."""
    _, model = pair(1)
    prompts, seen = prompts_of(5, (4, 1, 11)), []

    def choose(decoder, logits):
        seen.append(logits.float())
        decoder.tokens.copy_(torch.tensor([3, 0, 4, 5]) + len(seen))
        decoder.lengths += (decoder.lengths >= 0).int()

    decoder = Decoder(model, Room(4, 16), choose, dtype)
    decoder.read([np.array(prompt) for prompt in prompts], [0, 2, 3])
    for _ in range(3):
        decoder.step(4)
    for slot, prompt in zip((0, 2, 3), prompts, strict=True):
        for k in range(3):
            tokens = [*prompt, *(int([3, 0, 4, 5][slot]) + i for i in range(1, k + 1))]
            want = full_forward(model, tokens)[0]
            error = (seen[k][slot] - want).abs().max() / want.abs().max()
            assert error < rtol, (slot, k)
    assert decoder.lengths.tolist() == [6, -1, 3, 13]
    assert seen[0].isfinite().all()


# ---------------------------------------------------------------- filters and draws

SCORES = st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8), min_size=1, max_size=3
).map(torch.tensor)


@settings(max_examples=150, deadline=None)
@given(SCORES, st.integers(1, 12), st.floats(0.01, 0.999), st.floats(0.5, 2), st.randoms())
def test_filters_are_those_of_transformers(scores, k, p, penalty, random):
    """Any scores, with ties; every row has seen other tokens."""
    ids = torch.tensor([[random.randrange(8) for _ in range(5)] for _ in scores])
    seen = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, ids, True)
    peers = (
        (RepetitionPenaltyLogitsProcessor(penalty), penalise(scores, seen, penalty)),
        (TopKLogitsWarper(k), keep_top_k(scores, k)),
        (TopPLogitsWarper(p), keep_top_p(scores, p)),
    )
    for peer, ours in peers:
        assert torch.equal(peer(ids, scores.clone()), ours)


def test_draws_have_the_probabilities():
    """Over an even grid of numbers each token comes as often as its probability says, and one that
    cannot be drawn never; not at the ends either."""
    scores = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf, -3.0, -torch.inf]])
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens = draw(scores.expand(len(grid), -1), grid)
    share = tokens.bincount(minlength=7) / len(grid)
    torch.testing.assert_close(share, scores.softmax(-1)[0], atol=1e-4, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(scores.expand(2, -1), ends).tolist() == [0, 5]


def test_random_numbers_are_a_function_of_seed_and_prompt():
    """A longer request begins with a shorter one; other prompts and seeds have other numbers."""
    numbers = uniforms(1, 2, 50)
    assert np.array_equal(numbers, uniforms(1, 2, 99)[:50])
    assert len(np.unique([uniforms(s, n, 50) for s in (0, 1) for n in range(3)])) == 300
    assert numbers.dtype == np.float64
    assert ((numbers >= 0) & (numbers < 1)).all()


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"num_beams": 3}]
)
def test_an_answer_depends_on_its_prompt_alone(given):
    """Alone, among others, in another order, with fewer slots: the same tokens."""
    _, model = pair(2)
    prompts, config = prompts_of(2), GenerateConfig(max_new_tokens=MADE, seed=5, **given)
    answers = generate(model, prompts, config)
    for number, prompt in enumerate(prompts):
        assert generate(model, [prompt], config, numbers=[number]) == [answers[number]]
    few = GenerateConfig(max_new_tokens=MADE, seed=5, batch_size=4, **given)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = generate(model, [prompts[i] for i in order], few, numbers=order)
    assert shuffled == [answers[i] for i in order]


def test_seed_and_number_change_a_draw():
    _, model = pair(2)
    prompts = [[1, 2, 3]] * 3
    first, other = (GenerateConfig(temperature=1.0, seed=seed) for seed in (0, 1))
    answers = generate(model, prompts, first)
    assert len({*map(tuple, answers)}) == 3
    assert answers == generate(model, prompts, first)
    assert answers != generate(model, prompts, other)


# ---------------------------------------------------------------- the loop


def test_a_token_comes_with_its_prompt_and_its_end():
    """Tokens of an answer come in order; its last one says why it is: the end token, the length, a
    caller who has enough, the last position."""
    _, model = pair(0)
    prompts = [*prompts_of(0), [1] * (POSITIONS - 3)]
    config = GenerateConfig(max_new_tokens=MADE)
    free = generate(model, prompts, config)
    eos, enough = free[3][4], free[1][2]
    tokens, ends = [[] for _ in prompts], [[] for _ in prompts]
    for new in stream(model, prompts, config, eos, stopped=lambda i, token: token == enough):
        tokens[new.prompt].append(new.token)
        ends[new.prompt].append(new.end)
    assert all(not any(of[:-1]) for of in ends)
    for i, answer in enumerate(tokens):
        assert answer == free[i][: len(answer)]
        last = ends[i][-1]
        if last in ("eos", "stop"):
            assert answer[-1] == {"eos": eos, "stop": enough}[last]
        assert {eos, enough} & {*answer[:-1]} == set()
        assert (last == "length") == (len(answer) == MADE and answer[-1] not in (eos, enough))
    assert {of[-1] for of in ends} == {"eos", "stop", "length", "positions"}
    assert (len(tokens[6]), ends[6][-1]) == (3, "positions")


def test_a_caller_may_cut_the_answer_of_beams():
    """At a token in its middle: what comes after it is not handed out."""
    _, model = pair(0)
    prompts, config = prompts_of(0), GenerateConfig(max_new_tokens=MADE, num_beams=2)
    free = generate(model, prompts, config)
    cut = generate(model, prompts, config, stopped=lambda i, token: token == free[i][3])
    assert cut == [answer[: answer.index(answer[3]) + 1] for answer in free]


@pytest.mark.parametrize("beams", [1, 2])
def test_many_prompts_take_the_memory_of_few(monkeypatch, beams):
    """No step has more slots and no cache more tokens than allowed, prompts are read in parts, and
    slots do not wait: the steps are as few as they can be, but for the last ones."""
    _, model = pair(0)
    steps, sizes, read = [], [], []
    step, made, reads = Decoder.step, Decoder.__init__, Decoder.read

    def sized(self, *given):
        made(self, *given)
        sizes.append(self.memory.shape)

    monkeypatch.setattr(Decoder, "__init__", sized)
    monkeypatch.setattr(Decoder, "step", lambda self, n: (steps.append(n), step(self, n))[1])
    monkeypatch.setattr(
        Decoder, "read", lambda self, p, s: (read.append(sum(map(len, p))), reads(self, p, s))[1]
    )
    monkeypatch.setattr(importlib.import_module("minift.generate"), "READ", 16)
    prompts = prompts_of(9, [1 + i % 9 for i in range(120)])
    config = GenerateConfig(max_new_tokens=8, batch_size=32, cache_tokens=100, num_beams=beams)
    answers = generate(model, prompts, config, eos=7)
    assert all(answers)
    (size,) = sizes
    assert size[2] == max(steps) == 6  # of 16 tokens each: at most 9 are read, 7 are written
    assert size[4] == 16
    assert size[2] * size[4] <= 100
    assert max(read) <= 16
    if beams == 1:
        assert sum(steps) == sum(map(len, answers))  # no slot is ever empty
        assert len(steps) <= sum(map(len, answers)) / 6 + 8
    rest = GenerateConfig(max_new_tokens=8, num_beams=beams)
    assert answers[:10] == generate(model, prompts[:10], rest, eos=7)


def test_one_long_prompt_fits_any_cache():
    """There is room for one sequence at least, and for its beams."""
    _, model = pair(0)
    for beams in (1, 3):
        config = GenerateConfig(max_new_tokens=3, cache_tokens=1, batch_size=1, num_beams=beams)
        wide = GenerateConfig(max_new_tokens=3, num_beams=beams)
        prompts = prompts_of(1, (30, 2))
        assert generate(model, prompts, config) == generate(model, prompts, wide)


def test_nothing_outside_is_changed():
    """No gradients are kept, none are turned off where the caller looks, and torch's generator
    stays; a caller who leaves early leaves the weights as they were, in bf16 too."""
    _, model = pair(0)
    before, generator = dict(model.named_parameters()), torch.get_rng_state()
    config = GenerateConfig(temperature=1.0)
    for _ in stream(model, prompts_of(0), config, dtype=torch.bfloat16):
        assert torch.is_grad_enabled()
        break
    assert all(p is before[name] and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted")
@pytest.mark.parametrize("given", [{"temperature": 0.9, "top_k": 5}, {"num_beams": 2}])
def test_captured_steps_have_the_bits_of_launched_ones(monkeypatch, given):
    """With the kernels, a tape in place of a graph: a replay reads all that changes from its place.
    Two prompts leave after two tokens, and the graph for the others has an empty slot."""
    raw = dict(model_type="gpt2", vocab_size=VOCAB, n_positions=8, n_embd=16, n_layer=1, n_head=1)
    model = GPTLanguageModel(replace(ModelConfig.from_hf(raw), head="lm"))
    init_weights(model, 0.5, seed=0)
    prompts = prompts_of(3, (3, 6, 1, 6, 4))
    config = GenerateConfig(max_new_tokens=4, repetition_penalty=1.2, **given)
    launched = generate(model, prompts, config, ops=TRITON)
    tapes = []

    def tape(device):
        tapes.append(Tape(device))
        return tapes[-1]

    monkeypatch.setattr("minift.decoder.CudaGraphs", tape)
    monkeypatch.setattr(Decoder, "_can_capture", lambda self: self.ops.captured)
    assert generate(model, prompts, config, ops=TRITON) == launched
    assert len(tapes) == 1
    assert tapes[0].plan  # steps were recorded
    assert generate(model, prompts, config, ops=TORCH) == launched


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("given", [{}, {"temperature": 0.9}, {"num_beams": 3}])
def test_on_a_gpu_graphs_change_nothing(monkeypatch, given):
    """Captured steps make the tokens of launched ones, and those of a CPU."""
    _, model = pair(0)
    prompts, config = prompts_of(3), GenerateConfig(max_new_tokens=MADE, **given)
    want = generate(model, prompts, config)
    model.cuda()
    try:
        captured = generate(model, prompts, config)
        monkeypatch.setattr(Decoder, "_can_capture", lambda self: False)
        assert captured == generate(model, prompts, config) == want
    finally:
        model.cpu()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 2: expected tokens, got none"),
        ([[1] * POSITIONS], f"prompt 1: expected at most {POSITIONS - 1} tokens, .* got 48"),
        ([[1], [2, VOCAB]], f"prompt 2: expected ids in 0 to {VOCAB - 1}, got {VOCAB}"),
        ([[1, -1]], f"prompt 1: expected ids in 0 to {VOCAB - 1}, got -1"),
        ([[0.5]], "prompt 1: expected a list of token ids, got float64"),
        ([[[1, 2]]], "prompt 1: expected a list of token ids"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_is_made(prompts, message):
    _, model = pair(0)
    with pytest.raises(InputError, match=message):
        stream(model, prompts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "expected max_new_tokens between 1"),
        ({"temperature": -1.0}, "expected temperature between 0"),
        ({"temperature": float("nan")}, "expected temperature between 0"),
        ({"top_p": 1.5}, "expected top_p between 0 and 1, got 1.5"),
        ({"num_beams": 2, "temperature": 0.5}, "expected temperature 0 with num_beams 2, got 0.5"),
        ({"num_beams": 2, "stop": ("a",)}, "expected num_beams 1 with stop"),
        ({"stop": ("a", "")}, "expected stop as texts that are not empty"),
        ({"stop": "a"}, "expected stop as texts"),
    ],
)
def test_a_bad_configuration_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        GenerateConfig(**given)


def test_what_a_model_cannot_do_is_refused():
    _, model = pair(0)
    with pytest.raises(InputError, match="expected a tokenizer for stop strings"):
        stream(model, [[1]], GenerateConfig(stop=("a",)))
    with pytest.raises(InputError, match=f"expected num_beams of at most half of {VOCAB}"):
        stream(model, [[1]], GenerateConfig(num_beams=VOCAB))
    assert generate(model, []) == []


def test_a_model_of_another_kind_is_refused(tmp_path):
    encoder, _ = load_model(tiny_model(tmp_path / "bert"), labels=("a", "b"))
    with pytest.raises(InputError, match="expected a GPT-2 that predicts tokens, got a bert"):
        stream(encoder, [[1]])


def test_numbers_past_the_last_are_not_read():
    """A slot that is empty, or goes on in a step that nobody asked for, reads what is there."""
    search = Sampling(GenerateConfig(temperature=1.0), 2, 4, 3, torch.device("cpu"))
    search.made[:] = 99
    assert search.uniform.shape == (2, 3)

    class Slots:
        tokens, lengths = torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 5])

    search.choose(Slots, torch.zeros(2, 4))
    assert Slots.lengths.tolist() == [-1, 6]
