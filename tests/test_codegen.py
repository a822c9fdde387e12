"""bench/codegen.py: every kernel is declared, compiles for four GPUs and keeps the budget.

Nothing is compiled in this process: where the interpreter runs, the compiler does not.
"""

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import bench_package
import pytest
import triton
import triton.language as tl

import minift.kernels
from bench import codegen
from minift.kernels.launch import Launch

ROOT = bench_package.ROOT
OTHERS = [arch for arch in codegen.SHARED if arch not in codegen.BUDGETED]
MODULES = [
    importlib.import_module(f"minift.kernels.{found.name}")
    for found in pkgutil.iter_modules(minift.kernels.__path__)
]
LAUNCHES = {launch.name: launch for launch in codegen.find_launches("minift.kernels")}
KEYS = [
    *("kernel", "arch", "registers", "spill_bytes", "shared_bytes", "tensor_core_ops"),
    *("wide_accesses", "narrow_accesses", "ok", "why"),
]
WORD = r"(?:\*(?:bf16|fp\d\d|[iu]\d+)|i32|i64)(?::16)?|fp32|i1"


def run(*args: object, path: Path | None = None) -> tuple[int, list[dict], str]:
    """Exit status, rows and stderr of `python -m bench.codegen --json`.

    Args:
        path: a folder in which packages of kernels are found.
    """
    env = os.environ | {"PYTHONPATH": f"{path or ''}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "error::Warning:bench.codegen", "-m", "bench.codegen"]
    done = subprocess.run(
        [*command, "--json", *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


# ------------------------------------------------------------------------ declarations


def undeclared(module: ModuleType) -> set[str]:
    """Kernels of a module that its LAUNCHES lack, by name: what ends in _kernel and is jitted."""
    jitted = (value for value in vars(module).values() if isinstance(value, triton.KernelInterface))
    kernels = {value.fn.__name__ for value in jitted if value.fn.__module__ == module.__name__}
    declared = {launch.kernel.fn.__name__ for launch in getattr(module, "LAUNCHES", ())}
    return {name for name in kernels if name.endswith("_kernel")} - declared


def misnamed(source: str) -> list[str]:
    """What a file launches, as `name[grid](...)`, whose name does not end in _kernel."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    launched = [call.func.value for call in calls if isinstance(call.func, ast.Subscript)]
    return [name for name in map(ast.unparse, launched) if not name.endswith("_kernel")]


def misdeclared(launch: Launch) -> list[str]:
    """What of a declaration no real call could have."""
    parameters = inspect.signature(launch.kernel.fn).parameters.values()
    annotated = {p.name for p in parameters if "constexpr" in str(p.annotation)}
    names, given = [p.name for p in parameters], set(launch.constexprs)
    words = launch.types.split()
    wrong = [f"{name} is not a parameter" for name in sorted(given - set(names))]
    wrong += [f"{name} has no value" for name in sorted(annotated - given)]
    wrong += [
        f"{name} = {launch.constexprs[name]} is no constexpr"
        for name in sorted(given & set(names) - annotated)
        if launch.constexprs[name] is not None and launch.constexprs[name] != 1
    ]
    if len(words) != (count := len(set(names) - given)):
        wrong.append(f"{len(words)} types for {count} arguments")
    wrong += [f"{word} is no type" for word in words if not re.fullmatch(WORD, word)]
    typed = (p for p in parameters if p.annotation is not p.empty and p.name not in annotated)
    wrong += [f"{p.name} is annotated: calls are specialised otherwise" for p in typed]
    if launch.options.get("enable_fp_fusion") is None:
        wrong.append("enable_fp_fusion is not stated: its default changes with triton")
    return wrong


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_kernel_is_declared(module):
    """A kernel that no launch declares would never be compiled here."""
    assert not undeclared(module)
    assert not misnamed(Path(module.__file__).read_text())


def test_names_of_launches_are_unique():
    names = [launch.name for launch in codegen.find_launches("minift.kernels")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", LAUNCHES)
def test_declarations_fit_their_kernels(name):
    """Types and constexprs are exactly the parameters, in words that real calls have."""
    assert not misdeclared(LAUNCHES[name])


@triton.jit
def scale_kernel(x_ptr, scale, n, stride, BLOCK: tl.constexpr, FAST: tl.constexpr):
    pass


@triton.jit
def helper(x, BLOCK: tl.constexpr):
    return x


CONSTEXPRS = {"BLOCK": 64, "FAST": True, "stride": 1}


def declaration(types="*bf16:16 fp32 i32", constexprs=CONSTEXPRS, options=None, kernel=None):
    options = {"enable_fp_fusion": True} if options is None else options
    return Launch("case", kernel or scale_kernel, types, constexprs, options)


def test_an_undeclared_kernel_is_found():
    """Helpers and imported kernels need no declaration of their own."""
    module = ModuleType(scale_kernel.fn.__module__)
    module.scale_kernel, module.helper = scale_kernel, helper
    assert undeclared(module) == {"scale_kernel"}
    module.LAUNCHES = (declaration(),)
    assert not undeclared(module)
    importer = ModuleType("elsewhere")
    importer.scale_kernel = scale_kernel
    assert not undeclared(importer)


def test_a_launch_of_what_is_not_called_a_kernel_is_found():
    source = "a_kernel[(1,)](x)\nmodule.b_kernel[grid](x)\nhelper[(1,)](x)\nf(x)[0](y)\nx[0] = g(1)"
    assert misnamed(source) == ["helper", "f(x)"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"types": "*bf16 fp32 i32 i32:16", "constexprs": {"BLOCK": 64, "FAST": False}}, None),
        ({"types": "*bf16:16 fp32"}, "2 types for 3 arguments"),
        ({"types": "*bf16:16 fp32 i32 i32"}, "4 types for 3 arguments"),
        ({"types": "*bfloat16 fp32 i32"}, "*bfloat16 is no type"),
        ({"types": "*bf16:16 fp32:16 i32"}, "fp32:16 is no type"),
        ({"constexprs": CONSTEXPRS | {"WARPS": 4}}, "WARPS is not a parameter"),
        ({"constexprs": {"BLOCK": 64, "stride": 1}}, "FAST has no value"),
        ({"constexprs": CONSTEXPRS | {"stride": 2}}, "stride = 2 is no constexpr"),
        ({"options": {"num_warps": 4}}, "enable_fp_fusion is not stated"),
    ],
    ids=str,
)
def test_a_declaration_that_does_not_fit_is_found(changed, message):
    found = misdeclared(declaration(**changed))
    assert not found if message is None else any(message in reason for reason in found), found


# -------------------------------------------------------------------------- the table


@pytest.fixture(scope="session")
def compiler():
    """A process that compiles what the tests of this worker ask for, one launch at a time. Each
    worker has its own: none waits for what another compiles."""
    compiler = codegen.Compiler("minift.kernels")
    yield compiler
    compiler.stop()


def compiled(compiler: codegen.Compiler, name: str, arch: str) -> dict:
    return compiler.row(compiler.names.index(name), arch, seconds=120)


@pytest.mark.parametrize("arch", codegen.BUDGETED)
@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_keeps_the_budget(compiler, name, arch):
    row = compiled(compiler, name, arch)
    assert (row["kernel"], row["arch"]) == (name, arch)
    assert row["ok"], row["why"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_compiles_elsewhere(compiler, name, arch):
    row = compiled(compiler, name, arch)
    assert row["ok"], row["why"]


def test_the_table_is_complete(compiler):
    """What can be compiled is what this checkout declares."""
    assert compiler.names == list(LAUNCHES)


# ------------------------------------------------------------------------- the budget

HEADER = """
import triton
import triton.language as tl

from minift.kernels.launch import Launch

FUSED = {"num_warps": 4, "enable_fp_fusion": True}
VECTOR = "*bf16:16 *bf16:16 i32:16"
PRODUCT = "*bf16:16 *bf16:16 *fp32:16 i32:16"
"""
KERNELS = """
@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(0), tl.sum(x, axis=0))


@triton.jit
def fp64_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float64)
    tl.store(y_ptr + i, x * 3.3, mask=i < n)


@triton.jit
def accumulate(a, b, c, PRECISION: tl.constexpr):
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, k, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, j = tl.arange(0, M), tl.arange(0, 16), tl.arange(0, K)
    c = tl.zeros((M, 16), tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + m[:, None] * k + (start + j)[None, :])
        b = tl.load(b_ptr + (start + j)[:, None] * 16 + n[None, :])
        c = accumulate(a, b, c, PRECISION)
    tl.store(c_ptr + m[:, None] * 16 + n[None, :], c)


@triton.jit
def both_kernel(a_ptr, b_ptr, c_ptr, d_ptr):
    m, n = tl.arange(0, 64), tl.arange(0, 16)
    a = tl.load(a_ptr + m[:, None] * 64 + m[None, :])
    tl.store(c_ptr + m[:, None] * 64 + m[None, :], tl.dot(a, a))
    b = tl.load(b_ptr + m[:, None] * 16 + n[None, :])
    t = tl.load(b_ptr + n[:, None] * 16 + n[None, :])
    tl.store(d_ptr + m[:, None] * 16 + n[None, :], tl.dot(b, t, input_precision="ieee"))


@triton.jit
def broken_kernel(x_ptr, n):
    tl.store(x_ptr, n + missing)


def tile(M, K, PRECISION="tf32"):
    return {"M": M, "K": K, "PRECISION": PRECISION}


def declare(label, kernel, types, block, **options):
    return Launch(label, kernel, types, {"BLOCK": block}, FUSED | options)


NARROW = Launch("narrow allowed", copy_kernel, "*bf16 *bf16 i32", {"BLOCK": 512}, FUSED, False)
FP64 = Launch("fp64 allowed", fp64_kernel, "*fp32:16 *fp32:16 i32:16", {"BLOCK": 512}, FUSED,
              fp64=True)
LAUNCHES = (
    declare("wide", copy_kernel, VECTOR, 1024),
    declare("no alignment", copy_kernel, "*bf16 *bf16 i32", 512),
    declare("narrow stores", copy_kernel, "*bf16:16 *bf16 i32:16", 1024),
    declare("a small tile", copy_kernel, VECTOR, 256),
    NARROW,
    declare("a sum each row", sum_kernel, "*bf16:16 *fp32:16 i32:16", 1024),
    declare("spills", copy_kernel, "*fp32:16 *fp32:16 i32:16", 65536),
    declare("fp64", fp64_kernel, "*fp32:16 *fp32:16 i32:16", 512),
    FP64,
    Launch("wgmma", product_kernel, PRODUCT, tile(64, 64), FUSED | {"num_stages": 2}),
    Launch("hmma only", product_kernel, PRODUCT, tile(64, 64), FUSED | {"num_warps": 2}),
    Launch("small dot", product_kernel, PRODUCT, tile(32, 32), FUSED),
    Launch("no tensor cores", product_kernel, PRODUCT.replace("bf16", "fp32"),
           tile(64, 32, "ieee"), FUSED | {"num_stages": 1}),
    Launch("one dot of two", both_kernel, "*bf16:16 *fp32:16 *fp32:16 *fp32:16", {}, FUSED),
    Launch("shared", product_kernel, PRODUCT, tile(128, 128),
           FUSED | {"num_warps": 8, "num_stages": 7}),
    Launch("for nvidia", product_kernel, PRODUCT.replace("bf16", "fp32"), tile(64, 32, None),
           FUSED | {"maxnreg": 64, "default_dot_input_precision": "tf32x3"}),
    Launch("broken", broken_kernel, "*i32 i32", {}, FUSED),
)
"""
NOT_WIDE = r"no 128-bit load: \d+ of 16 bits; no 128-bit store: \d+ of 16 bits"
WRONG = {  # label -> what is said on sm_90
    "wide": "",
    "no alignment": NOT_WIDE,
    "narrow stores": r"no 128-bit store: \d+ of 16 bits",
    "a small tile": r"no 128-bit load: \d+ of 32 bits; no 128-bit store: \d+ of 32 bits",
    "narrow allowed": "",
    "a sum each row": "",
    "spills": r"\d+ bytes of stack a thread",
    "fp64": r"fp64: .*DMUL.*",
    "fp64 allowed": "",
    "wgmma": "",
    "hmma only": "a dot of 64 rows or more without HGMMA",
    "small dot": "",
    "no tensor cores": "a dot of 64 rows or more without HGMMA",
    "one dot of two": "1 dots of 64 rows or more without tensor cores",
    "shared": r"\d{6} bytes of shared memory, of 232448",
    "for nvidia": r"\d+ bytes of stack a thread",  # so its limit was heard
    "broken": r"does not compile: CompilationError: at \d+:\d+: NameError.*missing.*",
}
WRONG_BEFORE = {  # on sm_80, where something else is said
    "hmma only": "",
    "no tensor cores": "a dot of 64 rows or more without HMMA",
    "shared": r"\d{6} bytes of shared memory, of 166912",
}
WRONG_ELSEWHERE = {"for nvidia": ""}  # on gfx942, whose compiler refuses its options
EXPECTED = {"sm_90": WRONG, "sm_80": WRONG_BEFORE, "gfx942": WRONG_ELSEWHERE}
CASES = [(label, arch) for arch, said in EXPECTED.items() for label in said]


def write_package(folder: Path, name: str, kernel: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    (folder / name / "odd.py").write_text(HEADER + kernel)
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The rows of kernels that are each wrong in one way, or in none."""
    folder = write_package(tmp_path_factory.mktemp("odd"), "odd_kernels", KERNELS)
    rows = []
    for arch, said in EXPECTED.items():
        names = [] if said is WRONG else said
        status, found, errors = run("--package", "odd_kernels", *names, "--arch", arch, path=folder)
        assert (status, len(found)) == (any(said.values()), len(said)), errors
        rows += found
    return {(row["kernel"].split(" ", 1)[1], row["arch"]): row for row in rows}


@pytest.mark.parametrize(("label", "arch"), CASES)
def test_what_breaks_the_budget_is_said(odd, label, arch):
    """Each reason alone, and none where the code is good."""
    row = odd[label, arch]
    assert list(row) == KEYS
    expected = EXPECTED[arch][label]
    assert re.fullmatch(expected, "; ".join(row["why"])), row
    assert row["ok"] == (not expected)


def test_numbers_are_those_of_the_code(odd):
    """A tile of 1024 bf16 over 128 threads is one access of 16 bytes each way."""
    rows = {label: row for (label, arch), row in odd.items() if arch == "sm_90"}
    wide, narrow = rows["wide"], rows["no alignment"]
    assert (wide["wide_accesses"], wide["narrow_accesses"]) == (2, 0)
    assert (narrow["wide_accesses"], narrow["narrow_accesses"]) == (0, 8)
    assert (wide["spill_bytes"], wide["shared_bytes"], wide["tensor_core_ops"]) == (0, 0, 0)
    assert 8 <= wide["registers"] <= 40
    assert rows["spills"]["spill_bytes"] > 0
    assert rows["wgmma"]["tensor_core_ops"] == 4  # 64 x 16 x 64 in steps of 16
    assert rows["wgmma"]["shared_bytes"] == 2 * (64 * 64 + 64 * 16) * 2  # two stages
    assert rows["for nvidia"]["registers"] <= 64
    assert rows["broken"]["registers"] is None


@pytest.mark.parametrize(
    ("asm", "amd", "loads", "stores"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; STG.E.64 desc[UR4][R2.64], R4", 0,
         {128: 1}, {64: 1}),
        ("LDG.E.U16 R4 ; LDG.E.S8 R4 ; LDG.E R4 ; @!P0 STG.E.EF.U8 R2", 0,
         {16: 1, 8: 1, 32: 1}, {8: 1}),
        ("LDGSTS.E.BYPASS.128 [R1], [R2] ; UTMALDG.2D [UR8] ; UTMASTG.2D [UR8]", 0,
         {128: 2}, {128: 1}),
        ("LDG.E.ENL2.256 R8 ; LDS.128 R4 ; STL.128 [R1] ; LDL.64 R2 ; LDC.64 R2", 0, {256: 1}, {}),
        ("global_load_dwordx4 v[0:3] buffer_load_ushort v1 flat_load_dword v2", 1,
         {128: 1, 16: 1, 32: 1}, {}),
        ("buffer_store_dwordx2 v[0:1] global_store_byte v0 ds_read_b128 v[0:3]", 1,
         {}, {64: 1, 8: 1}),
    ],
)  # fmt: skip
def test_accesses_are_counted_by_width(asm, amd, loads, stores):
    """Of global memory alone, with every suffix seen in disassemblies."""
    assert codegen.accesses(asm, bool(amd)) == (loads, stores)


