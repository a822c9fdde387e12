"""minift.files: whole or nothing, and one line when nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minift import InputError, files
from minift.files import read_json, remove_partial, write_file, write_folder, write_json


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_file_puts_bytes_and_replaces(tmp_path):
    """Bytes or a function, new or in place of an old file; nothing is left beside it."""
    path = tmp_path / "a.bin"
    write_file(path, b"first")
    assert path.read_bytes() == b"first"
    write_file(path, lambda p: p.write_bytes(b"second, longer"))
    assert path.read_bytes() == b"second, longer"
    write_file(path, b"")
    assert path.read_bytes() == b""
    assert names(tmp_path) == ["a.bin"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path):
    """Whoever reads while it is written, or after a kill, sees the old content."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def content(beside):
        assert beside.parent == path.parent  # a rename between disks would copy
        beside.write_bytes(b"new")
        assert path.read_bytes() == b"old"

    write_file(path, content)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_a_writer_that_fails_midway_changes_nothing(tmp_path, error):
    """Its own error comes through, whatever it is: Ctrl-C too."""

    def content(beside):
        beside.write_bytes(b"half")
        raise error("midway")

    path = tmp_path / "a.bin"
    with pytest.raises(error, match="midway"):
        write_file(path, content)
    assert names(tmp_path) == []
    path.write_bytes(b"old")
    with pytest.raises(error, match="midway"):
        write_file(path, content)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["sync", "replace"])
def test_a_full_disk_that_shows_late(tmp_path, monkeypatch, step):
    """Some file systems report it at the flush: the old file is still the file."""

    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(*((files, "sync") if step == "sync" else (Path, "replace")), full)
    with pytest.raises(InputError) as error:
        write_file(path, b"new")
    assert one_line(error) == (
        f"{path}: cannot be written (No space left on device): free space or choose another folder"
    )
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from minift import InputError
from minift.files import write_file, write_folder
folder = Path(sys.argv[1])
tensors = {"x": torch.zeros(100_000)}
save = lambda path: save_file(tensors, path)
inside = lambda path: write_file(path / "x", save)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write, path, content in (
    (write_file, "bytes", bytes(100_000)),
    (write_file, "tensors", save),
    (write_folder, "new", inside),
):
    try:
        write(folder / path, content)
    except InputError as error:
        print(error)
