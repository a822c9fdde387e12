"""`minift train --method lora | prompt | prefix`, and what follows it: every task from files to a
folder and its answers, resumed to the bit, and what is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_qa import write as write_questions
from test_saving import base_in
from test_tagging import sentences
from tiny import assert_one_line, call, contents, rows, settings_kept, tiny_model, write_rows

from minift import load
from minift.adapter_files import CONFIG, PROJECTION, WEIGHTS
from minift.cli import make_configs

METHODS = {
    "lora": ("--lora_r", 4, "--lora_dropout", 0.1),
    "prompt": ("--num_virtual_tokens", 4),
    "prefix": ("--num_virtual_tokens", 4),
    "projection": ("--num_virtual_tokens", 4, "--prefix_projection", "--prefix_hidden_size", 6),
}
OWN = {CONFIG, WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(autouse=True)
def _process():
    with settings_kept():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Bases, and a file to learn of each task."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model(folder / "bert", max_position_embeddings=64)
    base_in(folder / "gpt2", "gpt2", "lm")
    write_rows(folder / "classification.csv", 32)
    numbers = [f"{text},{float(label == 'pos')}" for text, label in rows(32)]
    (folder / "regression.csv").write_text("\n".join(["text,label", *numbers]) + "\n")
    several = [json.dumps({"text": t, "labels": [label, "x"][: 1 + i % 2]})
               for i, (t, label) in enumerate(rows(32))]  # fmt: skip
    (folder / "multilabel.jsonl").write_text("\n".join(several) + "\n")
    blocks = ["".join(f"{w}\t{t}\n" for w, t in zip(*s, strict=True)) for s in sentences(24)]
    (folder / "tagging.conll").write_text("\n".join(blocks))
    write_questions(folder / "qa.jsonl", 24)
    (folder / "lm.txt").write_text("".join(f"{text}.\n" for text, _ in rows(40)))
    shutil.copy(folder / "lm.txt", folder / "mlm.txt")
    pairs = [f"{text},{label}" for text, label in rows(24)]
    (folder / "instruct.csv").write_text("\n".join(["prompt,response", *pairs]) + "\n")
    return folder


def words(files: Path, task: str, method: str, output: Path, *more: object) -> list:
    """A command line of 4 steps."""
    (data,) = files.glob(f"{task}.*")
    base = files / ("gpt2" if task in ("lm", "instruct") else "bert")
    name = "prefix" if method == "projection" else method
    given = ("--task", task, "--model", base, "--train", data, "--validation", data)
    flags = ("--threads", 1, "--batch_size", 4, "--max_steps", 4, "--save_steps", 2, "--eval_steps")
    return ["train", "--method", name, *METHODS[method], *given, "--output", output, *flags, 2,
            "--save_total_limit", 0, *more]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "method"),
    [
        *(("classification", method) for method in METHODS),
        *(("regression", "lora"), ("multilabel", "prompt"), ("tagging", "prefix")),
        *(("tagging", "prompt"), ("qa", "prompt"), ("qa", "lora"), ("mlm", "prompt")),
        *(("mlm", "lora"), ("lm", "prefix"), ("lm", "lora"), ("instruct", "projection")),
        ("instruct", "prompt"),
    ],
)
def test_a_run_from_files_to_answers(task, method, files, tmp_path, capsys):
    """The folder holds an adapter and no model; eval says what the run has said; predict, or
    generate, answers from it."""
    base = contents(files / ("gpt2" if task in ("lm", "instruct") else "bert"))
    done = call(capsys, *words(files, task, method, out := tmp_path / "out"))
    assert done.status == 0, done.err
    extra = {PROJECTION} if method == "projection" else set()
    run = {"run.json", "metrics.jsonl"}
    assert {p.name for p in out.iterdir() if p.is_file()} == OWN | extra | run
    moments = load_file(out / "checkpoint-4" / "optimizer.safetensors")
    added = {"projection": ".prefix."}.get(method, f".{method}.")
    assert all(added in name or name.split(".")[1] in ("head", "pooler") for name in moments)
    assert any(added in name for name in moments)
    (data,) = files.glob(f"{task}.*")
    found = call(capsys, "eval", "--model", out, "--data", data)
    assert found.status == 0, found.err
    for name, value in found.summary.items():
        if name.startswith("eval_") and name in done.summary and "runtime" not in name:
            assert value == pytest.approx(done.summary[name], rel=1e-5), name
    assert "eval_loss" in found.summary
    command = "generate" if task in ("lm", "instruct") else "predict"
    if task != "mlm":
        more = ("--max_new_tokens", 3) if command == "generate" else ()
        asked = ("--data", data) if task == "qa" else ("the film was good",)
        answered = call(capsys, command, "--model", out, *asked, *more)
        assert answered.status == 0, answered.err
        assert answered.answers
    assert contents(files / ("gpt2" if task in ("lm", "instruct") else "bert")) == base


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_has_the_bits_of_one_that_did_not_stop(method, files, tmp_path, capsys):
    """From the middle, with dropout on: adapter, head and moments."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert call(capsys, *words(files, "classification", method, one, "--quiet")).status == 0
    shutil.copytree(one, other)
    shutil.rmtree(other / "checkpoint-4")
    more = ("--quiet", "--resume_from_checkpoint", "auto")
    again = call(capsys, *words(files, "classification", method, other, *more))
    assert again.status == 0, again.err
    found, wanted = contents(other), contents(one)
    names = [name for name in wanted if name.endswith((".safetensors", CONFIG, "/config.json"))]
    assert len(names) > 8
    assert all(found[name] == wanted[name] for name in names)
    first, last = (wanted[f"checkpoint-{step}/{WEIGHTS}"] for step in (2, 4))
    assert first != last


