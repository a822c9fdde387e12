"""How the tests decide that an operation is accurate enough."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_as_accurate(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, scale: float, factor: float = 2.0
) -> None:
    """`actual` may be at most `factor` times as far from the truth as plain torch is.

    Judging against torch in the same dtype replaces hand-tuned tolerances: bf16 is allowed
    exactly as much error as bf16 costs anyone. One ulp at `scale` is always allowed.

    Args:
        actual: what the operation under test returned.
        same_dtype: the `*_ref` function on the same low-precision inputs.
        exact: the `*_ref` function on the same inputs in float64.
        scale: size of the terms that were summed. An exact result can be 0 (dq of a sequence of
            length 1) where fp32 honestly leaves 5e-7, so the result's own size will not do.
    """
    assert actual.shape == same_dtype.shape == exact.shape
    if not actual.numel():
        return
    ulp = torch.finfo(actual.dtype).eps * scale
    error = (actual.double() - exact).abs().max().item()
    allowed = factor * (same_dtype.double() - exact).abs().max().item() + ulp
    assert error <= allowed, f"max error {error:.2e} > {allowed:.2e} = {factor} x torch + 1 ulp"
