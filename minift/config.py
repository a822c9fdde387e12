"""What a model is (ModelConfig), how it is trained (TrainConfig), what one run reads and writes
(RunConfig). Fields of the last two are the command line's flags and a TOML file's names."""

import json
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from .errors import InputError, unknown
from .families import FAMILIES, Family

TASKS = ("classification", "multilabel", "regression", "tagging", "qa", "lm", "instruct", "mlm")
LABELLED = ("classifier", "tokens")  # heads with an output for each label
ENDINGS = {  # head -> how transformers' names of such models end
    "classifier": ("ForSequenceClassification",),
    "tokens": ("ForTokenClassification",),
    "span": ("ForQuestionAnswering",),
    "lm": ("ForMaskedLM", "LMHeadModel"),
}
PROBLEMS = {  # task of a classifier -> transformers' name of its loss
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
ACTIVATIONS = {  # Hugging Face's name -> the operation's
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to know what the weights mean. Read from and saved as config.json."""

    vocab_size: int                  # rows of the token table
    max_len: int                     # tokens of the longest sequence
    n_types: int                     # rows of the type table; 0: there is none
    dim: int                         # C, width of the residual stream
    n_layer: int
    n_head: int
    ffn_dim: int                     # F, width inside the MLP
    activation: str                  # gelu_erf or gelu_tanh
    norm_eps: float                  # added to the variance
    embedding_dropout: float         # after embeddings
    hidden_dropout: float            # after both halves of a layer
    attention_dropout: float         # on the attention probabilities
    classifier_dropout: float        # before the head
    init_std: float                  # of random weights
    family: str = "bert"             # an entry of FAMILIES
    head: str = "classifier"         # of texts; "tokens" of tokens; "span"; "lm" predicts tokens
    position_offset: int = 0         # rows of the position table before the first token's
    pad: int = 0                     # id of the padding token, which is nowhere in a batch
    labels: tuple[str, ...] = ()     # names of the head's classes
    pairs: bool | None = None        # whether it was trained on pairs; None: nobody says
    task: str = ""                   # what it was trained for; "": nobody says
    template: tuple[str, str] | None = None  # of prompts and responses, of an instructed model
    settings: dict[str, Any] = field(default_factory=dict)  # what its task must know to predict
    adapter: dict[str, Any] = field(default_factory=dict)  # of which kind, over which base
    raw: dict[str, Any] = field(default_factory=dict, compare=False)  # config.json as it was read

    @staticmethod
    def from_hf(raw: dict[str, Any]) -> "ModelConfig":
        """Reads the content of a Hugging Face config.json.

        Raises:
            InputError: a value is missing or of the wrong kind, or asks for what is not built.
        """
        kind = raw.get("model_type")
        if kind not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise InputError(f"expected model_type {known} in config.json, got {kind!r}")
        family = FAMILIES[kind]
        raw = {family.aliases.get(key, key): value for key, value in raw.items()}
        act = _built(raw, family)
        number = partial(_number, raw, family)
        hidden_dropout, pad = number("hidden_dropout", float, 0.1), number("pad", int, low=0)
        offset = pad + 1 if family.offset_positions else 0
        wide = 4 * number("dim", int) if family.decoder else None
        pairs, template = raw.get("pairs"), raw.get("template")
        settings = raw.get("task_settings")
        texts = isinstance(template, list) and [type(part) for part in template] == [str, str]
        config = ModelConfig(
            vocab_size=number("vocab_size", int),
            max_len=number("positions", int) - offset,
            n_types=number("n_types", int),
            dim=number("dim", int),
            n_layer=number("n_layer", int),
            n_head=number("n_head", int),
            ffn_dim=number("ffn_dim", int, wide),
            activation=ACTIVATIONS[act],
            norm_eps=number("norm_eps", float, 1e-12),
            embedding_dropout=number("embedding_dropout", float, hidden_dropout),
            hidden_dropout=hidden_dropout,
            attention_dropout=number("attention_dropout", float, 0.1),
            classifier_dropout=number("classifier_dropout", float, hidden_dropout),
            init_std=number("init_std", float, 0.02, high=100),
            family=kind,
            head=_head(raw),
            position_offset=offset,
            pad=pad,
            labels=_labels(raw),
            pairs=pairs if isinstance(pairs, bool) else None,
            task=_task(raw),
            template=tuple(template) if texts else None,
            settings=settings if isinstance(settings, dict) else {},
            adapter=adapter if isinstance(adapter := raw.get("adapter"), dict) else {},
            raw=dict(raw),
        )
        if config.max_len < 1:
            key = family.keys["positions"]
            raise InputError(f"expected more than {offset} {key}, got too few")
        if config.dim % config.n_head:
            key = family.keys["dim"]
            raise InputError(f"{key}={config.dim} is not divisible by {config.n_head} heads")
        return config

    @property
    def kind(self) -> Family:
        """The family's entry."""
        return FAMILIES[self.family]

    @property
    def room(self) -> int:
        """Tokens of the longest text: virtual ones have positions, too."""
        count = self.adapter.get("count") if self.adapter.get("method") != "lora" else 0
        return self.max_len - (count if isinstance(count, int) else 0)

    @property
    def trained_head(self) -> bool:
        """Whether config.json is that of a model with this head: not of a bare encoder, or of a
        model for another task."""
        names, ends = self.raw.get("architectures"), ENDINGS[self.head]
        if self.head in LABELLED:
            names = bool(self.labels) and (names or ends * (self.head == "classifier"))
        return any(str(name).endswith(ends) for name in names or ())

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json: what was read, with the labels of the trained head."""
        old = {"_name_or_path", "torch_dtype", "task", "template", "task_settings", "adapter"}
        known = {"pairs": self.pairs, "task": self.task or None}
        known["template"] = self.template and list(self.template)
        known["task_settings"], known["adapter"] = self.settings or None, self.adapter or None
        if self.head in LABELLED:
            known["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
            known["label2id"] = {name: i for i, name in enumerate(self.labels)}
        if self.head == "classifier":
            known["problem_type"] = PROBLEMS.get(self.task, PROBLEMS["classification"])
            if self.kind.decoder and self.raw.get("pad_token_id") is None:
                # transformers finds the last token by it, and refuses batches without one.
                old, known["pad_token_id"] = old | {"pad_token_id"}, self._eos()
        else:
            old |= {"problem_type"}
        if self.head not in LABELLED:
            old |= {"id2label", "label2id"}
        if self.head == "lm":
            known["tie_word_embeddings"] = True
        return {
            **{k: v for k, v in self.raw.items() if k not in old},
            "architectures": [self.kind.architectures[self.head]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "dtype": "float32",
            **{k: v for k, v in known.items() if v is not None},
        }

    def _eos(self) -> int | None:
        """What ends a text, if it is in the vocabulary."""
        eos = self.raw.get("eos_token_id", self.kind.defaults.get("eos"))
        eos = eos[0] if isinstance(eos, list) and eos else eos
        return eos if isinstance(eos, int) and 0 <= eos < self.vocab_size else None


def _built(raw: dict[str, Any], family: Family) -> str:
    """Its activation, if nothing else is asked for that is not built."""
    if raw.get("position_embedding_type") not in (None, "absolute"):
        raise InputError("expected absolute positions in config.json, got relative ones")
    for key, value in family.must_be.items():
        if raw.get(key) is not None and raw[key] is not value:
            expected, found = json.dumps(value), json.dumps(raw[key], default=str)
            raise InputError(f"expected {key} {expected} in config.json, got {found}: not built")
    key = family.keys["activation"]
    act = raw.get(key, family.defaults.get("activation", "gelu"))
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise InputError(f"expected {key} {' or '.join(ACTIVATIONS)}, got {act!r}")
    return act


def _number(
    raw: dict[str, Any],
    family: Family,
    name: str,
    kind: type,
    default: float | None = None,
    low: int = 1,
    high: int = 1,
) -> float:
    """A setting of config.json by our name; of fractions, as dropout and eps, all below `high`."""
    key, default = family.keys[name], family.defaults.get(name, default)
    value = default if key is None or raw.get(key) is None else raw[key]
    low, high = (low, 2**31) if kind is int else (0, high)
    fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if key is not None and not (fits and low <= value < high):  # NaN compares false
        span = f"a number in [{low}, {high})"
        raise InputError(f"expected {key} in config.json as {span}, got {value!r}")
    return kind(value)


def _head(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    names = names if isinstance(names, list) else []
    for head, ends in ENDINGS.items():
        if any(str(name).endswith(ends) for name in names):
            return head
    return "classifier"


def _task(raw: dict[str, Any]) -> str:
    """What the model was trained for; of transformers' classifiers their kind of loss says it, or
    else one output alone, which is a number there (`ForSequenceClassificationLoss`)."""
    task, problem = raw.get("task"), raw.get("problem_type")
    found = {name: task for task, name in PROBLEMS.items() if task != "classification"}
    if problem is None and len(_labels(raw)) == 1:
        problem = PROBLEMS["regression"]
    return task if task in TASKS else found.get(problem, "") if _head(raw) == "classifier" else ""


def _labels(raw: dict[str, Any]) -> tuple[str, ...]:
    labels, ends = raw.get("id2label") or {}, ENDINGS["classifier"] + ENDINGS["tokens"]
    if not labels and str((raw.get("architectures") or [""])[0]).endswith(ends):
        labels = {"0": "LABEL_0", "1": "LABEL_1"}  # the only ones that files leave out
    try:
        labels = tuple(str(labels[k]) for k in sorted(labels, key=int))
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"expected id2label as number -> name, got {labels!r}") from None
    if len(set(labels)) < len(labels):
        raise InputError(f"expected different names in id2label, got {', '.join(labels)}")
    return labels


def flag(default: Any, help: str, *aliases: str, choices: tuple[str, ...] = ()) -> Any:
    """A field that is a flag: its default, its help text, its short names."""
    return field(default=default, metadata={"help": help, "aliases": aliases, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    learning_rate: float = flag(5e-5, "peak learning rate; where none is given 3e-3 of bitfit, "
                                      "1e-3 of lora, 3e-2 of prompt, 1e-2 of prefix", "lr")
    num_train_epochs: float = flag(3.0, "passes over the training rows", "epochs")
    max_steps: int = flag(0, "stop after so many optimizer steps; 0: as num_train_epochs says")
    per_device_train_batch_size: int = flag(32, "sequences in a micro-batch", "batch_size")
    gradient_accumulation_steps: int = flag(1, "micro-batches in an optimizer step")
    warmup_steps: float = flag(0.0, "steps of linear warm-up; below 1: a share of all steps")
    lr_scheduler_type: str = flag("linear", "after warm-up",
                                  choices=("linear", "cosine", "constant"))
    weight_decay: float = flag(0.01, "decay of matrices; norms and biases have none")
    optim: str = flag("adamw", "adamw decays the weights themselves; adam and sgd as L2, in the "
                      "gradient", choices=("adamw", "adam", "sgd"))
    momentum: float = flag(0.9, "share of the last update that an sgd step keeps")
    adam_beta1: float = flag(0.9, "decay of the first moment")
    adam_beta2: float = flag(0.999, "decay of the second moment")
    adam_epsilon: float = flag(1e-8, "added to the root of the second moment")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0: never")
    label_smoothing_factor: float = flag(0.0, "share of the target spread over all classes")
    seed: int = flag(0, "of the data order, the dropout and the new weights")
    dtype: str = flag("auto", "of activations and products; auto: bf16 on a GPU, else fp32",
                      choices=("auto", "fp32", "bf16"))
    graph: str = flag("auto", "auto: whole steps as CUDA graphs where that can be; off: kernel by "
                      "kernel", choices=("auto", "off"))
    gradient_checkpointing: bool = flag(False, "less memory for a third more work: backward "
                                               "computes each layer again")
    method: str = flag("full", "what is trained: all; biases and head (bitfit); beside a frozen "
                       "model and the head thin matrices (lora), virtual tokens (prompt), keys and "
                       "values (prefix)", choices=("full", "bitfit", "lora", "prompt", "prefix"))
    lora_r: int = flag(8, "rank of the thin matrices")
    lora_alpha: float = flag(16.0, "what they add is scaled by lora_alpha / lora_r")
    lora_dropout: float = flag(0.0, "of what they read")
    lora_targets: str = flag("q,v", "products of a layer that have some: of q, k, v, out, up, "
                                    "down; 'all'; or names as in files")
    num_virtual_tokens: int = flag(20, "of a prompt or prefix")
    prompt_init: str = flag("vocab", "what they begin as: words drawn from the vocabulary, or "
                                     "random numbers", choices=("vocab", "random"))
    prompt_init_text: str = flag("", "or these words, over and over")
    prefix_projection: bool = flag(False, "a prefix is made by an MLP while it is trained")
    prefix_hidden_size: int = flag(0, "width of that MLP; 0: the model's")
    freeze: str = flag("", "what stays as it is: 'embeddings,layers:0-9', 'layers.*.mlp.*'")
    layer_lr_decay: float = flag(1.0, "a layer learns at this times the rate of the one above it")
    head_lr: float = flag(0.0, "learning rate of the head; 0: as all others")
    lr_rules: str = flag("", "any table, the first match counts: 'layers:0-9=1e-6,*=1e-5'")

    def __post_init__(self):
        if not (self.num_train_epochs or self.max_steps):
            raise InputError("expected num_train_epochs or max_steps above 0, got none")
        for name, low, high in (
            ("learning_rate", 0, 1e3), ("num_train_epochs", 0, 1e6), ("max_steps", 0, 1e12),
            ("per_device_train_batch_size", 1, 1e6), ("gradient_accumulation_steps", 1, 1e6),
            ("warmup_steps", 0, 1e12), ("weight_decay", 0, 1e3), ("momentum", 0, 0.999999),
            ("adam_beta1", 0, 0.999999), ("adam_beta2", 0, 0.9999999), ("adam_epsilon", 0, 1),
            ("max_grad_norm", 0, 1e9), ("label_smoothing_factor", 0, 1), ("seed", 0, 2**63 - 1),
            ("layer_lr_decay", 0, 1), ("head_lr", 0, 1e3), ("lora_r", 1, 1e6),
            ("lora_alpha", 1e-6, 1e6), ("lora_dropout", 0, 0.99), ("num_virtual_tokens", 1, 1e6),
            ("prefix_hidden_size", 0, 1e6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # NaN compares false
                raise InputError(f"expected {name} between {low:g} and {high:g}, got {value}")
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise InputError(f"expected {f.name} {' or '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class RunConfig:
    """What one run of `minift train` reads and writes."""

    model_name_or_path: str = flag("", "folder with config.json, weights, tokenizer; or a hub id",
                                   "model")
    train_file: str = flag("", "CSV, TSV, JSON lines, .gz of them, or a folder", "train")
    validation_file: str = flag("", "default: a part of the training rows", "validation")
    test_file: str = flag("", "evaluated once, with the best model", "test")
    output_dir: str = flag("", "new folder for the model and the checkpoints", "output")
    model_revision: str = flag("", "branch, tag or commit of a hub id", "revision")
    token: str = flag("", "for private hub ids, if `hf auth login` or HF_TOKEN do not; not kept")
    config_name: str = flag("", "in place of a model: config.json or TOML of one to make from "
                                "random weights", "model_config")
    tokenizer_name: str = flag("", "folder of another vocabulary; a model made from random weights "
                                   "has one made of the training texts", "tokenizer")
    cased: bool = flag(False, "a vocabulary made of the texts keeps capitals")
    task: str = flag("classification", "what is learned: a label of a text or pair, or several; a "
                     "number (regression); labels of words (tagging); where an answer stands (qa); "
                     "texts (lm); responses to prompts; masked words (mlm)", choices=TASKS)
    task_name: str = flag("", "of GLUE or SuperGLUE, whose files are read as they are, and with "
                              "whose metric: 'cola', 'boolq'")
    text_column: str = flag("", "name, or number from 1, of the column of texts, or of words")
    pair_column: str = flag("", "the second text's column")
    label_column: str = flag("", "the label's column, or that of the labels or tags")
    id_column: str = flag("", "what a row is called in answers; default: a column 'id', if any")
    labels: str = flag("", "the labels that there are, 'a,b,c' or a file of one a line; default: "
                           "those of the training rows")
    max_dropped: float = flag(0.01, "share of a file's rows that may be useless: they are left out "
                                    "and told of; more of them stop the run")
    validation_split: float = flag(0.1, "share of training rows kept for validation without a file")
    max_seq_length: int = flag(0, "longer texts are cut to so many tokens; 0: what the model takes")
    overflow: str = flag("cut", "texts that are longer: cut them and say how many, or stop",
                         choices=("cut", "error"))
    class_weights: str = flag("", "'balanced', or one number a label: 'spam=5,ham=1'")
    sampling_weights: str = flag("", "rows are drawn as often as their label's number says: as "
                                     "class_weights")
    augment: str = flag("", "training rows are varied in every epoch: share of the words that are "
                            "left out, swapped, masked: 'drop=0.1,swap=0.05,mask=0.1'")
    threshold: float = flag(0.0, "probability from which multilabel gives a label; 0: chosen "
                                "on the validation rows")
    bad_tags: str = flag("repair", "an I- tag without its B- begins an entity (and is counted); or "
                                   "it stops the run", choices=("repair", "error"))
    doc_stride: int = flag(128, "tokens that windows of a too long text share, of qa and tagging")
    max_answer_length: int = flag(30, "tokens of the longest answer that qa gives")
    eval_steps: int = flag(0, "steps between evaluations; 0: after every epoch")
    save_steps: int = flag(0, "steps between checkpoints; 0: at every evaluation")
    save_total_limit: int = flag(2, "newest checkpoints that are kept; 0: all")
    prompt_template: str = flag("{prompt}\n", "of --task instruct: text with the names of columns")
    response_template: str = flag("{response}", "what is learned to follow it")
    mlm_probability: float = flag(0.15, "share of the words that --task mlm masks")
    metric_for_best_model: str = flag("", "any metric; of loss the smallest; ties: by loss; "
                                          "default: accuracy, or loss where there is none")
    early_stopping_patience: int = flag(0, "stop after so many evaluations without gain; 0: never")
    resume_from_checkpoint: str = flag("", "'auto': the newest in output_dir, if any; or a folder")
    overwrite_output_dir: bool = flag(False, "delete what an earlier run left in output_dir")
    device: str = flag("auto", "cpu, cuda, cuda:1; auto: a GPU when there is one")
    ops: str = flag("auto", "which operations", choices=("auto", "torch", "triton"))
    threads: int = flag(0, "CPU threads; sums, so bits, change with it; 0: torch's choice")
    seeds: int = flag(1, "runs with so many seeds, from `seed` on, each in a folder of output_dir")

    def __post_init__(self):
        if not 0 < self.validation_split < 1:
            raise InputError(f"expected validation_split in (0, 1), got {self.validation_split}")
        if not 0 < self.mlm_probability < 1:
            raise InputError(f"expected mlm_probability in (0, 1), got {self.mlm_probability}")
        for name in ("max_dropped", "threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"expected {name} in [0, 1), got {getattr(self, name)}")
        for name in ("max_answer_length", "seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} >= 1, got {getattr(self, name)}")
        for name in ("max_seq_length", "eval_steps", "save_steps", "save_total_limit",
                     "early_stopping_patience", "threads", "doc_stride"):
            if getattr(self, name) < 0:
                raise InputError(f"expected {name} >= 0, got {getattr(self, name)}")


def as_setting(name: str, value: Any) -> tuple[str, Any]:
    """The field of a run's settings that a name or a short name means, and a value of its type.

    Raises:
        InputError: the name is unknown, or the value is of another type.
    """
    known = {
        alias: f
        for config in (RunConfig, TrainConfig)
        for f in fields(config)
        for alias in (f.name, *f.metadata["aliases"])
    }
    found = known.get(name.replace("-", "_"))
    if found is None:
        raise InputError(unknown(name, list(known)))
    if found.type is float and type(value) is int:
        value = float(value)
    choices = found.metadata["choices"]
    if type(value) is not found.type or (choices and value not in choices):
        wanted = " or ".join(choices) or found.type.__name__
        raise InputError(f"expected {name} as {wanted}, got {value!r}")
    return found.name, value