def test_other_flags_are_another_run(files, tmp_path, capsys):
    """A rank or a number of virtual tokens cannot change on the way."""
    out = tmp_path / "out"
    assert call(capsys, *words(files, "classification", "lora", out, "--quiet")).status == 0
    shutil.rmtree(out / "checkpoint-4")
    more = ("--quiet", "--resume_from_checkpoint", "auto", "--lora_alpha", 9)
    again = call(capsys, *words(files, "classification", "lora", out, *more))
    assert_last_line(again, "is of another run: lora_alpha was 16.0, is 9.0")


def assert_last_line(result, message: str) -> None:
    """The command has failed with that line, behind what it says of the model's file."""
    assert (result.status, result.out) == (2, "")
    last = result.err.splitlines()[-1]
    assert last.startswith("minift: ")
    assert message in last


REFUSED = [
    ("lora", ("--lr_rules", "*=1e-3"), "expected method lora or lr_rules, got both"),
    ("prompt", ("--layer_lr_decay", 0.9), "expected method prompt or layer_lr_decay, got both"),
    ("prefix", ("--lora_r", 4), "--lora_r is read by --method lora, not prefix"),
    ("lora", ("--num_virtual_tokens", 4), "is read by --method prompt or prefix, not lora"),
    ("prompt", ("--prefix_projection",), "--prefix_projection is read by --method prefix, not pr"),
    ("full", ("--lora_targets", "all"), "--lora_targets is read by --method lora, not full"),
    ("bitfit", ("--prompt_init", "random"), "--prompt_init is read by --method prompt or prefix"),
    ("prefix", ("--prefix_hidden_size", 9), "--prefix_hidden_size is not read without --prefix_p"),
    ("prefix", ("--prefix_projection", "--prompt_init_text", "a"), "_text is not read beside"),
    ("lora", ("--lora_targets", "querry"), "did you mean 'query'"),
    ("lora", ("--lora_r", 99), "expected lora_r of at most 32, the model's width, got 99"),
    ("prompt", ("--num_virtual_tokens", 61), "expected at most 60 num_virtual_tokens"),
    ("prompt", ("--num_virtual_tokens", 60, "--max_seq_length", 9),
     "max_seq_length 9 is more than the model's 4 positions"),
    ("prompt", ("--prompt_init_text", " "), "prompt_init_text ' ' has no tokens"),
    ("lora", ("--freeze", "head,*.lora.*"), "every parameter is frozen"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "flags", "message"), REFUSED, ids=str)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    method, flags, message, files, tmp_path, capsys
):
    given = ("--model", files / "bert", "--train", files / "classification.csv")
    result = call(capsys, "train", "--method", method, *given, "--output", tmp_path / "o", *flags,
                  "--quiet")  # fmt: skip
    assert_last_line(result, message)
    assert not (tmp_path / "o").exists()


def test_what_an_adapter_cannot_be_trained_on_is_refused(files, tmp_path, capsys):
    """A model of random weights; an adapter."""
    (tmp_path / "small.json").write_text((files / "bert" / "config.json").read_text())
    data = ("--train", files / "classification.csv", "--output", tmp_path / "o", "--quiet")
    new = ("--config_name", tmp_path / "small.json", "--method", "lora")
    assert_one_line(call(capsys, "train", *new, *data), "expected --model for method lora")
    done = call(capsys, *words(files, "classification", "lora", tmp_path / "a", "--quiet"))
    assert done.status == 0
    for method in ("full", "prompt"):
        result = call(capsys, "train", "--model", tmp_path / "a", "--method", method, *data)
        assert_one_line(result, "is an adapter: train over its base")


def test_each_method_has_a_rate_of_its_own_unless_one_is_given():
    """A full model's rate would teach an adapter nothing."""
    for method, rate in (("lora", 1e-3), ("prompt", 3e-2), ("prefix", 1e-2), ("full", 5e-5)):
        assert make_configs({"method": method})[1].learning_rate == rate
        assert make_configs({"method": method, "learning_rate": 3e-4})[1].learning_rate == 3e-4


