"""Texts from models with an adapter, and what their tokens look at: a cache changes nothing."""

import pytest
import torch
from adapted import VOCAB, P, inputs
from test_adapters import adapted

from minift import Example, attention_probs, generate
from minift.adapters import remove_adapter
from minift.batch import collate
from minift.decoder import Decoder, Room
from minift.layers import body_of
from minift.ops import TORCH
from minift.sampling import GenerateConfig

METHODS = ("lora", "prompt", "prefix")
methods = pytest.mark.parametrize("method", METHODS)
PROMPTS = [[7, 8, 9, 4], [5], [3, 3], [11], [20, 21, 22, 23, 24, 25, 26]]


@torch.no_grad()
def full_forward(model, tokens: list[int]) -> torch.Tensor:
    """(V,) scores of the next token, of the whole text at once."""
    batch = collate([Example(tokens, (), [-100] * (len(tokens) - 1) + [1])], [0])
    return model(batch, TORCH).logits()[0]


def logs(model, tokens: list[int]) -> torch.Tensor:
    return torch.log_softmax(full_forward(model, tokens), -1)


@methods
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_greedy_answers_are_those_of_whole_texts(method, slots):
    """Token by token, prompts of one token too, with fewer slots than prompts; virtual tokens are
    read with a prompt and stay in its slot."""
    model, config = (
        adapted(method, "gpt2", "lm"),
        GenerateConfig(max_new_tokens=9, batch_size=slots),
    )
    found = generate(model, PROMPTS, config)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        text = list(prompt)
        for token in answer:
            assert token == full_forward(model, text).argmax()
            text.append(int(token))
        assert len(answer) == 9
    remove_adapter(model)
    assert [list(a) for a in generate(model, PROMPTS, config)] != [list(a) for a in found]


def best_of_beams(model, prompt: list[int], beams: int, steps: int) -> list[int]:
    """Beam search over whole texts, without an end: the best sums of logarithms."""
    open_ = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for score, tokens in open_:
            scores = logs(model, prompt + tokens)
            top = scores.topk(beams)
            longer += [(score + v.item(), [*tokens, i.item()]) for v, i in zip(*top, strict=True)]
        open_ = sorted(longer, reverse=True)[:beams]
    return open_[0][1]


@methods
def test_beams_are_those_of_whole_texts(method):
    model = adapted(method, "gpt2", "lm")
    config = GenerateConfig(max_new_tokens=6, num_beams=3)
    found = generate(model, PROMPTS, config)
    wanted = [best_of_beams(model, prompt, 3, 6) for prompt in PROMPTS]
    assert [list(map(int, answer)) for answer in found] == wanted


@methods
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_logits_of_a_step_are_those_of_a_full_forward(method, dtype, rtol):
    """To rounding, of each slot; weights are laid out for steps, LoRA's too."""
    model, seen = adapted(method, "gpt2", "lm"), []

    def choose(decoder, logits):
        seen.append(logits.float().clone())
        decoder.tokens[: len(logits)] = torch.tensor([5, 6, 7, 8, 9])
        decoder.lengths[: len(logits)] += 1

    decoder = Decoder(model, Room(5, 12), choose, dtype)
    decoder.read([torch.tensor(p).numpy() for p in PROMPTS], range(5))
    decoder.step(5)
    decoder.step(5)
    for i, prompt in enumerate(PROMPTS):
        for j, text in enumerate((prompt, [*prompt, 5 + i])):
            wanted = full_forward(model, text)
            error = (seen[j][i] - wanted).abs().max()
            assert error <= rtol * wanted.abs().max(), (i, j)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_answers_end_where_the_positions_beside_virtual_tokens_end(method):
    model = adapted(method, "gpt2", "lm")
    (answer,) = generate(model, [[5, 6]], GenerateConfig(max_new_tokens=99))
    assert len(answer) == 32 - P - 2


@pytest.mark.parametrize("slots", [1, 2])
def test_drawn_answers_depend_on_no_slot(slots):
    """With virtual tokens as without: by seed and number alone."""
    model = adapted("prefix", "gpt2", "lm")
    config = GenerateConfig(max_new_tokens=6, temperature=1.0, seed=3)
    wanted = [list(a) for a in generate(model, PROMPTS, config)]
    config = GenerateConfig(max_new_tokens=6, temperature=1.0, seed=3, batch_size=slots)
    assert [list(a) for a in generate(model, PROMPTS, config)] == wanted
    assert all(0 <= token < VOCAB for answer in wanted for token in answer)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_probabilities_of_attention_have_a_column_for_each_virtual_token(method, family):
    """Rows sum to 1; a prompt's tokens look, too, a prefix is only looked at. The first P columns
    are theirs: no causal mask hides them."""
    model = adapted(method, family)
    given = inputs()
    batch = collate(given, range(len(given)))
    found = attention_probs(model, batch)
    assert found.keys() == {0, 1}
    rows, columns = {"lora": (0, 0), "prompt": (P, P), "prefix": (0, P)}[method]
    for layer in found.values():
        for probs, n in zip(layer, batch.layout.lengths, strict=True):
            assert probs.shape == (2, n + rows, n + columns)
            torch.testing.assert_close(probs.sum(-1), torch.ones(2, n + rows))
            assert (probs[:, rows:, :columns] > 0).all()
            if family == "gpt2":
                assert not probs[:, rows:, columns:].triu(1).any()
    if method == "prefix":  # of the first layer, by hand
        keys = body_of(model).prefix(torch.float32)[0][:, :2]  # (P, H, D)
        alone = attention_probs(model, collate(given[1:2], [0]))[0][0]
        assert alone.shape == (2, 1, 1 + P)
        assert keys.shape == (P, 2, 8)
        assert len(set(alone[0, 0, :P].tolist())) == P