@pytest.mark.parametrize(
    ("asm", "fp64"),
    [
        ("DADD R2, R4, R6", True),
        ("MUFU.RCP64H R5, R3", True),
        ("F2F.F64.F32 R2, R0", True),
        ("I2F.F64.U32 R2, R0", True),
        ("F2I.S64.F64.TRUNC R2, R2", True),
        ("DMMA.884 R2, R4, R6, R8", True),
        ("I2F.U64.RP R4, R2 ; MUFU.RCP R4, R4 ; F2F.BF16.F32 R4, R4", False),
        ("LDG.E.64 R2, desc[UR4][R2.64] ; IADD.64 R2, R2 ; DEPBAR.LE SB0, 0x1", False),
    ],
)
def test_fp64_is_told_from_what_is_64_bits_wide(asm, fp64):
    """Conversions and reciprocals of fp64 count; addresses and 64-bit integers do not."""
    assert bool(re.search(codegen.FP64, asm)) == fp64


def dot_ir(*layouts: str) -> str:
    """TTGIR of dots of 64 rows, `wgmma` or with a result of that layout."""
    return "\n".join(
        "%a = ttng.warp_group_dot %x, %y, %z : !ttg.memdesc<64x64xbf16, #shared>"
        " * !ttg.memdesc<64x16xbf16, #shared> -> tensor<64x16xf32, #mma> loc(#loc1)"
        if layout == "wgmma"
        else "%a = tt.dot %x, %y, %z, inputPrecision = tf32 : tensor<64x64xbf16>"
        f" * tensor<64x16xbf16> -> tensor<64x16xf32, #{layout}> loc(#loc1)"
        for layout in layouts
    )


