"""What must be settled before any test is imported."""

import os

import torch
from hypothesis import settings

# Without a GPU, kernels run in Triton's interpreter, chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter_bf16
    import interpreter_speed

    interpreter_bf16.install()
    interpreter_speed.install()

# The same examples in every run: a red test is red for everyone.
settings.register_profile("minift", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("minift")
