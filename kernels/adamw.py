"""AdamW: decoupled weight decay, bias-corrected moments.

Math        Step k = 1, 2, ... of a parameter w with gradient g (already clipped):
                w <- w * (1 - lr * decay)
                m <- b1 * m + (1 - b1) * g,   v <- b2 * v + (1 - b2) * g^2
                w <- w - lr * (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

Traffic     fp32 parameters: read w, g, m, v and write w, m, v: 28 bytes a parameter.
Source      Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2; Kingma & Ba 2014,
            arXiv:1412.6980. The original BERT code leaves out the bias correction; we do not.
"""

from torch import Tensor


def adamw_ref(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, k: int, lr: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: (w, m, v) after step k; nothing is changed in place."""
    b1, b2 = betas
    w = w * (1 - lr * weight_decay)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return w - lr * (m / (1 - b1**k)) / ((v / (1 - b2**k)).sqrt() + eps), m, v
