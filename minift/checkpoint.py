"""Checkpoints: everything a resume needs, whole or not there.

    checkpoint-120/    config.json model.safetensors tokenizer.json tokenizer_config.json
                       (of an adapter its own files, and not the model's: see adapter_files.py)
                       optimizer.safetensors    what the optimizer keeps, by parameter name
                       state.json               steps done, and what the run remembers

Data order and dropout are functions of the seed and the step, so no random state is kept. The same
threads on the same machine give the same bits.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import InputError
from .files import cannot_write, read_json, write_file, write_folder, write_json
from .optim import kept, leaves_of
from .saving import restore, save_trained
from .tokenizer import Tokenizer
from .train import TrainState


def save_checkpoint(
    output: Path, model: nn.Module, tokenizer: Tokenizer, state: TrainState, run: dict[str, Any]
) -> Path:
    """Writes output/checkpoint-STEP. A folder of that name is already the same state: it stays.

    Args:
        output: the run's folder.
        model, tokenizer, state: as they are after `state.step` steps.
        run: whatever else the run remembers, as JSON.

    Raises:
        InputError: it cannot be written; nothing is left behind.
    """
    path = output / f"checkpoint-{state.step}"
    if path.exists():
        return path
    names = {id(p): name for name, p in leaves_of(model, state.shadows).items()}
    kinds = kept(state.optimizer)  # a master is the model's own weight
    moments = {
        f"{kind}.{names[id(parameter)]}": there[kind]
        for parameter, there in state.optimizer.state.items()
        for kind in kinds & set(there)
    }

    def fill(folder: Path) -> None:
        save_trained(model, folder)
        tokenizer.save(folder)
        write_file(folder / "optimizer.safetensors", lambda p: save_file(moments, p))
        threads = torch.get_num_threads()
        write_json(folder / "state.json", {"step": state.step, "threads": threads, "run": run})

    write_folder(path, fill)
    return path


def load_checkpoint(path: Path, model: nn.Module, state: TrainState) -> dict[str, Any]:
    """Puts a checkpoint's weights and moments into `model` and `state`, bit for bit.

    Returns:
        The content of state.json: step, threads, and `run` as it was saved.

    Raises:
        InputError: a file is missing or damaged, or belongs to other parameters.
    """
    saved = read_json(path / "state.json", ("step", "threads", "run"))
    restore(model, path)
    try:
        moments = load_file(path / "optimizer.safetensors")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path / 'optimizer.safetensors'}: damaged ({reason})") from None
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in moments.items():
        kind, _, parameter = name.partition(".")
        kinds.setdefault(parameter, {})[kind] = tensor
    leaves = leaves_of(model, state.shadows)
    trained = {n: p for n, p in leaves.items() if p.requires_grad}
    expected = kept(state.optimizer) if saved["step"] else set()
    found = {(name, kind) for name, tensors in kinds.items() for kind in tensors}
    if found != {(name, kind) for name in trained for kind in expected}:
        raise InputError(f"{path}: the optimizer's parameters are others: same method and flags?")
    before = dict(state.optimizer.state)
    state.optimizer.state.clear()
    for name, tensors in kinds.items():
        # Copies: the file's own tensors may lie at odd addresses, where sums round otherwise, and
        # a captured step goes on reading the tensors that are there. Torch's load_state_dict would
        # cast moments to the dtype of the parameter. Fused optimizers want the step count on the
        # device too.
        p = trained[name]
        there = before.get(p, {})
        state.optimizer.state[p] = {
            kind: there[kind].copy_(tensor) if kind in there else tensor.to(p.device).clone()
            for kind, tensor in tensors.items()
        }
    state.step = saved["step"]
    return saved


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in output.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / "state.json").is_file():
            found.append((int(number[1]), path))
    return [path for _, path in sorted(found)]


def prune(output: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints; 0 keeps all."""
    for path in checkpoints(output)[:-keep] if keep else []:
        try:
            # Renamed first: a folder half deleted must not pass for a checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.partial")))
        except OSError as error:
            raise cannot_write(path, error) from error
