"""Compile every kernel for GPUs that are not here, and hold the code to a budget. Needs no GPU.

    python -m bench.codegen                             every declared launch, every architecture
    python -m bench.codegen adamw --arch sm_90 --json   those whose name holds "adamw"

A launch is what a kernel file declares in LAUNCHES (kernels/launch.py). On sm_80 and sm_90:

    nothing on the stack, neither spills nor arrays
    shared memory within what a block may have
    tensor cores for each dot of 64 rows or more; on sm_90 these are wgmma
    128-bit loads and 128-bit stores in a launch that streams; a tail may be narrower
    no fp64 arithmetic, but where it is declared

On the others it must compile. One line a launch and architecture, or one JSON object with --json;
exit status 1 if one is not ok. Numbers are of the code as written, not of what a run executes.

The compiling is done by other processes (`--serve`): triton chooses between its compiler and its
interpreter when it is imported, and a compiler that hangs or dies must not take the rest along.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Bytes of shared memory that a block may have: triton compiles past it without a word.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
BUDGETED = ("sm_80", "sm_90")
NUMBERS = (
    *("registers", "spill_bytes", "shared_bytes"),
    *("tensor_core_ops", "wide_accesses", "narrow_accesses"),
)

# ------------------------------------------------------------------ what a binary holds

NVIDIA = r"\b(?:(UTMALDG|LDGSTS|LDG)|UTMASTG|STG)\b((?:\.\w+)*)"
AMD = r"\b(?:global|buffer|flat)_(?:(load)|store)_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)"
AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
MATRIX = r"\b(?:[HIQDO]G?MMA|UTC\w*MMA|v_s?mfma\w*)\b"
FP64 = r"\b(?:D(?:FMA|ADD|MUL|SETP|MMA|MNMX)\b|MUFU\.\w*64\w*|[A-Z]\w*(?:\.\w+)*\.F64\b)"


def accesses(asm: str, amd: bool) -> tuple[Counter, Counter]:
    """Global loads and stores by their bits. Asynchronous copies are loads; TMA is wide."""
    loads, stores = Counter(), Counter()
    for match in re.finditer(AMD if amd else NVIDIA, asm):
        if amd:
            bits = AMD_BITS[match[2]]
        else:
            widths = re.findall(r"\.[US]?(8|16|64|128|256)\b", match[2])
            bits = 128 if match[0].startswith("UTMA") else int(widths[0]) if widths else 32
        (loads if match[1] else stores)[bits] += 1
    return loads, stores


def dots(ir: str) -> list[tuple[str, int, str]]:
    """Each dot of TTIR or TTGIR: the operation, its rows, the layout of its result."""
    found = re.findall(r"(tt\.dot|ttng\.warp_group_dot) .*-> tensor<([\dx]+)x\w+(?:, #(\w+))?>", ir)
    return [(name, int(shape.split("x")[-2]), layout) for name, shape, layout in found]


def tiles(ttir: str, operation: str) -> list[int]:
    """Elements of each access through a tensor of pointers or a descriptor; scalars are not."""
    pattern = rf"tt\.(?:descriptor_)?{operation} .*tensor<((?:\d+x)+)"
    return [math.prod(map(int, shape[:-1].split("x"))) for shape in re.findall(pattern, ttir)]


def measure(binary, amd: bool) -> tuple[dict[str, int], str]:
    """The numbers of a compiled kernel, and its assembly."""
    if amd:
        asm = binary.asm["amdgcn"]
        words = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        registers, stack, spilled = (int(re.search(rf"\.{w}: *(\d+)", asm)[1]) for w in words)
        stack = max(stack, 4 * spilled)
    else:
        import triton

        asm = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", binary)
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary)
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        stack = sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))
        stack = stack or 4 * len(re.findall(r"\b(?:LDL|STL)\b", asm))
    both = sum(accesses(asm, amd), Counter())
    wide = sum(n for bits, n in both.items() if bits >= 128)
    matrix = len(re.findall(MATRIX, asm))
    numbers = registers, stack, binary.metadata.shared, matrix, wide, both.total() - wide
    return dict(zip(NUMBERS, numbers, strict=True)), asm


def _tool(tool: str, option: str, binary) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        command = [tool, option, cubin.name]
        return subprocess.check_output(command, text=True, stderr=subprocess.PIPE)


# --------------------------------------------------------------------------- the budget


def over_budget(launch, arch: str, numbers: dict[str, int], asm: str, ir: dict) -> list[str]:
    """What is wrong with the code of a launch for sm_80 or sm_90.

    Args:
        ir: "ttir" and "ttgir" of the kernel.
    """
    why = []
    if numbers["spill_bytes"]:
        why.append(f"{numbers['spill_bytes']} bytes of stack a thread")
    if numbers["shared_bytes"] > SHARED[arch]:
        why.append(f"{numbers['shared_bytes']} bytes of shared memory, of {SHARED[arch]}")
    fp64 = sorted(set(re.findall(FP64, asm)))
    if fp64 and not launch.fp64:
        why.append(f"fp64: {' '.join(fp64)}")
    return why + slow_dots(arch, asm, ir) + (narrow_streams(asm, ir) if launch.streams else [])


def slow_dots(arch: str, asm: str, ir: dict) -> list[str]:
    """Dots of 64 rows or more that miss the tensor cores, or on sm_90 wgmma."""
    if not any(rows >= 64 for _, rows, _ in dots(ir["ttir"])):
        return []
    fast = "HGMMA" if arch == "sm_90" else "HMMA"
    if not re.search(rf"\b[{fast[0]}IQ]{fast[1:]}\b", asm):
        return [f"a dot of 64 rows or more without {fast}"]
    large = [(name, layout) for name, rows, layout in dots(ir["ttgir"]) if rows >= 64]
    plain = sum(layout.startswith("blocked") for _, layout in large)
    older = sum(name == "tt.dot" for name, _ in large) - plain if arch == "sm_90" else 0
    why = [f"{plain} dots of 64 rows or more without tensor cores"] if plain else []
    return why + ([f"{older} dots of 64 rows or more are HMMA"] if older else [])


def narrow_streams(asm: str, ir: dict) -> list[str]:
    """Loads or stores of which none is 128 bits wide.

    A sixteenth of the largest tile or less is a result of each row (a loss, a mean), as a scalar
    is: no stream, and nothing is asked of it.
    """
    sizes = {operation: tiles(ir["ttir"], operation) for operation in ("load", "store")}
    largest = max([*sizes["load"], *sizes["store"]], default=0)
    why = []
    for operation, found in zip(("load", "store"), accesses(asm, amd=False), strict=True):
        streamed = any(size * 16 > largest for size in sizes[operation])
        if streamed and found and max(found) < 128:
            widths = ", ".join(f"{n} of {bits}" for bits, n in sorted(found.items()))
            why.append(f"no 128-bit {operation}: {widths} bits")
    return why


# ------------------------------------------------------------------ the process that compiles


def find_launches(package: str) -> list:
    """The launches that the modules of a package declare, module by module."""
    folder = importlib.import_module(package).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folder))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [launch for module in modules for launch in getattr(module, "LAUNCHES", ())]


def compile_launch(launch, arch: str):
    """The binary of a launch, as triton's launcher would have it made on that GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minift.kernels.launch import without_nvidia

    older = launch.before_hopper if arch == "sm_80" else {}
    given = {name: older.get(name, value) for name, value in launch.constexprs.items()}
    options = launch.options | {name: x for name, x in older.items() if name not in given}
    names = [name for name in launch.kernel.arg_names if name not in given]
    amd, signature, attrs = arch.startswith("gfx"), {}, {}
    for name, word in zip(names, launch.types.split(), strict=True):
        signature[name], _, aligned = word.partition(":")
        said = [["tt.divisibility", 16]] if aligned else []
        if amd and word.startswith("*"):  # a launch says this of every tensor below 2 GB
            said.append(["tt.pointer_range", 32])
        if said:
            attrs[launch.kernel.arg_names.index(name),] = said
    signature |= dict.fromkeys(given, "constexpr")
    source = ASTSource(launch.kernel, signature, given, attrs)
    gpu = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    options = without_nvidia(options) if amd else options
    return triton.compile(source, target=gpu, options=options)


