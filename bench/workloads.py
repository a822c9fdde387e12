"""What is fine-tuned side by side: models of random weights on texts of random words.

A workload is a model and how long its texts are. Half of a text's words are of two sets, and which
of these has more words there decides its label: something to learn, at any speed. The rest are any
words. All of it is a function of the seed.
"""

import json
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minift import Batches, Example, TrainConfig, save_model
from minift.bert import BertClassifier
from minift.config import ModelConfig
from minift.layers import init_weights

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


MODELS = {
    "MiniLM-L6": bert(6, 384, 12),
    "BERT-base": bert(12, 768, 12),
    "BERT-large": bert(24, 1024, 16),
    "tiny": bert(2, 64, 2, vocab_size=2000, max_position_embeddings=64),
}
LENGTHS = {  # tokens, [CLS] and [SEP] among them: mean, standard deviation, least, most
    "SST-2": (25, 10, 5, 64),
    "SQuAD": (175, 70, 20, 384),
    "full 384": (384, 0, 384, 384),
    "short": (10, 4, 4, 24),
}
RATES = {"tiny": 1e-3}  # at which a model learns in some hundred steps


@dataclass(frozen=True)
class Workload:
    """A model on texts of some lengths."""

    model: str  # an entry of MODELS
    data: str  # an entry of LENGTHS
    batch: int = BATCH

    @property
    def name(self) -> str:
        return f"{self.model} {self.data}"

    @property
    def learning_rate(self) -> float:
        """At the peak."""
        return RATES.get(self.model, 5e-5)

    @property
    def longest(self) -> int:
        """Tokens of the longest text there can be."""
        return LENGTHS[self.data][3]


WORKLOADS = [  # in the order of their weight: --minutes leaves out the last
    Workload("BERT-base", "SST-2"),
    Workload("MiniLM-L6", "SST-2"),
    Workload("BERT-base", "SQuAD"),
    Workload("BERT-large", "full 384"),
    Workload("BERT-large", "SST-2"),
    Workload("BERT-large", "SQuAD"),
    Workload("BERT-base", "full 384"),
]
TINY = Workload("tiny", "short", batch=8)


def lengths(data: str, n: int, seed: int) -> list[int]:
    """Tokens of `n` texts: a normal sample, cut off at both ends."""
    mean, deviation, least, most = LENGTHS[data]
    sample = np.random.default_rng([seed, 1]).normal(mean, deviation, n)
    return np.clip(np.rint(sample), least, most).astype(int).tolist()


def make_examples(workload: Workload, steps: int, seed: int) -> list[Example]:
    """Texts for so many full steps, and their labels."""
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
        batches = Batches(make_examples(workload, steps, seed), workload.batch, seed=seed)
        return Data(batches, batches.order(0).tolist(), workload.longest)

    def skewed(self) -> "Data":
        """The same texts, of which seven in eight have label 1: where labels are balanced, the
        gradients of a new model's examples cancel, and what is left is rounding."""
        examples = [replace(e, target=int(i % 8 > 0)) for i, e in enumerate(self.batches.examples)]
        return replace(self, batches=replace(self.batches, examples=examples))

    def rows(self, step: int) -> list[int]:
        """Numbers of the examples of a step, from 0."""
        size = self.batches.batch_size
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
    """Writes a classifier of random weights, twice over one file of weights.

    Returns:
        Its folder, and that of the same model without dropout. transformers loads either.
    """
    raw = MODELS[model] | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    config = ModelConfig.from_hf(with_dropout(raw, DROPOUT))
    classifier = BertClassifier(config)
    init_weights(classifier, config.init_std, seed)
    plain, fixed = folder / "model", folder / "no-dropout"
    for made in (plain, fixed):
        made.mkdir(parents=True)
    save_model(classifier, plain)
    (fixed / "model.safetensors").symlink_to(plain / "model.safetensors")
    saved = json.loads((plain / "config.json").read_text("utf-8"))
    (fixed / "config.json").write_text(json.dumps(with_dropout(saved, 0.0)), encoding="utf-8")
    return plain, fixed


def with_dropout(raw: dict, p: float) -> dict:
    """A config.json with another probability of dropout, everywhere."""
    return raw | {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
