"""minift.step_weights: laid out weights multiply as plain ones, and the model keeps its own."""

import pytest
import torch
import torch.nn.functional as F
from test_generate import MADE, pair, prompts_of

from minift import step_weights
from minift.decoder import make_weights
from minift.generate import generate
from minift.layers import Linear
from minift.sampling import GenerateConfig
from minift.step_weights import Packed, RowWeights, can_pack, lay_out

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_laid_out_weight_multiplies_as_a_plain_one(dtype, rows):
    """For other numbers of rows too, with a bias and without."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((48, 33), (48,)))
    laid_out = lay_out(weight, rows)
    if rows > 1 and can_pack(dtype):
        assert isinstance(laid_out, Packed)
        with pytest.raises(TypeError, match=r"torch\.neg"):
            torch.neg(laid_out)
    for n in (1, 5, 16):
        x = torch.randn(n, 33, generator=generator).to(dtype)
        for b in (None, bias):
            want = F.linear(x.double(), weight.double(), None if b is None else b.double())
            got = F.linear(x, laid_out.to(dtype), b)
            assert got.dtype == dtype
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_the_model_keeps_its_parameters(dtype):
    """Other weights stand in it in a block alone, also when something goes wrong there."""

    def look():
        assert layer._parameters["weight"] is not before["gpt.layers.0.mlp.up.weight"]
        raise KeyError

    _, model = pair(0)
    weights, before = make_weights(model, dtype, 4), dict(model.named_parameters())
    layer = model.gpt.layers[0].mlp.up
    for block in (weights.standing, weights.stepping):
        with pytest.raises(KeyError), block():
            look()
        assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_weight_with_a_bias_adds_it(dtype):
    """Once; and a bias that is given in its place."""
    generator = torch.Generator().manual_seed(0)
    weight, own, given, x = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((48, 33), (48,), (48,), (7, 33))
    )
    if not can_pack(dtype):
        pytest.skip("oneDNN does not lay out this dtype here")
    for bias, added in ((None, own), (given, given)):
        want = F.linear(x.double(), weight.double(), added.double())
        error = (F.linear(x, Packed(weight, 7, own), bias).double() - want).abs().max()
        assert error < 4 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_weights_of_rows_have_their_biases_inside(monkeypatch, dtype, packs):
    """Of every product whose weight is laid out; norms and tables stay, and all comes back."""
    if not packs:
        monkeypatch.setattr(step_weights, "can_pack", lambda dtype: False)
    _, model = pair(0)
    packs, before = packs and can_pack(dtype), dict(model.named_parameters())
    with RowWeights(model, dtype).standing():
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                assert isinstance(layer.weight, Packed) == packs, name
                assert (layer.bias is None) or not packs, name
            elif "weight" in layer._parameters:
                assert layer.weight is before[f"{name}.weight"]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("packs", [True, False])
def test_answers_do_not_change(monkeypatch, packs):
    """Weights that are made before, for one row or several, or where oneDNN is not there."""
    _, model = pair(1)
    prompts, config = prompts_of(1), GenerateConfig(max_new_tokens=MADE)
    want = generate(model, prompts, config)
    if not packs:
        monkeypatch.setattr(step_weights, "can_pack", lambda dtype: False)
    for rows in (1, 6):
        weights = make_weights(model, torch.float32, rows)
        assert generate(model, prompts, config, weights=weights) == want
    with pytest.raises(ValueError, match=r"expected weights in torch\.bfloat16, got"):
        generate(model, prompts, config, weights=weights, dtype=torch.bfloat16)
