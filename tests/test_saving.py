"""Models and adapters on disk: loaded and saved by the same names; many adapters share a base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapted import LENGTHS, P, inputs, ours_out, outs_near
from test_adapters import scattered
from test_families import TEXTS, raw_config
from tiny import assert_one_line, call, contents, settings_kept
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from minift import TrainConfig, load, load_model, save
from minift.adapter_files import CONFIG, WEIGHTS, note_base
from minift.adapters import Adapter, adapt, merge
from minift.batch import Example, collate
from minift.config import ModelConfig
from minift.errors import InputError
from minift.layers import Projected, body_of
from minift.saving import Adapters, base_of, restore, trained_config
from minift.scratch import random_model
from minift.tokenizer import Tokenizer

ADDED = "lora", "prompt", "prefix"
AUTO = {
    "classifier": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "span": AutoModelForQuestionAnswering,
    "lm": AutoModelForMaskedLM,
}


@pytest.fixture(autouse=True)
def _():
    with settings_kept():
        yield


def base_in(folder: Path, family: str = "bert", head: str = "classifier", seed: int = 0) -> Path:
    """A model with a vocabulary, every number random."""
    raw = raw_config(family, vocab_size=400, max_position_embeddings=24, n_positions=24)
    config = ModelConfig.from_hf(raw)
    tokenizer = Tokenizer.train(TEXTS * 3, config, config.max_len)
    model = random_model(config, ("x", "y"), seed, head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    save(model, tokenizer, folder)
    return folder


def adapter_in(
    folder: Path, base: Path, method: str, head: str = "classifier", labels=("a", "b", "c"), seed=5
) -> Path:
    """An adapter over it, every number random."""
    known = labels if head in ("classifier", "tokens") else None
    model, report = load_model(base, known, 1, head)
    virtual = {} if method == "lora" else {"num_virtual_tokens": P}
    config = TrainConfig(method=method, **virtual)
    adapt(model, Adapter.of(config, model.config), tuple(report.new))
    note_base(model, str(base))
    model.config = replace(model.config, task={"classifier": "classification"}.get(head, ""))
    _, tokenizer = load(base)
    save(scattered(model, seed), tokenizer, folder)
    return folder


def outs(model, head: str = "classifier") -> list[torch.Tensor]:
    return ours_out(model, inputs(), head)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_in(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def lora(base) -> Path:
    return adapter_in(base.parent / "lora", base, "lora")


# ------------------------------------------------------------------- load and save


@pytest.mark.parametrize("method", ["", "lora", "prompt", "prefix"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_load_gives_what_save_was_given(method, family, tmp_path):
    """A model and an adapter alike; of an adapter the base is found where it was."""
    folder = base_in(tmp_path / "base", family)
    if method:
        folder = adapter_in(tmp_path / "adapter", folder, method)
    model, tokenizer = load(folder)
    save(model, tokenizer, tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert same(outs(model), outs(again))
    assert again.config == model.config
    assert tokenizer.max_length == 24 - (P if method in ("prompt", "prefix") else 0)
    files = {p.name for p in (tmp_path / "again").iterdir()}
    weights = {WEIGHTS, CONFIG} if method else {"model.safetensors"}
    assert files == weights | {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_an_adapter_says_its_base_and_its_labels(base, lora):
    model, _ = load(lora)
    assert model.config.labels == ("a", "b", "c")
    assert model.config.adapter["base"] == str(base)
    assert trained_config(lora).labels == ("a", "b", "c")
    assert trained_config(base).labels == ("x", "y")
    assert base_of(lora) == base


def test_a_tokenizer_of_the_base_will_do(base, lora, tmp_path):
    """PEFT's folders have none."""
    shutil.copytree(lora, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    _, tokenizer = load(tmp_path / "bare")
    _, own = load(base)
    ids = (list(map(list, one.ids(list(TEXTS)))) for one in (tokenizer, own))
    assert next(ids) == next(ids)


def test_texts_are_cut_at_what_is_asked_for_and_never_beyond_what_there_is(base, lora):
    assert load(base, max_length=9)[1].max_length == 9
    assert load(lora, max_length=99)[1].max_length == 24


def test_a_base_that_has_moved_is_said_and_can_be_given(base, tmp_path):
    place = tmp_path / "first"
    shutil.copytree(base, place)
    folder = adapter_in(tmp_path / "adapter", place, "prompt")
    wanted = outs(load(folder)[0])
    place.rename(tmp_path / "second")
    with pytest.raises(InputError) as caught:
        load(folder)
    text = str(caught.value)
    assert f"{folder}: its base model is not where it was" in text
    assert str(place) in text
    assert "give another place as --model, this as --adapter" in text
    assert "\n" not in text
    assert same(outs(load(folder, base=tmp_path / "second")[0]), wanted)
    with pytest.raises(InputError, match="expected a model folder"):
        load(folder, base=tmp_path / "third")


def test_an_adapter_that_names_no_base(lora, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(lora, folder)
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base model: give it as --model, this as --ada"):
        load(folder)


def test_an_adapter_has_labels_of_its_own(lora):
    with pytest.raises(InputError, match="is an adapter: train over its base"):
        load(lora, labels=("a", "b", "c"))


def test_a_head_that_is_not_the_adapters_is_refused(lora):
    with pytest.raises(InputError, match="is of a model with another head, classifier, not lm"):
        load(lora, head="lm")


def test_a_base_whose_own_head_has_other_labels_is_a_base_all_the_same(base, lora):
    """It has two, the adapter three: its own are in its file."""
    assert load(lora)[0].head.weight.shape[0] == 3
    assert load(base)[0].head.weight.shape[0] == 2


def test_restore_puts_back_a_model_or_an_adapter(base, lora):
    for folder in (base, lora):
        model, _ = load(folder)
        wanted = outs(model)
        with torch.no_grad():
            model.head.weight.zero_()
        restore(model, folder)
        assert same(outs(model), wanted)


# ------------------------------------------------------------------- many adapters


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_adapters_over_one_base_answer_as_each_alone(family, tmp_path):
    """Of other heads, labels and kinds, in any order and again: the base is read once, its body is
    the same object, and not a bit of it changes."""
    place = base_in(tmp_path / "base", family)
    kinds = [
        *(("lora", "classifier", ("a", "b", "c")), ("prompt", "tokens", ("O", "B-x"))),
        *(("prefix", "span", ()), ("lora", "lm", ()), ("prefix", "classifier", ("u", "v"))),
    ]
    made = [
        (adapter_in(tmp_path / str(i), place, method, head, labels, seed=i), head)
        for i, (method, head, labels) in enumerate(kinds)
    ]
    wanted = [outs(load(folder)[0], head) for folder, head in made]
    files, adapters, body, bytes_ = contents(place), Adapters(place), None, None
    for i in (0, 1, 2, 3, 4, 0, 3, 1, 1):
        folder, head = made[i]
        model, tokenizer = adapters.use(folder)
        assert same(outs(model, head), wanted[i]), kinds[i]
        assert model.config.head == head
        assert tokenizer.max_length == body_of(model).room == model.config.room
        own = {n.partition(".")[2]: p for n, p in body_of(model).named_parameters(prefix="b")}
        own = {n: p for n, p in own.items() if not any(x in n for x in ADDED)}
        body, bytes_ = body or body_of(model), bytes_ or {n: p.clone() for n, p in own.items()}
        assert body_of(model) is body
        assert own.keys() == bytes_.keys()
        assert all(torch.equal(p, bytes_[n]) for n, p in own.items())
    assert contents(place) == files


def test_an_adapter_that_does_not_fit_leaves_the_others_usable(base, lora, tmp_path):
    other = adapter_in(tmp_path / "x", base_in(tmp_path / "other", seed=7), "lora")
    broken = tmp_path / "broken"
    shutil.copytree(lora, broken)
    (broken / WEIGHTS).write_bytes(b"x")
    adapters = Adapters(str(base))
    wanted = outs(adapters.use(lora)[0])
    cases = (other, "of another base"), (base, "expected an adapter"), (broken, str(broken))
    for folder, message in cases:
        with pytest.raises(InputError, match=message):
            adapters.use(folder)
        assert same(outs(adapters.use(lora)[0]), wanted)


# ------------------------------------------------------------------------- merging


@pytest.mark.parametrize("head", AUTO)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_a_merged_model_is_one_that_transformers_loads(family, head, tmp_path, capsys):
    """Without a tensor missing or unexpected, and it says the same."""
    place = base_in(tmp_path / "base", family)
    folder = adapter_in(tmp_path / "adapter", place, "lora", head)
    model, _ = load(folder)
    wanted = outs(model, head)
    done = call(capsys, "merge", "--model", folder, "--output", tmp_path / "merged")
    assert (done.status, done.out) == (0, "")
    assert "a model of its own, for minift and transformers" in done.err
    again, _ = load(tmp_path / "merged")
    outs_near(outs(again, head), wanted)
    assert again.config.labels == model.config.labels
    assert "adapter" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    auto = AutoModelForCausalLM if (family, head) == ("gpt2", "lm") else AUTO[head]
    peer, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor(inputs()[0].tokens)[None]
    out = peer(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = torch.stack([out.start_logits, out.end_logits], -1) if head == "span" else out.logits
    outs_near([found[0].detach()], wanted[:1])


def test_merging_takes_the_base_that_is_given_and_a_new_folder(base, lora, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "moved")
    words = ("merge", "--model", tmp_path / "moved", "--adapter", lora)
    assert call(capsys, *words, "--output", tmp_path / "m").status == 0
    outs_near(outs(load(tmp_path / "m")[0]), outs(load(lora)[0]))
    assert_one_line(call(capsys, *words, "--output", tmp_path / "m"), "is there already and not em")
    assert_one_line(
        call(capsys, "merge", "--model", base, "--output", tmp_path / "n"),
        "expected an adapter of LoRA to merge, got a model without",
    )
    prompt = adapter_in(tmp_path / "prompt", base, "prompt")
    assert_one_line(
        call(capsys, "merge", "--model", prompt, "--output", tmp_path / "n"),
        "got a prompt, which is no matrix",
    )
    assert not (tmp_path / "n").exists()


def test_a_merged_model_can_be_trained_on(lora):
    """It is a base like any other."""
    model, _ = load(lora)
    merge(model)
    config = ModelConfig.from_hf(model.config.to_hf())
    adapt(model, Adapter.of(TrainConfig(method="prompt", num_virtual_tokens=P), config))
    assert model.adapter.method == "prompt"
    batch = collate([Example([2] * n, (), 0) for n in LENGTHS if n < 4], [0])
    out = model(batch)
    assert not isinstance(out, Projected)
    assert out.shape == (1, 3)