def test_the_table_of_a_run_shows_what_is_trained(files, tmp_path, capsys):
    """Adapter, head, and the rest frozen; inspect says the same before there is data."""
    done = call(capsys, *words(files, "classification", "lora", tmp_path / "out"))
    table = [line.split() for line in done.err.splitlines() if "frozen" in line or "lora" in line]
    assert ["*.lora.*,", "matrices", "1,024", "0.001", "0.01"] in table
    assert any(line[0] == "*," and "frozen" in line for line in table)
    said = call(capsys, "inspect", files / "bert", "--method", "lora", "--lora_r", 4)
    assert said.status == 0, said.err
    shown = [line for line in said.out.splitlines() if "lora" in line]
    assert shown
    assert shown[0].split()[:3] == ["*.lora.*,", "matrices", "1,024"]


def test_inspect_says_what_an_adapter_is(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, *words(files, "classification", "prefix", out, "--quiet")).status == 0
    said = call(capsys, "inspect", out)
    assert said.status == 0, said.err
    assert "prefix, 4 virtual tokens; PEFT has no model for it" in said.out
    assert str(files / "bert") in said.out
    assert "512 of the adapter, 66 of head" in said.out  # 4 * 2 layers * 2 * 32; 2 * 32 + 2


def test_several_adapters_answer_over_one_base(files, tmp_path, capsys):
    """Each line says whose it is, and what that says alone; base and adapter in other places."""
    outs = [tmp_path / method for method in ("lora", "prompt")]
    for out in outs:
        done = call(capsys, *words(files, "classification", out.name, out, "--quiet"))
        assert done.status == 0
    texts = ("the film was good", "the meal was awful")
    base = tmp_path / "moved"
    shutil.copytree(files / "bert", base)
    both = [word for out in outs for word in ("--adapter", out)]
    found = call(capsys, "predict", "--model", base, *both, *texts)
    assert found.status == 0, found.err
    answers = found.answers
    assert [answer.pop("adapter") for answer in answers] == [str(o) for o in outs for _ in texts]
    alone = [call(capsys, "predict", "--model", out, *texts).answers for out in outs]
    assert answers == alone[0] + alone[1]
    eval_ = ("eval", "--model", base, "--data", files / "classification.csv")
    assert call(capsys, *eval_, "--adapter", outs[0]).status == 0
    assert_one_line(
        call(capsys, *eval_, *both), "expected one --adapter, got 2: predict takes several"
    )
    assert_one_line(
        call(capsys, "predict", "--model", base, *both), "expected texts or --data for several"
    )
    assert call(capsys, "predict", "--adapter", outs[0], *texts).answers == alone[0]
    assert "4 virtual tokens" in call(capsys, "inspect", base, "--adapter", outs[1]).out
    twice = ("generate", "--model", base, *both, "x")
    assert_one_line(call(capsys, *twice), "expected one --adapter, got 2")
    over = ("predict", "--model", outs[0], "--adapter", outs[1], "x")
    assert_one_line(call(capsys, *over), f"{outs[0]}: is an adapter itself: give its base")
    none = ("predict", "--model", base, "--adapter", base, "x")
    assert_one_line(call(capsys, *none), f"{base}: is no adapter, it has no adapter_config.json")
    assert_one_line(call(capsys, "predict", "x"), "expected --model, or --adapter")


def test_a_flag_of_another_method_is_refused_at_its_default_too(files, tmp_path, capsys):
    """Who forgets --method must not get a full fine-tuning in silence."""
    flags = "train", "--model", files / "bert", "--train", files / "classification.csv"
    for given, wanted in (
        (("--lora_r", 8), "--lora_r is read by --method lora, not full"),
        (("--method", "lora", "--num_virtual_tokens", 20), "is read by --method prompt or prefix"),
        (("--method", "prompt", "--prompt_init", "random", "--prompt_init_text", "good"),
         "--prompt_init_text says the words"),
    ):  # fmt: skip
        assert_one_line(call(capsys, *flags, "--output", tmp_path / "o", *given), wanted)
    shown = call(capsys, "inspect", files / "bert", "--method", "prompt").out
    assert "0.03" in shown


def test_generate_takes_an_adapter_over_a_base(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, *words(files, "lm", "prefix", out, "--quiet")).status == 0
    text = ("the film", "--max_new_tokens", 4, "--quiet")
    alone = call(capsys, "generate", "--model", out, *text)
    assert alone.status == 0, alone.err
    beside = call(capsys, "generate", "--model", files / "gpt2", "--adapter", out, *text)
    assert beside.answers == alone.answers
    base = call(capsys, "generate", "--model", files / "gpt2", *text)
    assert base.answers[0]["text"] == alone.answers[0]["text"]


def test_a_run_in_16_bits_learns_the_same_parameters(files, tmp_path, capsys):
    """bf16 products over fp32 masters: what is saved is fp32."""
    out = tmp_path / "out"
    for method in ("lora", "prefix"):
        more = ("--dtype", "bf16", "--quiet", "--overwrite_output_dir")
        done = call(capsys, *words(files, "classification", method, out, *more))
        assert done.status == 0, done.err
        tensors = load_file(out / WEIGHTS)
        assert {x.dtype for x in tensors.values()} == {torch.float32}
        assert load(out)[0].adapter.method == method
