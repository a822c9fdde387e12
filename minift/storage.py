"""Named tensors of a model folder, whatever files they are in: safetensors or torch.save's .bin,
one file or shards with an index. Nothing is read before it is asked for, and no code is run."""

import contextlib
import fnmatch
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError
from .files import read_json

SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
VARIANT = re.compile(r"model\.\w+\.safetensors")  # model.fp16.safetensors
OTHERS = {  # what other libraries call their weights
    "*.h5": "TensorFlow",
    "*.ckpt*": "TensorFlow",
    "*.msgpack": "Flax",
    "*.gguf": "GGUF",
    "*.onnx": "ONNX",
    "*.ot": "Rust",
    "adapter_model.*": "an adapter",
    "*.safetensors": "another name",
    "*.bin": "another name",
    "*.pt": "another name",
    "*.pth": "another name",
}


def weights_name(names: Collection[str], where: object) -> str:
    """The one of a folder's files that its weights start from: the file of all, or the index.

    Args:
        names: of the files in the folder.
        where: the folder, for messages.

    Raises:
        InputError: there is none that minift reads, or several variants of one.
    """
    variants = sorted(name for name in names if VARIANT.fullmatch(name))
    order = [SAFE, SAFE + INDEX, *variants, PICKLE, PICKLE + INDEX]
    first = next((name for name in order if name in names), None)
    if first is None:
        raise InputError(f"{where}: expected {SAFE} or {PICKLE}, {_others(names)}")
    if first in variants and len(variants) > 1:
        raise InputError(
            f"{where}: expected one file of weights, found {', '.join(variants)}: "
            "give the path of one, or rename it to " + SAFE
        )
    return first


def _others(names):
    kinds = {n: [k for p, k in OTHERS.items() if fnmatch.fnmatch(n, p)] for n in sorted(names)}
    found = [f"{name} ({kind[0]})" for name, kind in kinds.items() if kind]
    if not found:
        return "found no weights: check the folder"
    return f"found only {', '.join(found[:3])}: save the whole model as {SAFE}"


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator["Tensors"]:
    """The tensors of a model folder, to be read one by one.

    Args:
        path: of the folder, or of one file in it: weights or an index.

    Raises:
        InputError: nothing there can be read, see `Tensors`.
    """
    path = Path(path)
    if path.is_dir():
        with _one_line(path):
            names = os.listdir(path)
        path = path / weights_name(names, path)
    tensors = Tensors(path)
    try:
        yield tensors
    finally:
        tensors.close()


class Tensors:
    """Names, shapes and tensors of a file of weights, or of an index and its shards. One file is
    open at a time, the one that was asked last.

    Raises:
        InputError: from every method: a file is missing, damaged, or not what the index says.
    """

    def __init__(self, path: Path):
        self.path = path  # of the file or the index
        self._open: tuple[Path, dict[str, Any], Callable[[str], Tensor]] | None = None
        if path.suffix == ".json":
            self._where = read_index(path)
        else:
            self._where = dict.fromkeys(self._opened(path)[1], path)

    @property
    def names(self) -> list[str]:
        """All names that are stored."""
        return list(self._where)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; the numbers of a mapped file are not read."""
        return tuple(self.get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype; the numbers of a mapped file are not read."""
        return self.get(name).dtype

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Its memory may be the mapped file: it stays valid after the
        file is closed, not after the file is overwritten. Copy what is to be kept."""
        path, names, get = self._opened(self._where[name])
        if name not in names:
            raise InputError(
                f"{path}: expected a tensor {name!r}, as {self.path.name} says, found none: "
                "copy both again"
            )
        with _one_line(path):
            return get(name)

    def close(self) -> None:
        """Lets go of the file that is open."""
        self._open = None

    def _opened(self, path):
        if self._open is None or self._open[0] != path:
            self.close()  # before the next one opens
            _check_file(path)
            with _one_line(path):
                read = _open_safetensors if path.suffix == ".safetensors" else _open_pickle
                self._open = path, *read(path)
        return self._open


def read_index(path: Path) -> dict[str, Path]:
    """Name of a tensor -> the shard that holds it; all shards are there.

    Raises:
        InputError: the index is not JSON, not an index, or names a shard that is not there.
    """
    shards = read_json(path, ("weight_map",))["weight_map"]
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{path}: expected tensors and their files in weight_map, got none")
    for shard in dict.fromkeys(map(str, shards.values())):
        if os.path.isabs(shard) or ".." in Path(shard).parts:
            raise InputError(f"{path}: expected files of its own folder, got {shard!r}")
        if not os.path.isfile(path.parent / shard):
            raise InputError(f"{path}: the file {shard!r} that it names is not there: copy it too")
    return {name: path.parent / str(shard) for name, shard in shards.items()}


def _check_file(path):
    if not os.path.isfile(path):
        raise InputError(f"{path}: expected the model's weights, found no file: check the folder")
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise InputError(f"{path}: only a pointer to the weights: run `git lfs pull` there")


@contextlib.contextmanager
def _one_line(path):
    """Whatever a reader stumbles over, as one line."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: damaged or cut short ({reason}): copy it again") from None


def _open_safetensors(path):
    """Names and a function that gets one; the header is all that opening reads."""
    file = safe_open(path, "pt")
    return dict.fromkeys(file.keys()), file.get_tensor


def _open_pickle(path):
    """The same of torch.save's. Today's are zip files that are mapped; older ones, from before
    2020, have to be read whole."""
    with open(path, "rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings(action="ignore"):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        tensors = _state_dict(stored, path)
    except (OSError, InputError):
        raise
    except Exception as error:  # pickles of any bytes fail in any way
        raise _unpickled(path, error) from None
    return tensors, lambda name: tensors[name].detach()


def _unpickled(path, error):
    reason = " ".join(str(error.__context__ or error).split())
    if found := re.search(r"GLOBAL ([\w.]+)|(TorchScript)", reason):
        return InputError(
            f"{path}: would run code to load ({found[1] or found[2]}), which is refused: "
            "convert it to safetensors"
        )
    reason = reason.split(". ")[0][:100] or type(error).__name__
    return InputError(
        f"{path}: damaged, cut short or not written by torch.save ({reason}): copy it again, "
        "or convert it to safetensors"
    )


def _state_dict(stored: Any, path: Path) -> dict[str, Tensor]:
    """Tensors by name; trainers put them under a name of their own beside other things."""
    if isinstance(stored, dict) and not any(isinstance(v, Tensor) for v in stored.values()):
        holders = [value for value in stored.values() if _holds_tensor(value)]
        if len(holders) == 1 and isinstance(holders[0], dict):
            stored = holders[0]
    if not isinstance(stored, dict) or not stored:
        found = _kind(stored) if stored else "none"
        raise InputError(f"{path}: expected tensors by name, got {found}: is it a model?")
    for name, value in stored.items():
        plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not isinstance(name, str) or not plain or value.is_quantized:
            raise InputError(
                f"{path}: expected tensors by name, got {_kind(value)} as {name!r}: "
                "convert the model alone to safetensors"
            )
    return stored


def _holds_tensor(value: Any) -> bool:
    below = list(value.values()) if isinstance(value, dict) else value
    if isinstance(below, list | tuple | set):
        return any(_holds_tensor(v) for v in below)
    return isinstance(value, Tensor)


def _kind(value):
    return f"a {value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
