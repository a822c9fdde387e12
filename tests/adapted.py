"""Small models of every family and head with an adapter, beside PEFT's: what tests of adapters
start from."""

import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from test_token_heads import random_peer
from torch import Tensor, nn

from minift import Example
from minift.adapter_files import adapter_tensors
from minift.adapters import adapter_of
from minift.batch import collate
from minift.layers import Projected

FAMILIES = "bert", "roberta", "distilbert", "gpt2"
NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "gpt2": "GPT2"}
ENDS = {
    "classifier": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
TASK_TYPES = {
    "classifier": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "lm": "CAUSAL_LM",
}
C, LAYERS, VOCAB, P = 16, 2, 60, 3
SIZES = {  # no dropout
    "bert": dict(hidden_size=C, num_attention_heads=2, num_hidden_layers=LAYERS,
                 intermediate_size=24, max_position_embeddings=32, hidden_dropout_prob=0.0,
                 attention_probs_dropout_prob=0.0),
    "distilbert": dict(dim=C, n_heads=2, n_layers=LAYERS, hidden_dim=24, dropout=0.0,
                       max_position_embeddings=32, attention_dropout=0.0, seq_classif_dropout=0.0),
    "gpt2": dict(n_embd=C, n_head=2, n_layer=LAYERS, n_inner=24, n_positions=32, resid_pdrop=0.0,
                 embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0),
}  # fmt: skip
SIZES["roberta"] = SIZES["bert"] | {"max_position_embeddings": 34}
QV = {  # PEFT's names of queries and values, and of all products
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
}
ALL = {
    "bert": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "roberta": ["query", "key", "value", "dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
LENGTHS = 5, 1, 9, 4


def peer(family: str, head: str, seed: int = 0, labels: int = 3, **changes) -> nn.Module:
    """transformers' model, every number random."""
    name = NAMES[family]
    sizes = SIZES[family] | {"vocab_size": VOCAB} | changes
    if head in ("classifier", "tokens"):
        sizes["num_labels"] = labels
    config = getattr(transformers, name + "Config")(**sizes)
    end = ENDS.get(head) or ("LMHeadModel" if family == "gpt2" else "ForMaskedLM")
    return random_peer(getattr(transformers, name + end), config, seed)


def saved(model: nn.Module, folder: Path) -> Path:
    """Its folder."""
    model.save_pretrained(folder)
    return folder


def of_peft(model: nn.Module, method: str, head: str, seed: int = 7, **settings) -> nn.Module:
    """PEFT's model over transformers', a copy; every number of the adapter is random, so nothing
    hides."""
    kind = {"lora": LoraConfig, "prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[method]
    if method != "lora":
        # Of DistilBERT PEFT does not find these by itself.
        sizes = dict(token_dim=C, num_layers=LAYERS, num_attention_heads=2)
        settings = {"num_virtual_tokens": P} | sizes | settings
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        made = get_peft_model(deepcopy(model), kind(task_type=TASK_TYPES.get(head), **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return made.eval()


def inputs(lengths=LENGTHS, seed: int = 3) -> list[Example]:
    """Sequences of so many tokens."""
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(2, VOCAB, n), (), 0) for n in lengths]


def ours_out(model: nn.Module, given: list[Example], head: str) -> list[Tensor]:
    """Of each sequence what the head says: (labels,), or (L, ...) of its rows."""
    batch = collate(given, range(len(given)))
    out = model(batch)
    out = out.logits() if isinstance(out, Projected) else out
    lengths = batch.layout.lengths
    parts = out.unbind() if head == "classifier" else out[: sum(lengths)].split(lengths)
    return [part for _, part in sorted(zip(batch.rows, parts, strict=False), key=lambda x: x[0])]


def theirs_out(model: nn.Module, given: list[Example], head: str) -> list[Tensor]:
    """The same of transformers' or PEFT's model, each sequence alone; without virtual rows."""
    found = []
    for example in given:
        ids = torch.tensor(example.tokens)[None]
        with warnings.catch_warnings(action="ignore"):
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if head == "span":
            rows = torch.stack([out.start_logits[0], out.end_logits[0]], -1)
        else:
            rows = out.logits[0]
        found.append(rows if head == "classifier" else rows[-len(example.tokens) :])
    return found


def weighted(outs: list[Tensor], seed: int = 11) -> Tensor:
    """A scalar of all outputs: the same numbers for the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs)


@torch.no_grad()
def as_saved(model: nn.Module, numbers: str = "data") -> dict[str, Tensor]:
    """What a file of the adapter holds, of ours and of PEFT's; or the gradients by those names."""
    copy = deepcopy(model)
    if numbers == "grad":
        for (name, p), own in zip(copy.named_parameters(), model.parameters(), strict=True):
            assert own.grad is not None or not own.requires_grad, name
            p.copy_(torch.zeros_like(own) if own.grad is None else own.grad)
    if adapter_of(copy) is not None:
        return adapter_tensors(copy)
    return {k: v.detach().clone() for k, v in get_peft_model_state_dict(copy).items()}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, rtol=1e-5):
    """Every tensor, within a part of its largest number."""
    assert found.keys() == wanted.keys()
    floor = 0.01 * max(x.abs().max().item() for x in wanted.values())
    for name, x in wanted.items():
        error = (found[name] - x).abs().max().item()
        assert found[name].shape == x.shape
        assert error <= rtol * max(x.abs().max().item(), floor), f"{what} of {name}: off by {error}"


def outs_near(found: list[Tensor], wanted: list[Tensor], rtol=1e-5) -> None:
    """Of each sequence."""
    numbered = ({str(i): out.detach() for i, out in enumerate(outs)} for outs in (found, wanted))
    assert_near(*numbered, "output", rtol)
