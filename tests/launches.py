"""What was launched, and how often the compiler would have run: seen in the interpreter too."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from minift.kernels.launch import Launch

DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launched:
    """One launch: what the compiler specialises on, in the words of `minift.kernels.launch`."""

    kernel: str
    types: str
    constexprs: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...] = field(compare=False)
    arguments: dict[str, Any] = field(compare=False, repr=False)
    options: tuple[tuple[str, Any], ...] = ()
    module: str = ""  # of the kernel: two files may give theirs the same name


def specialise(kernel, names: list[str], arguments: dict[str, Any]) -> tuple[str, dict]:
    """The types of the run-time arguments, and the constexprs, as triton's launcher has them."""
    given = getattr(kernel, "kwargs", {})
    params = getattr(kernel, "params", None)
    whole = {x for x in given.get("do_not_specialize") or ()}
    aligned = {x for x in given.get("do_not_specialize_on_alignment") or ()}
    if params is not None:
        whole |= {p.name for p in params if p.do_not_specialize}
        aligned |= {p.name for p in params if p.do_not_specialize_on_alignment}
    whole |= {names[x] for x in whole if isinstance(x, int)}
    aligned |= {names[x] for x in aligned if isinstance(x, int)}
    types, constexprs = [], {}
    for name in names:
        value = arguments[name]
        annotation = str(kernel.fn.__annotations__.get(name, ""))
        if "constexpr" in annotation or value is None:
            constexprs[name] = getattr(value, "value", value)
        elif isinstance(value, torch.Tensor):
            of_16 = name not in whole | aligned and value.data_ptr() % 16 == 0
            types.append(f"*{DTYPES[value.dtype]}" + ":16" * of_16)
        elif isinstance(value, bool):
            types.append("i1")
        elif isinstance(value, int):
            if value == 1 and name not in whole:
                constexprs[name] = 1
                continue
            wide = not -(2**31) <= value < 2**31
            of_16 = name not in whole | aligned and value % 16 == 0
            types.append(("i64" if wide else "i32") + ":16" * of_16)
        else:
            assert isinstance(value, float), f"{name}: {type(value)}"
            types.append("fp32")
    return " ".join(types), constexprs


def describe(kernel, args: tuple, grid, kwargs: dict[str, Any]) -> Launched:
    names = list(inspect.signature(kernel.fn).parameters)
    options = {k: v for k, v in kwargs.items() if k not in names}
    parameters = {k: v for k, v in kwargs.items() if k in names}
    bound = inspect.signature(kernel.fn).bind(*args, **parameters)
    bound.apply_defaults()
    types, constexprs = specialise(kernel, names, bound.arguments)
    grid = grid(dict(bound.arguments)) if callable(grid) else grid
    return Launched(
        kernel.fn.__name__,
        types,
        tuple(sorted(constexprs.items())),
        tuple(grid),
        dict(bound.arguments),
        tuple(sorted(options.items())),
        kernel.fn.__module__,
    )


@contextmanager
def recorded(run: bool = True) -> Iterator[list[Launched]]:
    """Every launch in the block, in order. With `run=False` nothing is executed: a plan."""
    launches = []

    def replacement(original):
        def record(self, *args, grid, warmup, **kwargs):
            launches.append(describe(self, args, grid, kwargs))
            return original(self, *args, grid=grid, warmup=warmup, **kwargs) if run else None

        return record

    with pytest.MonkeyPatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", replacement(kind.run))
        yield launches


def compilations(launches: list[Launched]) -> int:
    """How many binaries these launches need: one for each kernel and specialisation."""
    return len(set(launches))


def launches_are_declared(seen: list[Launched], module: ModuleType) -> set[str]:
    """What `bench.codegen` compiles is what was launched here: kernel, types, constexprs, options.

    Args:
        seen: launches at shapes that `module` declares; those of other modules are passed over.
        module: a kernel file, with its LAUNCHES.

    Returns:
        The names of the launches that were seen, to compare with those of LAUNCHES.
    """
    declared = {key(launch): launch.name for launch in module.LAUNCHES}
    ours = [launch for launch in seen if launch.module == module.__name__]
    assert ours, f"nothing of {module.__name__} was launched"
    for launch in ours:
        if key(launch) not in declared:
            near = [str(k[1:]) for k in declared if k[0] == launch.kernel]
            others = "\n  ".join(["none of this kernel", *near][bool(near) :])
            raise AssertionError(f"{key(launch)} is not declared; there are:\n  {others}")
    return {declared[key(launch)] for launch in ours}


def key(launch: Launched | Launch) -> tuple:
    """What decides which code runs, of a launch that was seen or declared."""
    if isinstance(launch, Launched):
        return launch.kernel, launch.types, launch.constexprs, launch.options
    constexprs = {name: getattr(v, "value", v) for name, v in launch.constexprs.items()}
    pairs = (tuple(sorted(values.items())) for values in (constexprs, launch.options))
    return launch.kernel.fn.__name__, launch.types, *pairs


# Views, memory without content, and bookkeeping: nothing of it reaches a device.
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "slice", "select", "split_with_sizes", "split"),
    *("detach", "alias", "expand", "unsqueeze", "as_strided", "empty", "new_empty", "empty_like"),
    *("permute", "unbind", "_reshape_alias", "new_empty_strided", "empty_strided"),
}


class Operations(TorchDispatchMode):
    """The operations of torch in a block, by name, in order; and the largest result of each."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names.append(name)
        if isinstance(result, torch.Tensor):
            self.largest[name] = max(self.largest.get(name, 0), result.numel())
        return result

    @property
    def products(self) -> int:
        """How many are products of matrices."""
        return sum(name in ("mm", "addmm", "bmm", "matmul") for name in self.names)

    @property
    def ran(self) -> list[str]:
        """Those that reach the device."""
        return [name for name in self.names if name not in FREE]
