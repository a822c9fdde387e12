"""interpreter_bf16.py: what the interpreter computes is what a GPU computes."""

import subprocess
import sys
from pathlib import Path

import interpreter_bf16
import pytest
import torch


def test_its_own_table_has_no_wrong_row():
    """On the version that is installed: every operation on bf16, casts and masks. A new triton
    that computes otherwise fails here, and not in a kernel's test."""
    script = Path(interpreter_bf16.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 30
    assert all(line.endswith(" ok") for line in lines)


def test_without_the_repair_rows_are_wrong(tmp_path):
    """So it is still needed; and the table can fail."""
    source = Path(interpreter_bf16.__file__).read_text()
    broken = source.replace("\n    install()\n", "\n")
    assert broken != source
    (tmp_path / "table.py").write_text(broken)
    done = subprocess.run([sys.executable, tmp_path / "table.py"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "WRONG" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted")
def test_an_interpreter_built_otherwise_is_named(monkeypatch):
    builder = interpreter_bf16.InterpreterBuilder
    monkeypatch.delattr(builder, "_bf16_installed")
    monkeypatch.delattr(builder, "cast_impl")
    with pytest.raises(RuntimeError, match=r"expected the interpreter of triton 3.6.0, .* got 3"):
        interpreter_bf16.install()
