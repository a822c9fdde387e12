"""Change one thing at a time in a source file: its tests must notice.

    python tests/mutate.py kernels/cross_entropy.py tests/test_cross_entropy.py --sample 40

Mutants are made of the functions of the file, jitted ones and the rest, but not of definitions
(`*_ref`) and checks of input (`check_*`). Each is tried in a copy, never in the working tree. One
that the tests let pass is printed, and the exit status is 1. Where a change makes no difference,
allow it: a line `function: before -> after` in tests/mutants_allowed.txt, under a comment with #
that says why.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("minift", "kernels", "bench", "tests", "README.md", "pyproject.toml")
PAIRS = [(ast.Add, ast.Sub), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq),
         (ast.And, ast.Or), (ast.BitAnd, ast.BitOr)]  # fmt: skip
SWAPPED = dict(PAIRS) | {b: a for a, b in PAIRS}
SWAPPED |= {ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


def replaced(node: ast.AST, **fields) -> ast.AST:
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node, each a little wrong."""
    match node:
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in SWAPPED:
            yield replaced(node, op=SWAPPED[type(node.op)]())
            if isinstance(node, ast.BinOp):
                yield node.left  # a term or factor is dropped
        case ast.Compare(ops=[first, *rest]) if type(first) in SWAPPED:
            yield replaced(node, ops=[SWAPPED[type(first)](), *rest])
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield ast.Constant(node.value * 1.01 or 0.01)
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, yes, no]):
            yield replaced(node, args=[condition, no, yes])
        case ast.Call() if any(keyword.arg == "mask" for keyword in node.keywords):
            kept = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
            yield replaced(node, keywords=kept)


def nodes(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """What runs, and the function that it stands in."""
    inside = ast.iter_child_nodes(tree)
    if isinstance(tree, ast.FunctionDef):
        function, inside = tree.name, tree.body
    words = isinstance(tree, ast.JoinedStr | ast.Raise | ast.Assert)
    if not words and not function.endswith("_ref") and not function.startswith("check_"):
        for child in inside:
            yield function, child
            yield from nodes(child, function)


def mutants(source: str) -> dict[str, str]:
    """Of a file: "function: before -> after", and the whole source with that change."""
    lines, found = source.encode().splitlines(keepends=True), {}
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    for function, node in nodes(ast.parse(source)):
        for changed in changes(node) if function else ():
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = ast.unparse(changed)
            text = f"({after})" if isinstance(node, ast.expr) else after
            name = f"{function}: {ast.unparse(node)} -> {after}"
            while name in found:
                name += " (again)"
            whole = source.encode()
            found[name] = (whole[:start] + text.encode() + whole[end:]).decode()
    return found


def passes(folder: Path, tests: list[str], seconds: float) -> bool:
    """Whether the tests of a copy pass, in time. A crash is a failure."""
    env = os.environ | {"PYTHONPATH": str(folder / "path"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=env, timeout=seconds, capture_output=True)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def copy_of(root: Path, folder: Path) -> None:
    """What the tests need; minift on a path of its own, where no folder named kernels is."""
    for part in filter(lambda part: (root / part).exists(), PARTS):
        if (root / part).is_dir():
            shutil.copytree(root / part, folder / part, symlinks=True)
        else:
            shutil.copy(root / part, folder)
    (folder / "path").mkdir()
    (folder / "path" / "minift").symlink_to(folder / "minift")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="such as kernels/cross_entropy.py")
    parser.add_argument("tests", nargs="+", help="such as tests/test_cross_entropy.py")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, always the same")
    parser.add_argument("--seconds", type=float, default=300, help="that the tests may take")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    found = mutants((args.root / args.file).read_text("utf-8"))
    if not (names := list(found)):
        parser.error(f"expected functions in {args.file}, got none that may change")
    if args.sample and args.sample < len(names):
        names = random.Random(0).sample(names, args.sample)
    allowed = args.root / "tests" / "mutants_allowed.txt"
    allowed = allowed.read_text("utf-8").splitlines() if allowed.exists() else []
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_of(args.root, Path(folder))
        if not passes(Path(folder), args.tests, args.seconds):
            parser.error(f"expected {' '.join(args.tests)} to pass as they are: run it first")
        for name in names:
            (Path(folder) / args.file).write_text(found[name], "utf-8")
            noticed = not passes(Path(folder), args.tests, args.seconds)
            wrong += not noticed and name not in allowed
            said = "noticed" if noticed else "allowed" if name in allowed else "SURVIVES"
            print(f"{said:<8}  {name}", flush=True)
    print(f"{wrong} of {len(names)} mutants survive unallowed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