"""


def test_a_file_that_does_not_fit(tmp_path):
    """A real limit of the kernel, in a process of its own; safetensors meets it in Rust."""
    (tmp_path / "bytes").write_bytes(b"old")
    (tmp_path / "tensors").write_bytes(b"old")
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done
    for line, path in zip(lines, ("bytes", "tensors", ".new."), strict=True):
        assert line.startswith(str(tmp_path / path))
        assert "cannot be written (" in line
        assert "too large" in line
    assert names(tmp_path) == ["bytes", "tensors"]
    assert (tmp_path / "bytes").read_bytes() == (tmp_path / "tensors").read_bytes() == b"old"


def test_no_folder(tmp_path):
    """The line names the file that was wanted, not the one beside it."""
    path = tmp_path / "missing" / "a.bin"
    with pytest.raises(InputError) as error:
        write_file(path, b"x")
    assert one_line(error).startswith(f"{path}: cannot be written (No such file or directory)")


@pytest.mark.parametrize("where", ["file/a.bin", "n" * 250])
def test_a_path_that_cannot_be(tmp_path, where):
    """Under a file, and a name that is too long with what is put around it."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_file(tmp_path / where, b"x")


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        write_file(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        write_file(tmp_path / "a", b"x")
    with pytest.raises(InputError, match="Permission denied"):
        write_folder(tmp_path / "b", lambda _: None)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_the_users(tmp_path, umask, mode):
    """Some writers make files that only their owner may read: a server could not load the model."""

    def private(path):
        path.unlink()
        path.write_bytes(b"x")
        path.chmod(0o600)

    before = os.umask(umask)
    try:
        write_file(tmp_path / "bytes", b"x")
        write_file(tmp_path / "function", private)
        write_json(tmp_path / "json", {})
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {mode}


# ---------------------------------------------------------------- JSON


def test_json_round_trip(tmp_path):
    """Other scripts stay readable, the order of names stays, the file ends in a newline."""
    path, content = tmp_path / "a.json", {"z": "好的", "a": [1, 2.5, None, True]}
    write_json(path, content)
    assert path.read_bytes().endswith(b"}\n")
    assert "好的" in path.read_text(encoding="utf-8")
    assert list(read_json(path)) == ["z", "a"]
    assert read_json(path) == content


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_not_json(tmp_path, bad):
    """Python would write NaN, and no other reader would take it. The old file stays."""
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": [bad]})
    assert read_json(path) == {"loss": 1.0}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON, got Expecting value: line 1 column 1 (char 0): is the file whole?"),
        (b'{"a": 1', "is the file whole?"),
        (b"\xff\xfe", "is the file whole?"),
        (b"[" * 100_000, "is the file whole?"),
    ],
)
def test_what_is_not_json(tmp_path, content, message):
    """Empty, cut short, not text, nested without end."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert one_line(error).startswith(f"{path}: expected JSON, got ")
    assert one_line(error).endswith(message)


def test_a_json_file_that_cannot_be_read(tmp_path):
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"cannot be read \\({reason}"):
            read_json(path)


# ---------------------------------------------------------------- folders


def fill(folder: Path) -> None:
    (folder / "a").write_text("a")
    write_json(folder / "b.json", {"b": 1})


def test_write_folder(tmp_path):
    """Parents are made, and the folder is there only when all of it is."""
    path = tmp_path / "runs" / "1"

    def checked(folder):
        fill(folder)
        assert not path.exists()

    write_folder(path, checked)
    assert names(path) == ["a", "b.json"]
    assert names(path.parent) == ["1"]
    assert json.loads((path / "b.json").read_text()) == {"b": 1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_a_folder_that_fails_midway_is_not_there(tmp_path, error):
    def halfway(folder):
        fill(folder)
        raise error("midway")

    with pytest.raises(error, match="midway"):
        write_folder(tmp_path / "new", halfway)
    assert names(tmp_path) == []


def test_a_folder_that_fails_with_the_disk_is_one_line(tmp_path):
    def full(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError) as error:
        write_folder(tmp_path / "new", full)
    assert one_line(error).startswith(f"{tmp_path / 'new'}: cannot be written (No space left")
    assert names(tmp_path) == []


def test_a_folder_that_is_there_already_stays_as_it_is(tmp_path):
    """Two checkpoints are never mixed."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "kept").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_folder(old, fill)
    assert names(tmp_path) == ["old"]
    assert names(old) == ["kept"]


def test_a_folder_under_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory"):
        write_folder(tmp_path / "file" / "new", fill)


def test_remove_partial_removes_what_a_kill_left_and_nothing_else(tmp_path):
    """What was being written at the kill, file or folder, of any process."""
    script = (
        "import os, sys; from pathlib import Path; from minift.files import *\n"
        "kill = lambda p: ((p / 'x').mkdir() if p.is_dir() else p.write_bytes(b'1'), os._exit(9))\n"
        "{}(Path(sys.argv[1]) / '{}', kill)"
    )
    for call in ("write_file", "write_folder"):
        command = [sys.executable, "-c", script.format(call, call), str(tmp_path)]
        assert subprocess.run(command, check=False).returncode == 9
    assert len(names(tmp_path)) == 2
    kept = ["partial", "a.partial", ".hidden"]
    for name in kept:
        (tmp_path / name).touch()
    remove_partial(tmp_path)
    assert names(tmp_path) == sorted(kept)
    remove_partial(tmp_path / "missing")