def judge(launch, arch: str) -> dict:
    """The row of a launch: its numbers, and what is wrong with it."""
    try:
        binary = compile_launch(launch, arch)
        numbers, asm = measure(binary, arch.startswith("gfx"))
        why = over_budget(launch, arch, numbers, asm, binary.asm) if arch in BUDGETED else []
    except Exception as error:  # whatever a compiler may raise: the other launches go on
        return failure(launch.name, arch, f"does not compile: {first_line(error)}")
    return {"kernel": launch.name, "arch": arch, **numbers, "ok": not why, "why": why}


def first_line(error: Exception) -> str:
    """Of the message; triton's begins with "at 3:8:" and ends with what is wrong there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    parts = [lines[0], lines[-1]] if re.fullmatch(r"at \d+:\d+:", lines[0]) else [lines[0]]
    return f"{type(error).__name__}: {' '.join(parts)}"


def failure(name: str, arch: str, reason: str) -> dict:
    return {"kernel": name, "arch": arch, **dict.fromkeys(NUMBERS), "ok": False, "why": [reason]}


def serve(package: str) -> None:
    """Say the names of all launches; then, for each "index arch" on stdin, its row."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    warnings.filterwarnings("error", module=re.escape(package))
    launches = find_launches(package)
    print(json.dumps([launch.name for launch in launches]), file=answers, flush=True)
    for line in sys.stdin:
        index, arch = line.split()
        print(json.dumps(judge(launches[int(index)], arch)), file=answers, flush=True)


