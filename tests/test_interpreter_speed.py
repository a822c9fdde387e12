"""interpreter_speed.py: what is described once is what was described every time."""

import itertools

import interpreter_speed
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.semantic import IncompatibleTypeErrorImpl, TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or triton.__version__ != interpreter_speed.TRIED,
    reason="the interpreter is as it is shipped",
)
core = tl.core
POINTER = tl.pointer_type(tl.bfloat16)
SHAPES = [[16], [core.constexpr(4), 2], core.tuple([1, 8]), core.tuple([core.constexpr(1)])]


def seen(value):
    """All there is of a type or tensor: tuples and constexprs have an equality of their own."""
    if isinstance(value, core.tuple):
        return "tuple", [seen(v) for v in value.values], seen(value.type)
    if isinstance(value, core.constexpr):
        return "constexpr", type(value.value), value.value, seen(value.type)
    if isinstance(value, core.block_type | core.tensor | core.tuple_type | core.constexpr_type):
        return type(value), {name: seen(v) for name, v in vars(value).items() if name != "handle"}
    return [seen(v) for v in value] if isinstance(value, list) else value


def both(cls, *args):
    """What a class makes now, and what it made."""
    now, before = cls(*args), object.__new__(cls)
    cls.__init__.__wrapped__(before, *args)
    return now, before


@pytest.mark.parametrize("element", [tl.float32, tl.int1, POINTER], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_types_and_tensors(shape, element):
    """The same twice: of a shape that is new and of one that is known."""
    for _ in range(2):
        now, before = both(core.block_type, element, shape)
        assert seen(now) == seen(before)
        assert (now, str(now)) == (before, str(before))
        assert seen(core.tensor(None, now)) == seen(both(core.tensor, None, before)[1])
    assert seen(core.tensor(None, element)) == seen(both(core.tensor, None, element)[1])


@pytest.mark.parametrize("shape", [[], [3], [2.0], [core.constexpr(2.0)], (2,), [1 << 21]], ids=str)
def test_no_other_shape_is_taken(shape):
    """For the reason that it was refused for, known shapes or not."""
    core.block_type(tl.float32, [2])
    with pytest.raises((TypeError, ValueError, AssertionError)) as before:
        core.block_type.__init__.__wrapped__(object.__new__(core.block_type), tl.float32, shape)
    with pytest.raises(before.type) as now:
        core.block_type(tl.float32, shape)
    assert str(now.value) == str(before.value)


def test_what_stands_for_a_constant():
    now, one, two = core._unwrap_if_constexpr, core.constexpr(1), core.constexpr(None)
    plain = [3, 0.5, True, "x", None, tl.float32, POINTER, tensor(4)]
    for value in (*plain, core.constexpr(core.constexpr(tl.int8)), [one, 2], (one, two),
                  core.tuple([one, two])):  # fmt: skip
        assert seen(now(value)) == seen(now.__wrapped__(value))


def tensor(*shape, dtype=tl.float32):
    data = np.ones(shape or 1, interpreter._get_np_dtype(dtype))
    return core.tensor(
        TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype
    )


def assert_the_same(name, *args, **options):
    """A method gives, or raises, what it did."""
    method, results = getattr(TritonSemantic, name), []
    for function in (method, method.__wrapped__):
        try:
            pair = function(interpreter.interpreter_semantic, *args, **options)
            results.append([(seen(x), x.handle.data.tolist()) for x in pair])
        except (ValueError, TypeError, IncompatibleTypeErrorImpl) as error:
            results.append(str(error))
    assert results[0] == results[1]
    return results[0]


SIZES = [(), (1,), (4,), (8,), (4, 1), (1, 8), (4, 8)]


def fit(a, b):
    try:
        return bool(np.broadcast_shapes(a, b)) or True
    except ValueError:
        return False


@pytest.mark.parametrize("pair", [*itertools.product(SIZES, SIZES)], ids=str)
def test_broadcasts(pair):
    found = assert_the_same("broadcast_impl_value", *(tensor(*shape) for shape in pair))
    assert isinstance(found, str) == (not fit(*pair))


DTYPES = [tl.int1, tl.int32, tl.uint32, tl.int64, tl.bfloat16, tl.float16, tl.float32, tl.float64]


@pytest.mark.parametrize(
    "options", [[], [True, True], [True, True, False], [False, False, True, True]], ids=str
)
def test_operands(options):
    """Of every two types, of one shape and of two; of numbers, and of pointers."""
    name = "binary_op_type_checking_impl"
    for a, b in itertools.product([*DTYPES, POINTER], repeat=2):
        for shape in ((4,), (), (2, 4)):
            assert_the_same(name, tensor(4, dtype=a), tensor(*shape, dtype=b), *options)
        for number in (2, -1, 0.5, True):
            assert_the_same(name, tensor(4, dtype=a), number, *options)


def test_numpy_types():
    every = [tl.int1, tl.bfloat16, tl.float8e5, tl.uint64, tl.float64, POINTER]
    for dtype in [*every, *(tl.block_type(t, [2]) for t in every)]:
        for _ in range(2):
            now = interpreter._get_np_dtype(dtype)
            assert now == interpreter._get_np_dtype.__wrapped__(dtype)
