"""What tells one family of models from another: keys of config.json, names of tensors, the heads.

The loader and the saver are the same code for all of them, and so is the model of all encoders; a
family is an entry here.

    bert         pooler (pretrained): tanh(dense(first token)), dropout, classifier
    roberta      positions from pad id + 1, one type; head: dropout, dense, tanh, dropout, out_proj
    distilbert   no types, no pooler; head: dense, ReLU, dropout 0.2, classifier
    gpt2         a decoder: matrices stored (in, out); head: score of the last token, no bias

Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692; Sanh et al. 2019,
arXiv:1910.01108; Conneau et al. 2019, arXiv:1911.02116 (xlm-roberta); Martin et al. 2019,
arXiv:1911.03894 (camembert); Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners" (gpt2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

KEYS = {  # ours -> config.json's
    "vocab_size": "vocab_size",
    "positions": "max_position_embeddings",
    "n_types": "type_vocab_size",
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "embedding_dropout": "hidden_dropout_prob",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "classifier_dropout": "classifier_dropout",
    "init_std": "initializer_range",
    "pad": "pad_token_id",
}
TABLES = {  # ours -> theirs, around the layers; norms have a bias
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
LAYER = {  # ours -> theirs, in a layer; several are one after the other along rows
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention.norm": ("attention.output.LayerNorm",),
    "mlp.up": ("intermediate.dense",),
    "mlp.down": ("output.dense",),
    "mlp.norm": ("output.LayerNorm",),
}


@dataclass(frozen=True)
class Projector:
    """The head that predicts tokens: names of its parts, and its activation."""

    decoder: str  # .weight is the token table's once more, .bias the bias's
    dense: str = ""  # "": there is nothing before the product
    norm: str = ""
    bias: str = ""
    activation: str = ""  # "": as in the layers


@dataclass(frozen=True)
class Family:
    """What is not the same in all models."""

    architectures: Mapping[str, str]  # head -> transformers' class
    tokenizer: str  # transformers' class of the tokenizer
    vocabulary: str  # made for a new model: WordPiece, or BPE over bytes
    prefix: str  # of the body's tensors in a classifier's file
    dense: str  # name of the layer between the first token and the head, which we call pooler
    head: str
    lm_head: Projector
    other_heads: tuple[str, ...]  # beginnings of names of heads for tokens, and of older ones
    keys: Mapping[str, str | None]  # KEYS with its own names; None: it has no such setting
    defaults: Mapping[str, Any]  # of settings that config.json may leave out
    layer: Mapping[str, tuple[str, ...]]  # LAYER with its own names
    tables: Mapping[str, str] = field(default_factory=lambda: TABLES)  # with its own names
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of keys -> as they are
    layers: str = "encoder.layer"  # where its layers are
    buffers: tuple[str, ...] = ("embeddings.position_ids", "embeddings.token_type_ids")
    must_be: Mapping[str, bool] = field(default_factory=lambda: {"is_decoder": False})  # else: no
    activation: str = "tanh"  # after the dense layer
    pooled: bool = False  # that layer is pretrained with the encoder; else it is part of the head
    drop_first: bool = False  # dropout before the dense layer too
    offset_positions: bool = False  # the first token stands at pad id + 1, not at 0
    decoder: bool = False  # a token sees those before it alone; nothing is put around a text
    transposed: bool = False  # matrices of layers are stored (in, out)

    @property
    def body(self) -> str:
        """What our names of the body's parameters begin with."""
        return "gpt." if self.decoder else "bert."

    @property
    def head_groups(self) -> tuple[str, ...]:
        """The groups of parameters that start from nothing in a new classifier."""
        return ("head",) if self.pooled or self.decoder else ("pooler", "head")


def _architectures(name: str) -> dict[str, str]:
    return {
        "classifier": name + "ForSequenceClassification",
        "lm": name + "ForMaskedLM",
        "tokens": name + "ForTokenClassification",
        "span": name + "ForQuestionAnswering",
    }


