"""Files that are whole or not there: written beside their place, flushed to the disk, renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import InputError


def sync(path: Path) -> None:
    """Waits until a file or a folder (its list of names) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Puts a whole file in place of `path`, or changes nothing.

    Args:
        path: where.
        content: the bytes, or a function that writes them to the path it is given.

    Raises:
        InputError: it cannot be written: no space, no permission.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(content if isinstance(content, bytes) else b"")
        if not isinstance(content, bytes):
            mode = beside.stat().st_mode  # as the user's umask has it; some writers make 0600
            content(beside)
            beside.chmod(mode)
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_file` of indented JSON; NaN and infinity are errors, not text that nobody can read."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(path, (text + "\n").encode())


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Puts a whole folder at `path`, which must not be there yet, or changes nothing.

    Args:
        path: where.
        fill: writes the content into the folder that it is given.

    Raises:
        InputError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        fill(beside)
        sync(beside)
        beside.rename(path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; it may be there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: Exception) -> InputError:
    """One line for a failed write."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return InputError(f"{path}: cannot be written ({reason}): free space or choose another folder")


def remove_partial(folder: Path) -> None:
    """Deletes what a killed process left half-written in `folder`."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_json(path: Path, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        names: what it must have.

    Raises:
        InputError: it is missing, unreadable, not JSON, not an object, or lacks a name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {error}: is the file whole?") from None
    if not isinstance(content, dict) or not content.keys() >= set(names):
        wanted = f" with {', '.join(names)}" if names else ""
        raise InputError(f"{path}: expected an object of settings{wanted}, got something else")
    return content
