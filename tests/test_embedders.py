"""The kernels in somebody else's model and loop, with no other part of minift."""

import pytest
import torch
from accuracy import DEVICE, assert_as_accurate

from minift.kernels.adamw import AdamW
from minift.kernels.cross_entropy import cross_entropy, cross_entropy_

transformers = pytest.importorskip("transformers")


def by_torch(logits, target):
    loss = torch.nn.functional.cross_entropy(logits, target)
    loss.backward()
    return loss


def with_autograd(logits, target):
    loss = cross_entropy(logits, target).sum() / (target >= 0).sum()
    loss.backward()
    return loss


def in_place(logits, target):
    scale = 1 / (target >= 0).sum()
    loss = (cross_entropy_(logits.detach(), target, row_scale=scale) * scale).sum()
    logits.backward(logits.detach())
    return loss


def losses(step, make_optimizer, dtype):
    """Of a tiny GPT-2 that learns to continue its one batch; some targets are ignored."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=12, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(DEVICE, dtype).train()
    ids = torch.randint(37, (3, 12), device=DEVICE)
    target = ids[:, 1:].reshape(-1).clone()
    target[::5] = -100
    optimizer = make_optimizer(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)
    found = []
    for _ in range(5):
        logits = model(ids).logits[:, :-1].reshape(-1, 37)
        found.append(step(logits, target).detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found)


@pytest.mark.parametrize("step", [with_autograd, in_place])
def test_they_train_a_model_of_transformers_as_torch_does(step):
    """Loss after loss, no further from fp64 than torch is."""
    exact = losses(by_torch, torch.optim.AdamW, torch.float64)
    same_dtype = losses(by_torch, torch.optim.AdamW, torch.float32)
    actual = losses(step, AdamW, torch.float32)
    assert actual[-1] < 0.9 * actual[0]
    assert_as_accurate(actual, same_dtype, exact, scale=37.0)
