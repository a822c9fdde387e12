"""Adapters on disk: what we write PEFT reads, what PEFT writes we read, and nothing else is taken
for one."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from adapted import (
    ALL,
    FAMILIES,
    QV,
    C,
    P,
    as_saved,
    inputs,
    of_peft,
    ours_out,
    outs_near,
    peer,
    saved,
    theirs_out,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_adapters import scattered
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
)

from minift import TrainConfig, load_model
from minift.adapter_files import (
    CONFIG,
    PROJECTION,
    WEIGHTS,
    fingerprint,
    is_adapter,
    note_base,
)
from minift.adapters import Adapter, adapt
from minift.errors import InputError
from minift.layers import body_of
from minift.saving import load_adapted, restore, save_trained

LABELS = ("a", "b", "c")


def trained(base: Path, head: str, method: str, **settings):
    """Our model over a base, with an adapter of random numbers, as a run leaves it."""
    labels = LABELS if head in ("classifier", "tokens") else None
    model, report = load_model(base, labels, 0, head)
    virtual = {} if method == "lora" else {"num_virtual_tokens": P}
    config = TrainConfig(method=method, **virtual | settings)
    adapt(model, Adapter.of(config, model.config), tuple(report.new))
    note_base(model, str(base))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name in model.adapter.whole:
            p = model.get_parameter(name)
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return scattered(model).eval()


def written(model: torch.nn.Module, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_trained(model, folder)
    return folder


def in_peft(base: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """PEFT's own reading of a folder; it may warn of nothing that is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(base, folder).eval()


CASES = [
    (family, head, method, settings)
    for family in FAMILIES
    for head, method, settings in [
        ("classifier", "lora", dict(lora_r=3, lora_alpha=5.0)),
        ("classifier", "lora", dict(lora_targets="down")),
        ("classifier", "lora", dict(lora_targets="all", lora_r=2)),
        ("classifier", "prompt", {}),
        ("tokens", "lora", dict(lora_targets="k,out,up", lora_r=3)),
        ("tokens", "prompt", {}),
        ("span", "lora", {}),
        ("span", "prompt", {}),
    ]
] + [
    ("gpt2", "lm", "lora", dict(lora_targets="q,k,v,down", lora_r=3)),
    ("gpt2", "lm", "lora", dict(lora_targets="qkv,out")),
    ("gpt2", "lm", "prompt", {}),
    ("gpt2", "lm", "prefix", {}),
    ("gpt2", "lm", "prefix", dict(prefix_projection=True, prefix_hidden_size=5)),
]


