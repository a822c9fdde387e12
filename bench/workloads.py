"""What is trained side by side: models of random weights on texts of random words.

A workload is a model and how long its texts are. Half of a text's words are of two sets, and which
of these has more words there decides its label: something to learn, at any speed. The rest are any
words. All of it is a function of the seed.

A GPT predicts each token of a block from those before it. Some tokens are frequent and most are
rare, as words are: what there is to learn is how frequent. It drops nothing out, as GPT-2 is
pretrained, so all peers compute the same losses. A step is 64k tokens. Weights, gradients and
moments of a peer take 16 to 18 bytes a parameter, and what backward needs about 32 C bytes a token
and layer in minift, whose graphs keep it, and perhaps 120 C in eager transformers: micro-batches
are as large as lets all peers lie beside each other in an H200. A peer that runs out of memory
nevertheless has smaller ones.
"""

import json
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from minift import Batches, Example, TrainConfig, save_model
from minift.config import ModelConfig
from minift.layers import init_weights
from minift.ops import IGNORE_INDEX
from minift.weights import make_model

BATCH = 32
DROPOUT = 0.1
CLS, SEP, FIRST_WORD = 101, 102, 1000  # of BERT's vocabulary; words follow
SET = 32  # words of each set


def bert(layers: int, width: int, heads: int, **others: int) -> dict:
    """The config.json of a BERT, as transformers has it, in the sizes of the published ones."""
    return {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        **others,
    }


def gpt(layers: int, width: int, heads: int, vocab: int = 50257, positions: int = 1024) -> dict:
    """The config.json of a GPT-2, likewise."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "vocab_size": vocab,
        "n_positions": positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": vocab - 1,
        "eos_token_id": vocab - 1,
    }


MODELS = {
    "MiniLM-L6": bert(6, 384, 12),
    "BERT-base": bert(12, 768, 12),
    "BERT-large": bert(24, 1024, 16),
    "tiny": bert(2, 64, 2, vocab_size=2000, max_position_embeddings=64),
    "GPT-2 124M": gpt(12, 768, 12),
    "GPT-2 355M": gpt(24, 1024, 16),
    "GPT-2 774M": gpt(36, 1280, 20),
    "GPT-2 1.5B": gpt(48, 1600, 25),
    "tiny GPT-2": gpt(2, 64, 2, vocab=1020, positions=48),
}
LENGTHS = {  # tokens, [CLS] and [SEP] among them: mean, standard deviation, least, most
    "SST-2": (25, 10, 5, 64),
    "SQuAD": (175, 70, 20, 384),
    "full 384": (384, 0, 384, 384),
    "short": (10, 4, 4, 24),
    "LM 1024": (1024, 0, 1024, 1024),
    "LM 48": (48, 0, 48, 48),
}
# At which a model learns in some hundred steps; 5e-5 for others.
RATES = {"tiny": 1e-3, "tiny GPT-2": 1e-2, "GPT-2 124M": 6e-4, "GPT-2 355M": 3e-4}
RATES |= {"GPT-2 774M": 2.5e-4, "GPT-2 1.5B": 2e-4}
FREQUENT = 10  # the more, the flatter: token k is there as often as 1 / (k + FREQUENT)
CHECKED = 2  # blocks in the micro-batches that gradients are compared on


@dataclass(frozen=True)
class Workload:
    """A model on texts of some lengths."""

    model: str  # an entry of MODELS
    data: str  # an entry of LENGTHS
    batch: int = BATCH  # sequences in a step
    micro_batches: int = 1  # that they are cut into
    room: int = 99  # peers whose weights and moments lie beside each other in an H200

    @property
    def name(self) -> str:
        return f"{self.model} {self.data}"

    @property
    def predicts(self) -> bool:
        """Whether tokens are predicted, of a GPT; else labels."""
        return is_gpt(self.model)

    @property
    def learning_rate(self) -> float:
        """At the peak."""
        return RATES.get(self.model, 5e-5)

    @property
    def longest(self) -> int:
        """Tokens of the longest text there can be."""
        return LENGTHS[self.data][3]


def is_gpt(model: str) -> bool:
    """Whether an entry of MODELS is a GPT's."""
    return MODELS[model]["model_type"] == "gpt2"


WORKLOADS = [  # in the order of their weight: --minutes leaves out the last
    Workload("BERT-base", "SST-2"),
    Workload("GPT-2 124M", "LM 1024", batch=64),
    Workload("MiniLM-L6", "SST-2"),
    Workload("BERT-base", "SQuAD"),
    Workload("BERT-large", "full 384"),
    Workload("BERT-large", "SST-2"),
    Workload("BERT-large", "SQuAD"),
    Workload("BERT-base", "full 384"),
]
LARGE = [  # only by name: each takes many minutes
    Workload("GPT-2 355M", "LM 1024", batch=64, micro_batches=2),
    Workload("GPT-2 774M", "LM 1024", batch=64, micro_batches=8),
    Workload("GPT-2 1.5B", "LM 1024", batch=64, micro_batches=16, room=3),
]
TINY = Workload("tiny", "short", batch=8)
TINY_GPT = Workload("tiny GPT-2", "LM 48", batch=4, micro_batches=2)


def lengths(data: str, n: int, seed: int) -> list[int]:
    """Tokens of `n` texts: a normal sample, cut off at both ends."""
    mean, deviation, least, most = LENGTHS[data]
    sample = np.random.default_rng([seed, 1]).normal(mean, deviation, n)
    return np.clip(np.rint(sample), least, most).astype(int).tolist()


def make_examples(workload: Workload, steps: int, seed: int) -> list[Example]:
    """Texts for so many full steps, and their labels or the tokens that follow."""
    return (make_blocks if workload.predicts else make_texts)(workload, steps, seed)


