"""Triton's interpreter in about half of its time. For tests only.

It describes the type of every result anew: the shape of a tensor is a tuple of constexprs, made one
by one, and so are the shape of its type and the type of that shape. Kernels have few shapes: each
is described once here. What is computed, and what is refused, is what it was.
"""

import functools
import math
from types import NoneType

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

TRIED = "3.9.0"  # another version stays as slow as it is
core = tl.core
PLAIN = {int, float, bool, str, NoneType, core.tensor, core.dtype, core.pointer_type}


def install() -> None:
    """Patch the interpreter of this process. Calling it again does nothing."""
    if triton.__version__ != TRIED or hasattr(core, "_described_once"):
        return
    core.tensor.__init__ = tensor_init(core.tensor.__init__)
    core.block_type.__init__ = block_type_init(core.block_type.__init__)
    core._unwrap_if_constexpr = unwrap_if_constexpr(core._unwrap_if_constexpr)
    for name, replace in (
        ("broadcast_impl_value", broadcast),
        ("binary_op_type_checking_impl", operands),
    ):
        setattr(TritonSemantic, name, replace(getattr(TritonSemantic, name)))
    interpreter._get_np_dtype = get_np_dtype(interpreter._get_np_dtype)
    interpreter._patch_attr = patch_attr(interpreter._patch_attr)
    core._described_once = True


@functools.cache
def shape_of(sizes: tuple[int, ...]) -> tuple[core.tuple, core.constexpr]:
    """What a tensor calls its shape, and the number of its elements."""
    return core.tuple([core.constexpr(n) for n in sizes]), core.constexpr(math.prod(sizes))


# Each function below takes what it replaces and returns the replacement.


def tensor_init(original):
    @functools.wraps(original)
    def replacement(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape.values) if type.is_block() else ())

    return replacement


def block_type_init(original):
    @functools.cache
    def shape(sizes):
        made = object.__new__(core.block_type)
        original(made, tl.int32, list(sizes))
        return made.shape, made.numel, str(made.shape)

    @functools.wraps(original)
    def replacement(self, element_ty, sizes):
        plain = tuple([n.value if type(n) is core.constexpr else n for n in sizes])
        known = type(sizes) in (list, core.tuple) and all([type(n) is int for n in plain])
        if not known:  # it says what is wrong
            return original(self, element_ty, sizes)
        self.element_ty = element_ty
        self.shape, self.numel, text = shape(plain)
        self.name = f"<{text}, {element_ty}>"

    return replacement


def unwrap_if_constexpr(original):
    @functools.wraps(original)
    def replacement(value):
        if type(value) in PLAIN:
            return value
        return value.value if type(value) is core.constexpr else original(value)

    return replacement


def broadcast(original):
    """Nothing is to be done for two tensors of one shape."""

    @functools.wraps(original)
    def replacement(self, lhs, rhs):
        a, b = (x.type.shape.values if x.type.is_block() else None for x in (lhs, rhs))
        return (lhs, rhs) if a == b else original(self, lhs, rhs)

    return replacement


def operands(original):
    """Two tensors of one type are computed in it, but for quotients of less than fp32."""

    @functools.wraps(original)
    def replacement(self, lhs, rhs, left=False, right=False, arithmetic=True, div_or_mod=False):
        if not div_or_mod and type(lhs) is type(rhs) is core.tensor:
            dtype = lhs.dtype
            if dtype.name == rhs.dtype.name and not dtype.is_ptr():
                return self.broadcast_impl_value(lhs, rhs)
        return original(self, lhs, rhs, left, right, arithmetic, div_or_mod)

    return replacement


def get_np_dtype(original):
    known = {}

    @functools.wraps(original)
    def replacement(dtype):
        scalar = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        if isinstance(scalar, core.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = original(scalar)
        return known[scalar.name]

    return replacement


def patch_attr(original):
    """The original copies the arguments of every call."""

    @functools.wraps(original)
    def replacement(obj, name, member, builder, scope):
        semantic = interpreter.interpreter_semantic

        def called(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, called)

    return replacement
