"""minift.storage: the same tensors from every kind of file, one at a time; one line when not."""

import json
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minift import InputError, storage
from minift.storage import SAFE, open_tensors, weights_name

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b.weight": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.zeros(0, 5, dtype=torch.float16),
}
KINDS = ("safetensors", "bin", "old")


def write(path: Path, tensors: dict[str, Tensor], kind: str = "") -> Path:
    """One file: safetensors, torch.save's of today, or torch.save's of before 2020."""
    if (kind or path.suffix[1:]) == "safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=kind != "old")
    return path


def name_of(kind: str) -> str:
    return "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"


def write_shards(folder: Path, kind: str) -> Path:
    """The tensors, one in each file, and their index."""
    stem, end = name_of(kind).split(".")
    places = {}
    for i, (name, tensor) in enumerate(TENSORS.items()):
        places[name] = f"{stem}-{i + 1:05}-of-{len(TENSORS):05}.{end}"
        write(folder / places[name], {name: tensor}, kind)
    return write_index(folder / f"{stem}.{end}.index.json", places)


def write_index(path: Path, places: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


def read(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as tensors:
        return {name: tensors.get(name) for name in tensors.names}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor] = TENSORS) -> bool:
    assert list(found) == sorted(wanted)
    return all(
        torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in wanted
    )


def fails(path: Path, of: Path | None = None) -> str:
    """The one line, without the path of the file (`of`) that it must start with."""
    with pytest.raises(InputError) as error:
        read(path)
    line, start = str(error.value), f"{of or path}: "
    assert "\n" not in line
    assert line.startswith(start)
    return line.removeprefix(start)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", KINDS)
def test_one_file(tmp_path, kind):
    """Names, shapes, dtypes and bits are what was stored, from the folder and from the path."""
    path = write(tmp_path / name_of(kind), TENSORS, kind)
    assert same(read(tmp_path))
    assert same(read(path))
    with open_tensors(str(tmp_path)) as tensors:
        assert tensors.path == path
        for name, tensor in TENSORS.items():
            assert tensors.shape(name) == tuple(tensor.shape)
            assert tensors.dtype(name) == tensor.dtype
            assert tensors.file_of(name) == path
            assert tensors.get(name).device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_shards(tmp_path, kind):
    """The same through an index, in any order of asking."""
    index = write_shards(tmp_path, kind)
    assert same(read(tmp_path))
    assert same(read(index))
    with open_tensors(tmp_path) as tensors:
        assert tensors.path == index
        for name in ("d", "a", "d", "c", "b.weight", "a"):
            assert torch.equal(tensors.get(name), TENSORS[name])
            assert tensors.shape(name) == TENSORS[name].shape
            assert tensors.dtype(name) == TENSORS[name].dtype
        assert tensors.file_of("b.weight").name.split("-")[1] == "00002"