@pytest.mark.parametrize(("family", "head", "method", "settings"), CASES, ids=str)
def test_what_we_write_is_pefts_and_comes_back_to_the_bit(family, head, method, settings, tmp_path):
    """The head too, which the base has other numbers of."""
    base = peer(family, head)
    model = trained(saved(base, tmp_path / "base"), head, method, **settings)
    written(model, folder := tmp_path / "adapter")
    assert is_adapter(folder)
    assert not is_adapter(tmp_path / "base")
    given = inputs()
    found = ours_out(model, given, head)
    outs_near(found, theirs_out(in_peft(base, folder), given, head))
    again = load_adapted(folder, tmp_path / "base")
    numbers, others = as_saved(model), as_saved(again)
    assert numbers.keys() == others.keys()
    assert all(torch.equal(numbers[name], others[name]) for name in numbers)
    assert all(torch.equal(a, b) for a, b in zip(found, ours_out(again, given, head), strict=True))
    if settings.get("prefix_projection"):
        ours, theirs = (body_of(m).prefix.state_dict() for m in (model, again))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert len(ours) == 5
    written(again, tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize(
    ("family", "dense"), [("bert", "pooler"), ("distilbert", "pre_classifier")]
)
def test_a_dense_layer_that_the_base_does_not_have_is_saved_with_the_head(
    family, dense, method, tmp_path
):
    """A bare body: its classifier's first layer is as new as its last, and PEFT must find both."""
    whole = peer(family, "classifier")
    body = getattr(whole, family)
    if family == "bert":
        body = BertModel(whole.config, add_pooling_layer=False)
        body.load_state_dict(whole.bert.state_dict(), strict=False)
    model = trained(saved(body, tmp_path / "base"), "classifier", method)
    assert any(name.startswith("pooler") for name in model.adapter.whole)
    written(model, folder := tmp_path / "adapter")
    dense = {"bert": "pooler", "distilbert": "pre_classifier"}[family]
    assert dense in json.loads((folder / CONFIG).read_text())["modules_to_save"]
    given = inputs()
    with warnings.catch_warnings(action="ignore"):
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    found = ours_out(model, given, "classifier")
    outs_near(found, theirs_out(in_peft(base, folder), given, "classifier"))
    again = load_adapted(folder, tmp_path / "base")
    assert all(
        torch.equal(a, b) for a, b in zip(found, ours_out(again, given, "classifier"), strict=True)
    )


def test_a_pooler_of_the_base_stays_with_it(tmp_path):
    """BERT's is pretrained: an adapter does not hold it, and PEFT does not look for it."""
    model = trained(saved(peer("bert", "classifier"), tmp_path / "base"), "classifier", "lora")
    written(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["modules_to_save"] == [
        "classifier"
    ]
    assert not any("pooler" in name for name in load_file(tmp_path / "adapter" / WEIGHTS))


@pytest.mark.parametrize(
    ("method", "head", "family", "flag"),
    [
        ("lora", "classifier", "bert", True),
        ("lora", "lm", "bert", False),
        ("lora", "lm", "roberta", False),
        ("lora", "lm", "distilbert", False),
        ("prompt", "tokens", "bert", True),
        ("prompt", "lm", "bert", False),
        ("prefix", "classifier", "bert", False),
        ("prefix", "classifier", "gpt2", False),
        ("prefix", "lm", "gpt2", True),
        ("prefix", "lm", "roberta", False),
    ],
)
def test_config_json_says_what_peft_has_no_model_for(method, head, family, flag, tmp_path):
    """And it comes back to the bit here all the same."""
    model = trained(saved(peer(family, head), tmp_path / "base"), head, method)
    written(model, folder := tmp_path / "adapter")
    assert json.loads((folder / "config.json").read_text())["adapter"]["peft"] is flag
    again = load_adapted(folder, tmp_path / "base")
    outs = (ours_out(m, inputs(), head) for m in (model, again))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# ------------------------------------------------------------------ PEFT's own


THEIRS = [
    ("bert", "classifier", "lora", dict(r=4, lora_alpha=6, target_modules=QV["bert"])),
    ("bert", "classifier", "lora",
     dict(r=4, lora_alpha=6, use_rslora=True, target_modules=QV["bert"])),
    ("bert", "tokens", "lora", dict(r=4, rank_pattern={"output.dense": 2}, lora_alpha=3,
     alpha_pattern={"layer.1.output.dense": 9, "output.dense": 5, "query": 8, "key|value": 8},
     target_modules=ALL["bert"])),
    ("bert", "classifier", "lora", dict(r=2, layers_to_transform=[1], target_modules=QV["bert"])),
    ("bert", "classifier", "lora",
     dict(r=2, modules_to_save=["pooler"], target_modules=["output.dense"])),
    ("roberta", "classifier", "lora", dict(r=2, target_modules="all-linear")),
    ("distilbert", "classifier", "lora", dict(r=2, target_modules=ALL["distilbert"])),
    ("gpt2", "lm", "lora", dict(r=2, lora_alpha=3, target_modules=["c_attn"])),
    ("gpt2", "classifier", "lora", dict(r=2, target_modules=ALL["gpt2"])),
    ("gpt2", "lm", "prompt", {}),
    ("gpt2", "lm", "prefix", dict(prefix_projection=True)),
    ("roberta", "span", "prompt", {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "head", "method", "settings"), THEIRS, ids=str)
def test_what_peft_writes_says_the_same_here(family, head, method, settings, tmp_path):
    """Without a config.json of ours; and written by us it says so again, to PEFT and to us."""
    base = peer(family, head)
    theirs = of_peft(base, method, head, **settings)
    folder, place = saved(theirs, tmp_path / "adapter"), saved(base, tmp_path / "base")
    assert not (folder / "config.json").exists()
    given = inputs()
    wanted = theirs_out(theirs, given, head)
    model = load_adapted(folder, place)
    outs_near(ours_out(model, given, head), wanted)
    written(model, tmp_path / "again")
    outs_near(theirs_out(in_peft(base, tmp_path / "again"), given, head), wanted)
    again = load_adapted(tmp_path / "again", place)
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(ours_out(again, given, head), wanted, strict=True)
    )


def test_labels_of_pefts_adapters_are_as_many_as_their_head_has(tmp_path):
    """The base is of two labels, the adapter of five: nobody says their names."""
    base = peer("bert", "classifier", labels=5)
    theirs = of_peft(base, "lora", "classifier", target_modules=QV["bert"])
    place = saved(peer("bert", "classifier", labels=2), tmp_path / "base")
    with torch.no_grad():
        for name, p in base.bert.named_parameters():
            p.copy_(peer("bert", "classifier", labels=2).bert.get_parameter(name))
    model = load_adapted(saved(theirs, tmp_path / "adapter"), place)
    assert model.config.labels == tuple(f"LABEL_{i}" for i in range(5))


def test_a_distilberts_dense_layer_may_be_the_bases(tmp_path):
    """PEFT saves it too; where it is not in the file, the base has it, or nobody."""
    base = peer("distilbert", "classifier")
    theirs = of_peft(base, "lora", "classifier", target_modules=QV["distilbert"])
    saved(theirs, tmp_path / "adapter"), saved(base, tmp_path / "base")
    path = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(path)
    with torch.no_grad():
        for end in ("weight", "bias"):
            tensors.pop(f"base_model.model.pre_classifier.{end}")
            own = theirs.get_parameter(
                f"base_model.model.pre_classifier.modules_to_save.default.{end}"
            )
            own.copy_(base.get_parameter(f"pre_classifier.{end}"))
    save_file(tensors, path)
    model = load_adapted(tmp_path / "adapter", tmp_path / "base")
    assert [n for n in model.adapter.whole if n.startswith("pooler")] == []
    outs_near(ours_out(model, inputs(), "classifier"), theirs_out(theirs, inputs(), "classifier"))
    saved(base.distilbert, tmp_path / "bare")
    with pytest.raises(InputError, match=r"expected a tensor 'base_model.model.pre_classifier"):
        load_adapted(tmp_path / "adapter", tmp_path / "bare")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "has use_dora, which is not built"),
        ({"bias": "lora_only"}, "has bias, which is not built"),
        ({"lora_bias": True}, "has lora_bias, which"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices, which"),
        ({"target_parameters": ["x"]}, "has target_parameters, which"),
        ({"peft_type": "IA3"}, "expected peft_type LORA, PROMPT_TUNING, PREFIX_TUNING, got 'IA3'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "expected task_type SEQ_CLS, TOKEN_CLS, QUESTION_ANS, "),
        ({"rank_pattern": {}, "alpha_pattern": {"query": 3}}, "other ranks in"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused(changes, message, tmp_path):
    base = peer("bert", "classifier")
    theirs = of_peft(base, "lora", "classifier", target_modules=QV["bert"])
    folder, place = saved(theirs, tmp_path / "adapter"), saved(base, tmp_path / "base")
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | changes))
    with pytest.raises(InputError) as caught:
        load_adapted(folder, place)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------- what does not fit


def refused(folder: Path, place: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load_adapted(folder, place)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def pair(tmp_path):
    """A base, an adapter over it."""
    place = saved(peer("bert", "classifier"), tmp_path / "base")
    written(trained(place, "classifier", "lora"), tmp_path / "adapter")
    return tmp_path / "adapter", place


def test_another_base_of_the_same_sizes_is_refused(pair, tmp_path):
    """One tensor of it is another; a file in other precision, or another head, is not another."""
    folder, place = pair
    weights = load_file(place / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    changed = weights | {name: weights[name] * 1.01}
    save_file(changed, place / "model.safetensors", {"format": "pt"})
    refused(folder, place, "is an adapter of another base than this bert", str(place))
    head = weights | {"classifier.weight": weights["classifier.weight"] + 1}
    save_file(head, place / "model.safetensors", {"format": "pt"})
    load_adapted(folder, place)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_a_fingerprint_is_of_the_base_alone(method, tmp_path):
    """Neither what an adapter adds nor how it has learned changes it."""
    place = saved(peer("bert", "classifier"), tmp_path / "base")
    bare, _ = load_model(place)
    model = trained(place, "classifier", method)
    assert fingerprint(model) == fingerprint(bare) == model.config.adapter["fingerprint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=20), "of dim 16,"),
        (dict(num_hidden_layers=3), "of n_layer 2,"),
        (dict(num_attention_heads=4), "of n_head 2,"),
        (dict(vocab_size=61), "of vocab_size 60,"),
    ],
)
def test_a_base_of_other_sizes_is_refused(pair, changes, message, tmp_path):
    other = saved(peer("bert", "classifier", **changes), tmp_path / "other")
    refused(pair[0], other, "is an adapter of another base", message, str(other))


def test_a_base_of_another_family_is_refused(pair, tmp_path):
    other = saved(peer("distilbert", "classifier"), tmp_path / "other")
    refused(pair[0], other, "of family bert,", "has distilbert")


def test_a_prompt_of_another_width_is_refused(tmp_path):
    theirs = of_peft(peer("gpt2", "lm"), "prompt", "lm")
    folder = saved(theirs, tmp_path / "adapter")
    other = saved(peer("gpt2", "lm", n_embd=24), tmp_path / "other")
    refused(folder, other, "is for a model of width 16, this one's is 24")


def test_more_virtual_tokens_than_positions_are_refused(tmp_path):
    theirs = of_peft(peer("gpt2", "lm"), "prompt", "lm", num_virtual_tokens=9)
    folder = saved(theirs, tmp_path / "adapter")
    other = saved(peer("gpt2", "lm", n_positions=9), tmp_path / "other")
    refused(folder, other, "expected num_virtual_tokens in 1 to 8, got 9")


EDITS = {
    "missing": (lambda t, n: t.pop(n), "expected a tensor"),
    "extra": (lambda t, n: t.update(more=torch.zeros(2)), "1 tensors that this adapter does not"),
    "shape": (lambda t, n: t.update({n: t[n][:1].clone()}), "the file holds"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "projection"])
@pytest.mark.parametrize("head", [False, True], ids=["adapter", "head"])
def test_a_file_that_lacks_or_has_too_much_is_one_clear_line(edit, method, head, tmp_path):
    settings = {"prefix_projection": True} if method == "projection" else {}
    kind = "prefix" if settings else method
    place = saved(peer("bert", "classifier"), tmp_path / "base")
    written(trained(place, "classifier", kind, **settings), folder := tmp_path / "adapter")
    path = folder / (PROJECTION if settings and not head else WEIGHTS)
    tensors, (change, message) = load_file(path), EDITS[edit]
    start = "base_model.model." if method == "lora" else "base_model."
    own = {
        "lora": "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight",
        "projection": "up",
    }.get(method, "prompt_embeddings")
    name = start + "classifier.weight" if head else own
    assert name in tensors
    change(tensors, name)
    save_file(tensors, path)
    refused(folder, place, str(path), message, "more" if edit == "extra" else "")


def test_numbers_where_parts_of_a_projection_do_not_meet_are_not_dropped(tmp_path):
    """A file of queries and values in GPT-2's one projection, trained on by somebody for whom they
    are one: its B has no zeros any more."""
    place = saved(peer("gpt2", "lm"), tmp_path / "base")
    written(trained(place, "lm", "lora"), folder := tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    tensors[name][C + 1, 0] = 1.0
    save_file(tensors, folder / WEIGHTS)
    refused(folder, place, "expected zeros in", "delete config.json beside it")
    (folder / "config.json").unlink()
    load_adapted(folder, place)


def test_a_damaged_file_is_one_clear_line(pair):
    folder, place = pair
    (folder / WEIGHTS).write_bytes(b"no tensors")
    refused(folder, place, str(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    refused(folder, place, str(folder))
    (folder / CONFIG).write_text("{")
    refused(folder, place, str(folder / CONFIG))


def test_a_checkpoint_goes_back_into_the_model_it_is_of(pair):
    """`restore` puts every number back, and asks for no base."""
    folder, place = pair
    model = trained(place, "classifier", "lora")
    wanted = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name in (*model.adapter.whole, "bert.layers.0.attention.qkv.lora.b.1.weight"):
            model.get_parameter(name).zero_()
    restore(model, folder)
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_folder_holds_an_adapter_or_a_model(method, pair):
    """Beside the other it would not be found."""
    folder, place = pair
    model = trained(place, "classifier", "lora") if method == "lora" else load_model(place)[0]
    with pytest.raises(InputError, match="would not be found: save it elsewhere"):
        written(model, place if method == "lora" else folder)