@pytest.mark.parametrize(
    ("arch", "asm", "layouts", "message"),
    [
        ("sm_90", "HGMMA HGMMA", ["wgmma", "wgmma"], []),
        ("sm_90", "HGMMA HMMA", ["wgmma", "mma"], ["1 dots of 64 rows or more are HMMA"]),
        ("sm_90", "HMMA", ["mma"], ["a dot of 64 rows or more without HGMMA"]),
        ("sm_90", "QGMMA", ["wgmma"], []),
        ("sm_80", "HMMA IMMA", ["mma", "mma1"], []),
        ("sm_80", "HMMA", ["mma", "blocked2"],
         ["1 dots of 64 rows or more without tensor cores"]),
        ("sm_80", "FFMA", ["blocked"], ["a dot of 64 rows or more without HMMA"]),
    ],
)  # fmt: skip
def test_each_large_dot_counts(arch, asm, layouts, message):
    """One fast dot does not excuse a slow one beside it."""
    ttir = "%a = tt.dot %x, %y, %z : tensor<64x64xbf16> * tensor<64x16xbf16> -> tensor<64x16xf32>"
    assert codegen.slow_dots(arch, asm, {"ttir": ttir, "ttgir": dot_ir(*layouts)}) == message
    small = {"ttir": ttir.replace("<64x", "<32x"), "ttgir": dot_ir(*layouts)}
    assert codegen.slow_dots(arch, asm, small) == []