BERT = Family(
    architectures=_architectures("Bert"),
    tokenizer="BertTokenizer",
    vocabulary="WordPiece",
    prefix="bert.",
    dense="bert.pooler.dense",
    head="classifier",
    lm_head=Projector(
        decoder="cls.predictions.decoder",
        dense="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        bias="cls.predictions.bias",
    ),
    other_heads=("cls.",),
    keys=KEYS,
    defaults={"n_types": 2, "pad": 0},
    layer=LAYER,
    pooled=True,
)
ROBERTA = replace(
    BERT,
    architectures=_architectures("Roberta"),
    tokenizer="RobertaTokenizer",
    vocabulary="BPE",
    prefix="roberta.",
    dense="classifier.dense",
    head="classifier.out_proj",
    lm_head=Projector(
        decoder="lm_head.decoder",
        dense="lm_head.dense",
        norm="lm_head.layer_norm",
        bias="lm_head.bias",
        activation="gelu_erf",
    ),
    other_heads=("lm_head.", "roberta.pooler."),
    defaults={"n_types": 2, "pad": 1},
    pooled=False,
    drop_first=True,
    offset_positions=True,
)
DISTILBERT = Family(
    architectures=_architectures("DistilBert"),
    tokenizer="DistilBertTokenizer",
    vocabulary="WordPiece",
    prefix="distilbert.",
    dense="pre_classifier",
    head="classifier",
    lm_head=Projector(
        decoder="vocab_projector",
        dense="vocab_transform",
        norm="vocab_layer_norm",
        bias="vocab_projector.bias",
    ),
    other_heads=("vocab_",),
    keys={
        **KEYS,
        "n_types": None,
        "dim": "dim",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "ffn_dim": "hidden_dim",
        "activation": "activation",
        "norm_eps": None,
        "embedding_dropout": "dropout",
        "hidden_dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
    defaults={"n_types": 0, "norm_eps": 1e-12, "classifier_dropout": 0.2, "pad": 0},
    layers="transformer.layer",
    layer={
        "attention.qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out": ("attention.out_lin",),
        "attention.norm": ("sa_layer_norm",),
        "mlp.up": ("ffn.lin1",),
        "mlp.down": ("ffn.lin2",),
        "mlp.norm": ("output_layer_norm",),
    },
    activation="relu",
)
GPT2 = Family(
    architectures={**_architectures("GPT2"), "lm": "GPT2LMHeadModel"},
    tokenizer="GPT2Tokenizer",
    vocabulary="BPE",
    prefix="transformer.",
    dense="",
    head="score",
    lm_head=Projector(decoder="lm_head"),
    other_heads=("lm_head.", "multiple_choice_head."),
    keys={
        "vocab_size": "vocab_size",
        "positions": "n_positions",
        "n_types": None,
        "dim": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "ffn_dim": "n_inner",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "embedding_dropout": "embd_pdrop",
        "hidden_dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
        "classifier_dropout": None,
        "init_std": "initializer_range",
        "pad": "pad_token_id",
    },
    defaults={
        **{"vocab_size": 50257, "positions": 1024, "n_types": 0, "dim": 768, "n_layer": 12},
        **{"n_head": 12, "activation": "gelu_new", "norm_eps": 1e-5, "embedding_dropout": 0.1},
        **{"classifier_dropout": 0.0, "pad": 0, "eos": 50256},
    },
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "hidden_act": "activation_function",
    },
    layer={
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "attention.norm": ("ln_1",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
        "mlp.norm": ("ln_2",),
    },
    tables={"embeddings.word": "wte", "embeddings.position": "wpe", "norm": "ln_f"},
    layers="h",
    buffers=(".attn.bias", ".attn.masked_bias"),
    must_be={
        "add_cross_attention": False,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    decoder=True,
    transposed=True,
)
FAMILIES = {  # model_type in config.json -> family
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "xlm-roberta": replace(
        ROBERTA,
        architectures=_architectures("XLMRoberta"),
        tokenizer="XLMRobertaTokenizer",
    ),
    "camembert": replace(
        ROBERTA,
        architectures=_architectures("Camembert"),
        tokenizer="CamembertTokenizer",
    ),
    "gpt2": GPT2,
}
