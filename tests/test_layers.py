"""minift.layers: random weights are a function of the seed, a product has its input's dtype, and
16-bit leaves stand where the model's weights do."""

import pytest
import torch
import torch.nn.functional as F
from launches import Operations
from torch import nn

from minift.layers import (
    MLP,
    Attention,
    Embedding,
    LayerNorm,
    Linear,
    Projection,
    Shadows,
    init_weights,
    linear,
    matmul,
)

BF16 = torch.bfloat16


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


class Tied(nn.Module):
    """A table that is also the last projection, and two Linears that share their parameters."""

    def __init__(self):
        super().__init__()
        self.word, self.head = Embedding(7, 4), Projection(4, 7)
        self.first, self.second = Linear(4, 4), Linear(4, 4)
        self.head.weight = self.word.weight
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        init_weights(self, 1.0, seed=0)

    def forward(self, ids):
        x = F.embedding(ids, self.word.weight).to(BF16)
        return matmul(linear(linear(x, self.first), self.second), self.head)


def test_shadows_of_shared_parameters():
    """One leaf, whose gradient is the sum over the layers that hold it; a table stays fp32."""
    ids, model, plain = torch.tensor([1, 5, 5]), Tied(), Tied()
    shadows = Shadows(model, BF16)
    assert shadows.leaves.keys() == {"first.weight", "first.bias"}
    with shadows.standing():
        logits, expected = model(ids), plain(ids)
    assert torch.equal(logits, expected)
    up = torch.linspace(-1, 2, logits.numel()).view_as(logits).to(BF16)
    logits.backward(up), expected.backward(up)
    assert torch.equal(model.word.weight.grad, plain.word.weight.grad)
    for name, leaf in shadows.leaves.items():
        torch.testing.assert_close(
            leaf.grad.float(), plain.get_parameter(name).grad, rtol=2**-7, atol=2**-7
        )
        assert model.get_parameter(name).grad is None


def test_a_model_that_raises_has_its_own_weights_again():
    model = Tied()
    before = dict(model.named_parameters())
    shadows = Shadows(model, BF16)

    def run():
        with shadows.standing():
            assert model.first.weight is shadows.leaves["first.weight"]
            model(torch.tensor([7]))

    with pytest.raises(IndexError):
        run()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p for name, p in before.items())


def test_leaves_are_cast_when_a_master_was_written_to_and_not_again():
    model = Tied()
    shadows = Shadows(model, BF16)
    with torch.no_grad():
        model.first.bias.add_(1)
    casts = []
    for _ in range(2):
        with Operations() as seen:
            shadows.refresh()
        casts.append(seen.names.count("_foreach_copy_"))
    assert casts == [1, 0]
    assert torch.equal(shadows.leaves["first.bias"], model.first.bias.to(BF16))
