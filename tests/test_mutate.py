"""tests/mutate.py: what it changes, and that it tells good tests from poor ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutate import mutants

SOURCE = '''"""Words - not code: 1 + 1."""

import triton

SIZE = 4 + 4


@triton.jit(do_not_specialize=["n" + ""])
def add_kernel(x_ptr, n: int = 1 + 1):
    """More - words."""
    x = -tl.load(x_ptr, mask=n < 3, other=0.0)
    é = "ü" if x * 2 == 0.5 and True else tl.where(n, x, n)
    x += 1


def add_ref(x):
    return x + 1


def check_add(x):
    return x + 1


class Add(Function):
    def forward(ctx, x):
        if not x:
            raise ValueError(f"{x + 1}")
        return (x / 2
                + 3)
'''

EXPECTED = {
    "add_kernel: -tl.load(x_ptr, mask=n < 3, other=0.0) -> tl.load(x_ptr, mask=n < 3, other=0.0)",
    "add_kernel: tl.load(x_ptr, mask=n < 3, other=0.0) -> tl.load(x_ptr)",
    "add_kernel: n < 3 -> n <= 3",
    "add_kernel: 3 -> 4",
    "add_kernel: 0.0 -> 0.01",
    "add_kernel: x * 2 == 0.5 and True -> x * 2 == 0.5 or True",
    "add_kernel: x * 2 == 0.5 -> x * 2 != 0.5",
    "add_kernel: x * 2 -> x + 2",
    "add_kernel: x * 2 -> x",
    "add_kernel: 2 -> 3",
    "add_kernel: 0.5 -> 0.505",
    "add_kernel: True -> False",
    "add_kernel: tl.where(n, x, n) -> tl.where(n, n, x)",
    "add_kernel: x += 1 -> x -= 1",
    "add_kernel: 1 -> 2",
    "forward: not x -> x",
    "forward: x / 2 + 3 -> x / 2 - 3",
    "forward: x / 2 + 3 -> x / 2",
    "forward: x / 2 -> x * 2",
    "forward: x / 2 -> x",
    "forward: 2 -> 3",
    "forward: 3 -> 4",
}


def test_mutants_are_of_the_code_that_runs():
    """Not of words, annotations, constants of the module, definitions or checks."""
    assert set(mutants(SOURCE)) == EXPECTED


def test_a_mutant_differs_in_one_place():
    """Bytes and characters are told apart, and what stands around a change keeps its meaning."""
    found = mutants(SOURCE)
    for name, source in found.items():
        compile(source, name, "exec")
        assert source != SOURCE
    changed = found["add_kernel: tl.where(n, x, n) -> tl.where(n, n, x)"]
    assert changed == SOURCE.replace("tl.where(n, x, n)", "(tl.where(n, n, x))")
    assert "return ((x / 2 - 3))\n" in found["forward: x / 2 + 3 -> x / 2 - 3"]
    assert mutants("def f(a):\n    return a * a * a\n")["f: a * a -> a + a"].endswith(
        "(a + a) * a\n"
    )


def test_equal_changes_in_two_places_have_two_names():
    assert list(mutants("def f():\n    return [0, 0]\n")) == ["f: 0 -> 1", "f: 0 -> 1 (again)"]


GOOD, POOR, WRONG = "f(2) == 3", "f(0) > -2", "f(2) == 4"


@pytest.mark.parametrize(
    ("test", "allowed", "status", "said"),
    [
        (GOOD, "", 0, "0 of 3 mutants survive unallowed"),
        (POOR, "# why\nf: n + 1 -> n\n", 1, "n - 1\nallowed   f: n + 1 -> n\nSURVIVES"),
        (WRONG, "", 2, "expected tests/test_f.py to pass as they are"),
        (None, "", 2, "expected functions in minift/f.py, got none that may change"),
    ],
    ids=["good tests", "poor tests", "wrong tests", "nothing"],
)
def test_survivors_decide_the_exit_status(tmp_path, monkeypatch, test, allowed, status, said):
    """The tests run on each mutant, in a copy."""
    source = "def f(n):\n    return n + 1\n" if test else "N = 1\n"
    (tmp_path / "minift").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "minift" / "f.py").write_text(source)
    code = f"from minift.f import f\n\n\ndef test():\n    assert {test}\n"
    (tmp_path / "tests" / "test_f.py").write_text(code)
    (tmp_path / "tests" / "mutants_allowed.txt").write_text(allowed)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # quicker
    command = [sys.executable, Path(__file__).parent / "mutate.py", "minift/f.py"]
    done = subprocess.run(
        [*command, "tests/test_f.py", "--root", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert (tmp_path / "minift" / "f.py").read_text() == source