def mapped(folder: Path) -> list[str]:
    """Files of a folder that this process has mapped or open."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines}
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.exists(link := f"/proc/self/fd/{descriptor}"):
            paths.add(os.readlink(link))
    return sorted(Path(path).name for path in paths if path.startswith(str(folder) + "/"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_shard_is_open_at_a_time(tmp_path, kind):
    """None before the first question, then the one that was asked, and none at the end."""
    write_shards(tmp_path, kind)
    with open_tensors(tmp_path) as tensors:
        assert tensors.names == list(TENSORS)
        assert mapped(tmp_path) == []
        for name in ("a", "c", "b.weight"):
            tensors.shape(name)
            assert mapped(tmp_path) == [tensors.file_of(name).name]
    assert mapped(tmp_path) == []


def test_a_shard_is_closed_before_the_next_one_opens(tmp_path, monkeypatch):
    """Old files are read whole: two of them would need twice the memory."""
    write_shards(tmp_path, "safetensors")
    read, seen = storage._open_safetensors, []
    monkeypatch.setattr(
        storage, "_open_safetensors", lambda p: seen.append(mapped(tmp_path)) or read(p)
    )
    with open_tensors(tmp_path) as tensors:
        for name in TENSORS:
            tensors.dtype(name)
    assert seen == [[]] * len(TENSORS)


def test_an_error_closes_the_file(tmp_path):
    """The caller's own, in the middle of reading."""
    write_shards(tmp_path, "safetensors")
    kept = []

    def stop():
        with open_tensors(tmp_path) as tensors:
            kept.append(tensors)
            tensors.shape("a")
            assert mapped(tmp_path)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert mapped(tmp_path) == []


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_large_tensor_is_not_read_for_its_shape(tmp_path, kind):
    """Nor for another tensor of its file: the memory of this process does not grow by it."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 64 << 20
    write(tmp_path / name_of(kind), {"big": torch.zeros(size // 4), "small": torch.ones(1)}, kind)
    before = resident()
    with open_tensors(tmp_path) as tensors:
        assert tensors.shape("big") == (size // 4,)
        assert tensors.dtype("big") == torch.float32
        assert tensors.get("small").item() == 1
        assert resident() - before < size // 4


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_outlive_their_file(tmp_path, kind):
    """Closed and deleted, not overwritten."""
    path = write(tmp_path / name_of(kind), TENSORS, kind)
    found = read(tmp_path)
    path.unlink()
    assert same(found)


def test_the_order_in_which_files_are_looked_for(tmp_path):
    """Each is what is opened until one before it in the list is there."""
    names = ["model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors"]
    names += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    for i in range(len(names)):
        assert weights_name([*names[i:], "config.json"][::-1], "x") == names[i]
    for name in reversed(names):
        if name.endswith(".json"):
            write(tmp_path / f"shard{Path(name).stem[:-6][-4:]}", {name: torch.ones(1)}, "bin")
            write_index(tmp_path / name, {name: f"shard{Path(name).stem[:-6][-4:]}"})
        else:
            write(tmp_path / name, {name: torch.ones(1)})
        assert list(read(tmp_path)) == [name]


def test_variants(tmp_path):
    """One is read; of several only its reader knows which, but the whole model goes first."""
    write(tmp_path / "model.bf16.safetensors", TENSORS)
    assert same(read(tmp_path))
    write(tmp_path / "model.fp16.safetensors", TENSORS)
    assert fails(tmp_path) == (
        "expected one file of weights, found model.bf16.safetensors, model.fp16.safetensors: "
        "give the path of one, or rename it to model.safetensors"
    )
    assert same(read(tmp_path / "model.fp16.safetensors"))
    write(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    assert list(read(tmp_path)) == ["a"]


@pytest.mark.parametrize("kind", ["bin", "old"])
def test_parameters_come_without_gradients(tmp_path, kind):
    """A module's parameters may be stored as such, and as views of one storage."""
    both = torch.arange(6.0)
    stored = {"p": torch.nn.Parameter(torch.ones(2)), "v": both[:2], "w": both[2:].view(2, 2)}
    write(tmp_path / "pytorch_model.bin", stored, kind)
    with open_tensors(tmp_path) as tensors:
        assert not tensors.get("p").requires_grad
        assert torch.equal(tensors.get("w"), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
        assert torch.equal(tensors.get("v"), torch.tensor([0.0, 1.0]))


# ---------------------------------------------------------------- what is not


def test_no_weights(tmp_path):
    """Says what would be read, and what is there instead."""
    (tmp_path / "config.json").touch()
    wanted = "expected model.safetensors or pytorch_model.bin, found "
    assert fails(tmp_path) == wanted + "no weights: check the folder"
    for name, kind in (
        ("tf_model.h5", "TensorFlow"),
        ("model.ckpt.index", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("bert.Q8_0.gguf", "GGUF"),
        ("model.onnx", "ONNX"),
        ("adapter_model.safetensors", "an adapter"),
        ("weights.safetensors", "another name"),
    ):
        (tmp_path / name).touch()
        assert fails(tmp_path) == wanted + f"only {name} ({kind}): save the whole model as " + SAFE
        (tmp_path / name).unlink()
    for name in ("tf_model.h5", "flax_model.msgpack"):
        (tmp_path / name).touch()
    assert "only flax_model.msgpack (Flax), tf_model.h5 (TensorFlow): " in fails(tmp_path)


def test_no_file_and_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    assert fails(path) == "expected the model's weights, found no file: check the folder"
    path.mkdir()
    assert "found no file" in fails(tmp_path, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 4, 100, -1, -40])
def test_damaged_files(tmp_path, kind, keep):
    """Cut anywhere: at once, in the header, before the last byte."""
    path = write(tmp_path / name_of(kind), TENSORS, kind)
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else path.stat().st_size + keep])
    line = fails(tmp_path, path)
    assert line.startswith("damaged")
    assert "cut short" in line
    assert "copy it again" in line
    assert len(line) < 300


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_of_something_else(tmp_path, name, recwarn):
    """Bytes, text, a web page; and what git leaves when its large files are not fetched."""
    path = tmp_path / name
    for content in (bytes(range(256)), b"hello", b"<!doctype html>" * 20, b"\x80" * 99):
        path.write_bytes(content)
        assert fails(tmp_path, path).startswith("damaged")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 440473133\n")
    assert fails(tmp_path, path) == "only a pointer to the weights: run `git lfs pull` there"
    assert not recwarn.list


class Harmful:
    ran = False

    def __reduce__(self):
        return setattr, (Harmful, "ran", True)