@pytest.mark.parametrize(
    ("stored", "asm", "message"),
    [
        ("8x", "LDG.E.128 STG.E", []),  # a result of each of 8 rows
        ("8x64x", "LDG.E.128 STG.E", []),
        ("8x128x", "LDG.E.128 STG.E", ["no 128-bit store: 1 of 32 bits"]),
        ("8x1024x", "LDG.E.128 STG.E STG.E.128", []),  # with a tail
        ("8x1024x", "LDG.E.64 STG.E.128", ["no 128-bit load: 1 of 64 bits"]),
        ("8x1024x", "STG.E.128", []),  # nothing is loaded
    ],
)
def test_results_of_rows_are_no_streams(stored, asm, message):
    """A sixteenth of the largest tile or less may be stored narrowly."""
    loads = "%x = tt.load %p, %m : tensor<8x1024x!tt.ptr<bf16>> loc(#loc)\n"
    loads += "%s = tt.load %q : !tt.ptr<f32> loc(#loc)\n"
    ttir = loads + f"tt.store %p, %v, %m : tensor<{stored}!tt.ptr<f32>> loc(#loc)"
    assert codegen.narrow_streams(asm, {"ttir": ttir}) == message


def test_a_compiler_that_hangs_or_dies_is_said_and_the_rest_goes_on(tmp_path):
    """Each in its place, and the next launch is compiled by another process."""
    body = """
import os, time

@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

class Odd(Launch):
    @property
    def types(self):
        time.sleep(3600) if self.label == "hangs" else os.abort()

hangs, dies = object.__new__(Odd), object.__new__(Odd)
for odd, label in ((hangs, "hangs"), (dies, "dies")):
    for name, value in dict(
        label=label, kernel=copy_kernel, constexprs={}, options={}, before_hopper={}
    ).items():
        object.__setattr__(odd, name, value)
LAUNCHES = (hangs, Launch("good", copy_kernel, VECTOR, {"block": 1}, FUSED), dies)
"""
    folder = write_package(tmp_path, "hanging_kernels", body)
    status, rows, _ = run(
        "--package", "hanging_kernels", "--arch", "gfx942", "--seconds", 3, path=folder
    )
    assert status == 1
    assert all(list(row) == KEYS and not row["ok"] for row in rows)
    assert [row["why"][0].removeprefix("does not compile: ")[:36] for row in rows] == [
        "the compiler took over 3 s",
        "ValueError: zip() argument 2 is shorter"[:36],
        "the compiler died: exit status -6",
    ]