def make_blocks(workload: Workload, steps: int, seed: int) -> list[Example]:
    """Blocks of tokens; what follows the last one is not known."""
    vocabulary, n = MODELS[workload.model]["vocab_size"], steps * workload.batch
    often = (1 / (np.arange(vocabulary) + FREQUENT)).cumsum()
    draw = np.random.default_rng([seed, 2])
    ids = often.searchsorted(draw.random((n, workload.longest)) * often[-1])
    tokens = draw.permutation(vocabulary).astype(np.int32)[ids]
    targets = np.roll(tokens, -1, 1)
    targets[:, -1] = IGNORE_INDEX
    return [Example(*pair) for pair in zip(tokens, [()] * n, targets, strict=True)]


def make_texts(workload: Workload, steps: int, seed: int) -> list[Example]:
    """Texts, half of whose words tell the label."""
    draw = np.random.default_rng([seed, 2])
    vocabulary = MODELS[workload.model]["vocab_size"]
    examples = []
    for length in lengths(workload.data, steps * workload.batch, seed):
        label = int(draw.integers(2))
        words = draw.integers(FIRST_WORD + 2 * SET, vocabulary, length - 2)
        told = draw.random(length - 2) < 0.5  # of the two sets
        told[0] = True  # one word at least
        mine = draw.random(length - 2) < 0.9
        mine[0] = True
        chosen = FIRST_WORD + SET * np.where(mine, label, 1 - label)
        chosen += draw.integers(0, SET, length - 2)
        words[told] = chosen[told]
        more = 2 * int((mine & told).sum()) - int(told.sum())
        if more <= 0:  # the other set has as many words: give all of them to the label's
            words[told & ~mine] += SET * (2 * label - 1)
        tokens = array("i", [CLS, *words.tolist(), SEP])  # as a task's `encode` makes them
        examples.append(Example(tokens, array("b", bytes(length)), label))
    return examples


@dataclass(frozen=True)
class Data:
    """Examples in the order in which every peer sees them: that of minift's `Batches`."""

    batches: Batches
    order: list[int]  # of the only epoch
    longest: int  # tokens of the longest text of the workload

    @staticmethod
    def make(workload: Workload, steps: int, seed: int) -> "Data":
        """One epoch of `steps` steps."""
        examples, parts = make_examples(workload, steps, seed), workload.micro_batches
        batches = Batches(examples, workload.batch // parts, parts, seed)
        return Data(batches, batches.order(0).tolist(), workload.longest)

    @property
    def batch(self) -> int:
        """Sequences in a step."""
        return self.batches.batch_size * self.batches.accumulation

    def halved(self) -> "Data":
        """The same steps, in twice as many micro-batches of half the size."""
        size, parts = self.batches.batch_size // 2, 2 * self.batches.accumulation
        return replace(self, batches=replace(self.batches, batch_size=size, accumulation=parts))

    def checked(self) -> "Data":
        """What gradients are compared on: `skewed` texts, or smaller steps of blocks."""
        if isinstance(self.batches.examples[0].target, int):
            return self.skewed()
        small = replace(self.batches, batch_size=CHECKED, accumulation=2)
        return replace(self, batches=small)

    def skewed(self) -> "Data":
        """The same texts, of which seven in eight have label 1: where labels are balanced, the
        gradients of a new model's examples cancel, and what is left is rounding."""
        examples = [replace(e, target=int(i % 8 > 0)) for i, e in enumerate(self.batches.examples)]
        return replace(self, batches=replace(self.batches, examples=examples))

    def rows(self, step: int) -> list[int]:
        """Numbers of the examples of a step, from 0."""
        size = self.batch
        return self.order[step * size : (step + 1) * size]

    def examples(self, step: int) -> list[Example]:
        """The examples of a step."""
        return [self.batches.examples[row] for row in self.rows(step)]

    def lengths(self, step: int) -> list[int]:
        """The tokens of each of them."""
        return [len(example.tokens) for example in self.examples(step)]


def train_config(workload: Workload, steps: int, seed: int, dtype: str = "bf16") -> TrainConfig:
    """The settings of every peer: clipping at 1, a linear schedule, decay of matrices."""
    return TrainConfig(
        learning_rate=workload.learning_rate,
        per_device_train_batch_size=workload.batch,
        max_steps=steps,
        warmup_steps=20,
        lr_scheduler_type="linear",
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=seed,
        dtype=dtype,
    )


def write_model(model: str, folder: Path, seed: int) -> tuple[Path, Path]:
    """Writes a model of random weights, twice over one file of weights.

    Returns:
        Its folder, and that of the same model without dropout; a GPT has none in either.
        transformers loads both.
    """
    p = 0.0 if is_gpt(model) else DROPOUT
    plain, fixed = folder / "model", folder / "no-dropout"
    for path in (plain, fixed):
        path.mkdir(parents=True)
    save_model(model_of(model, p, seed), plain)
    (fixed / "model.safetensors").symlink_to(plain / "model.safetensors")
    saved = json.loads((plain / "config.json").read_text("utf-8"))
    (fixed / "config.json").write_text(json.dumps(with_dropout(saved, 0.0)), encoding="utf-8")
    return plain, fixed


def model_of(model: str, p: float, seed: int) -> nn.Module:
    """An entry of MODELS, of random weights, with dropout of probability p."""
    labels = {} if is_gpt(model) else {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    config = ModelConfig.from_hf(with_dropout(MODELS[model] | labels, p))
    made = make_model(config, Path(model))
    init_weights(made, config.init_std, seed)
    return made


def with_dropout(raw: dict, p: float) -> dict:
    """A config.json with another probability of dropout, everywhere."""
    if raw["model_type"] == "gpt2":
        return raw | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), p)
    return raw | {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