def test_code_is_not_run(tmp_path):
    """A pickle may call anything; it is refused by the name of what it would call."""
    path = tmp_path / "pytorch_model.bin"
    refused = "would run code to load ({}), which is refused: convert it to safetensors"
    for kind in ("bin", "old"):
        write(path, {"a": torch.ones(1), "b": Harmful()}, kind)
        assert fails(tmp_path, path) == refused.format("setattr")
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    assert fails(tmp_path, path) == refused.format("setattr")
    assert not Harmful.ran
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert fails(tmp_path, path) == refused.format("TorchScript")


def test_a_model_beside_other_things(tmp_path):
    """Trainers save {"epoch": 3, "state_dict": {...}}: one level is seen through, when nothing
    else holds tensors."""
    path, plain = tmp_path / "pytorch_model.bin", dict(sorted(TENSORS.items()))
    torch.save({"epoch": 3, "model": plain, "names": ["x", {"y": None}]}, path)
    assert same(read(tmp_path))
    torch.save({"state_dict": plain}, path)
    assert same(read(tmp_path))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(1)], "list: is it a model?"),
        (torch.ones(1), "a torch.strided tensor: is it a model?"),
        ({}, "none: is it a model?"),
        ({"epoch": 3}, "int as 'epoch': "),
        ({"a": torch.ones(1), "epoch": 3}, "int as 'epoch': "),
        ({"a": torch.ones(1), "more": {"b": torch.ones(1)}}, "dict as 'more': "),
        ({"m": {"a": torch.ones(1)}, "o": {0: [{"b": torch.ones(1)}]}}, "dict as 'm': "),
        ({"m": {"n": {"a": torch.ones(1)}}}, "dict as 'n': "),
        ({"m": [torch.ones(1)]}, "list as 'm': "),
        ({1: torch.ones(1)}, "a torch.strided tensor as 1: "),
        ({"a": torch.ones(2, 2).to_sparse()}, "a torch.sparse_coo tensor as 'a': "),
        ({"a": torch.ones(2, device="meta")}, "a torch.strided tensor as 'a': "),
    ],
)
def test_other_contents(tmp_path, content, found):
    """Which of them is the model is not guessed."""
    torch.save(content, tmp_path / "pytorch_model.bin")
    line = fails(tmp_path, tmp_path / "pytorch_model.bin")
    assert line.startswith("expected tensors by name, got " + found)


def test_a_structure_without_end(tmp_path):
    """A dict may hold itself."""
    endless = {"epoch": 1}
    endless["self"] = endless
    torch.save(endless, tmp_path / "pytorch_model.bin")
    assert fails(tmp_path, tmp_path / "pytorch_model.bin").startswith("damaged")


# ---------------------------------------------------------------- an index that is not right


@pytest.fixture
def index(tmp_path) -> Path:
    return write_shards(tmp_path, "safetensors")


def test_a_missing_shard(index):
    """Seen before anything is read."""
    (index.parent / "model-00003-of-00004.safetensors").unlink()
    line = "the file 'model-00003-of-00004.safetensors' that it names is not there: copy it too"
    assert fails(index.parent, index) == line
    with pytest.raises(InputError), open_tensors(index):
        raise AssertionError("opened")


def test_a_tensor_that_its_shard_lacks(index):
    """The index is of another version of the model."""
    places = json.loads(index.read_text())["weight_map"]
    write_index(index, places | {"z": places["a"]})
    shard = index.parent / places["a"]
    assert fails(index.parent, shard) == (
        "expected a tensor 'z', as model.safetensors.index.json says, found none: copy both again"
    )


def test_a_damaged_shard(index):
    """Its own name is in the line."""
    shard = index.parent / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert fails(index.parent, shard).startswith("damaged or cut short (")


@pytest.mark.parametrize("shard", ["../x.bin", "sub/../../x.bin", "/etc/passwd", ".."])
def test_a_shard_outside_the_folder(index, shard):
    """A downloaded model names files of its own."""
    write_index(index, {"a": shard})
    (index.parent.parent / "x.bin").touch()
    assert fails(index) == f"expected files of its own folder, got {shard!r}"


def test_shards_that_are_links(tmp_path, index):
    """As in the hub's cache, where a folder's files are links out of it."""
    (tmp_path / "links").mkdir()
    for path in [*tmp_path.glob("model-*"), index]:
        (tmp_path / "links" / path.name).symlink_to(path)
    assert same(read(tmp_path / "links"))


def test_not_an_index(index):
    index.write_text('{"weight_map": ')
    assert fails(index).startswith("expected JSON, got ")
    for content in ({"metadata": {}}, [1]):
        index.write_text(json.dumps(content))
        assert "weight_map" in fails(index)
    for places in ({}, [], "x", None):
        write_index(index, places)
        assert fails(index) == "expected tensors and their files in weight_map, got none"
    for shard in (None, 3, {"x": 1}, "", "a\0b", "n" * 300):
        write_index(index, {"a": shard})
        assert "that it names is not there" in fails(index)