# --------------------------------------------------------------------------- the command line


class Compiler:
    """A process that compiles one launch after another, and is replaced when it is lost."""

    def __init__(self, package: str):
        self.command = [sys.executable, "-m", "bench.codegen", "--serve", package]
        self.env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        self.env.pop("TRITON_INTERPRET", None)
        self.start()

    def start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.env, process_group=0, **pipes
        )
        if not (names := self.process.stdout.readline()):
            raise SystemExit("bench.codegen: the kernels cannot be imported: see above")
        self.names = json.loads(names)

    def row(self, index: int, arch: str, seconds: float) -> dict:
        if self.process.poll() is not None:
            self.start()
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), self.kill()))
        timer.start()
        print(index, arch, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        timer.cancel()
        if answer:
            return json.loads(answer)
        self.stop()
        died = f"died: exit status {self.process.returncode}"
        reason = f"took over {seconds:g} s" if late.is_set() else died
        return failure(self.names[index], arch, f"does not compile: the compiler {reason}")

    def kill(self) -> None:
        """The assembler that it runs too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        if self.process.poll() is None:
            self.kill()
            self.process.wait()


def compile_all(compilers: list[Compiler], tasks: list[tuple[int, str]], seconds: float):
    """The rows of all tasks, in their order, each as soon as those before it are there."""
    idle = compilers.copy()

    def run(task: tuple[int, str]) -> dict:
        compiler = idle.pop()
        try:
            return compiler.row(*task, seconds)
        finally:
            idle.append(compiler)

    with ThreadPoolExecutor(len(compilers)) as pool:
        yield from pool.map(run, tasks)


def as_text(row: dict, width: int) -> str:
    numbers = "{registers:>3} registers {spill_bytes:>3} spilled {shared_bytes:>6} shared "
    numbers += (
        "{tensor_core_ops:>3} tensor-core {wide_accesses:>3} wide {narrow_accesses:>3} narrow"
    )
    shown = {name: "-" if row[name] is None else row[name] for name in NUMBERS}
    verdict = "ok" if row["ok"] else "; ".join(row["why"])
    return f"{row['kernel']:<{width}} {row['arch']:<6} {numbers.format(**shown)}  {verdict}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.codegen", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a launch's name")
    parser.add_argument("--kernel", action="append", default=[], help="the same")
    parser.add_argument("--arch", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=120, help="that a compilation may take")
    parser.add_argument("--package", default="minift.kernels", help="of the kernel files")
    parser.add_argument("--serve", metavar="PACKAGE", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    first = Compiler(args.package)
    compilers, names, parts = [first], first.names, args.names + args.kernel
    chosen = [i for i, name in enumerate(names) if not parts or any(p in name for p in parts)]
    tasks = list(product(chosen, args.arch))
    width = max((len(names[i]) for i in chosen), default=0)
    try:
        if parts and not chosen:
            parser.error(f"expected part of a launch's name, got {' '.join(parts)}: see {names}")
        compilers += [Compiler(args.package) for _ in range(min(args.jobs, len(tasks)) - 1)]
        rows = []
        for row in compile_all(compilers, tasks, args.seconds):
            rows.append(row)
            print(json.dumps(row) if args.json else as_text(row, width), flush=True)
    finally:
        for compiler in compilers:
            compiler.stop()
    wrong = sum(not row["ok"] for row in rows)
    said = f"{len(chosen)} launches for {' '.join(args.arch)}: {wrong or 'none'} not ok"
    print(said, file=sys.stderr if args.json else sys.stdout)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
