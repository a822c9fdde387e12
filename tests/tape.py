"""What a CUDA graph does, without a GPU: a step is recorded, nothing of it runs, and a replay runs
all of it again on the same memory, with the Python numbers of the recording."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from launches import describe
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

# On a GPU these wait for their result, which in a capture is an error.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique_dim", "_unique2"}
MAKES = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


def scalars(value: Any) -> Any:
    """An argument as a graph bakes it in: numbers as they are, of tensors their shape."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(scalars, value))
    return value


class Tape(TorchDispatchMode):
    """In place of `CudaGraphs`. Operations of torch that make a new tensor
    run while they are recorded, to have it; those that write to one do not, and kernels neither."""

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.plan: list[tuple] = []  # of what was recorded last: names, grids, numbers, shapes
        self._calls: list[Callable[[], object]] = []

    def launch(self, run: Callable[[], None]) -> None:
        run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Records, and returns the replay."""
        self.plan, self._calls = plan, calls = [], []
        launch = InterpretedFunction.run

        def record(kernel, *args, grid, warmup, **kwargs):
            seen = describe(kernel, args, grid, kwargs)
            numbers = tuple((name, scalars(x)) for name, x in seen.arguments.items())
            plan.append((seen.module, seen.kernel, seen.grid, seen.options, numbers))
            calls.append(lambda: launch(kernel, *args, grid=grid, warmup=warmup, **kwargs))

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(InterpretedFunction, "run", record)
            patch.setattr("minift.kernels.adamw.is_capturing", lambda device: True)
            run()

        @torch.no_grad()
        def replay():
            for call in calls:
                call()

        return replay

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device: not in a capture")
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        written = [
            given[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write
        ]
        if written:
            self._record(name, args, kwargs, lambda: function(*args, **kwargs))
            return dict(enumerate(written)).get(0) if schema.returns else None
        result = function(*args, **kwargs)
        views = any(r.alias_info for r in schema.returns)
        if name not in MAKES and not views and function.namespace != "profiler":
            if not isinstance(result, torch.Tensor | tuple | list):  # a fact, such as a dtype
                return result
            flat = [result] if isinstance(result, torch.Tensor) else list(result)

            def again():
                new = function(*args, **kwargs)
                new = [new] if isinstance(new, torch.Tensor) else new
                for old, x in zip(flat, new, strict=True):
                    if old is not None:
                        old.copy_(x)

            self._record(name, args, kwargs, again)
        return result

    def _record(self, name, args, kwargs, call):
        self.plan.append((name, scalars(args), tuple((k, scalars(v)) for k, v in kwargs.items())))
        self._calls.append(call)
