"""minift.layers: random weights are a function of the seed, and a product has its input's dtype."""

import pytest
import torch
import torch.nn.functional as F

from minift.layers import MLP, Attention, Embedding, LayerNorm, Linear, init_weights, linear, matmul


def test_making_a_layer_draws_nothing():
    """torch's own layers move the global generator when they are made."""
    before = torch.get_rng_state()
    Linear(4, 4), Embedding(4, 4), LayerNorm(4, 1e-5), Attention(4, 1e-5), MLP(4, 8, 1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes():
    """As a file's: rows of a weight are outputs, q, k and v one after the other."""
    attention, mlp = Attention(6, 1e-5), MLP(6, 10, 1e-4)
    shapes = {name: tuple(p.shape) for name, p in [*attention.named_parameters()]}
    assert shapes == {
        **{"qkv.weight": (18, 6), "qkv.bias": (18,), "out.weight": (6, 6), "out.bias": (6,)},
        **{"norm.weight": (6,), "norm.bias": (6,)},
    }
    assert tuple(mlp.up.weight.shape) == (10, 6)
    assert tuple(mlp.down.weight.shape) == (6, 10)
    assert (attention.norm.eps, mlp.norm.eps) == (1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_dtype_of_their_input(dtype):
    """Masters stay fp32, and `matmul` leaves the bias to the operation that follows."""
    layer = Linear(8, 5)
    init_weights(layer, 0.5, seed=0)
    with torch.no_grad():
        layer.bias.fill_(3)
    x = torch.ones(2, 8, dtype=dtype)
    weight = layer.weight.to(dtype)
    assert torch.equal(linear(x, layer), F.linear(x, weight, layer.bias.to(dtype)))
    assert torch.equal(matmul(x, layer), F.linear(x, weight))
    assert layer.weight.dtype == torch.float32
    linear(x, layer).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def init(seed: int, std: float = 0.02) -> torch.nn.ModuleDict:
    model = torch.nn.ModuleDict({"a": Linear(200, 300), "b": Embedding(50, 200), "c": MLP(9, 9, 1)})
    for p in model.parameters():
        torch.nn.init.constant_(p, 9)  # whatever storage held
    init_weights(model, std, seed)
    return model


def test_init_weights_is_berts():
    """Normal matrices of the wanted width, zero biases, unit norms; no layer is left out."""
    model = init(0)
    for weight in (model["a"].weight, model["b"].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(weight.mean().item()) < 0.02 * 5 / weight.numel() ** 0.5
    assert model["a"].bias.eq(0).all()
    assert model["c"].up.bias.eq(0).all()
    assert model["c"].norm.weight.eq(1).all()
    assert model["c"].norm.bias.eq(0).all()


def test_init_weights_is_a_function_of_the_seed():
    """And of nothing else: two runs with one seed start alike whatever ran before."""
    first = init(3)
    torch.rand(7)
    before = torch.get_rng_state()
    again, other = init(3), init(4)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first["a"].weight, other["a"].weight)
    assert not torch.equal(first["c"].up.weight, first["c"].down.weight)
