"""What tells one family of encoders from another: keys of config.json, names of tensors, the head.

The model, the loader and the saver are the same code for all of them; a family is an entry here.

    bert         pooler (pretrained): tanh(dense(first token)), dropout, classifier
    roberta      positions from pad id + 1, one type; head: dropout, dense, tanh, dropout, out_proj
    distilbert   no types, no pooler; head: dense, ReLU, dropout 0.2, classifier

Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692; Sanh et al. 2019,
arXiv:1910.01108; Conneau et al. 2019, arXiv:1911.02116 (xlm-roberta); Martin et al. 2019,
arXiv:1911.03894 (camembert).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "classifier_dropout": "classifier_dropout",
    "init_std": "initializer_range",
    "pad": "pad_token_id",
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
class Family:
    """What is not the same in all encoders."""

    architecture: str  # transformers' class of the classifier
    tokenizer: str  # transformers' class of the tokenizer
    vocabulary: str  # made for a new model: WordPiece, or BPE over bytes
    prefix: str  # of the encoder's tensors in a classifier's file
    dense: str  # name of the layer between the first token and the head, which we call pooler
    head: str
    other_heads: tuple[str, ...]  # beginnings of names that belong to other tasks
    keys: Mapping[str, str | None]  # KEYS with its own names; None: it has no such setting
    defaults: Mapping[str, float]  # of settings that config.json may leave out
    layer: Mapping[str, tuple[str, ...]]  # LAYER with its own names
    layers: str = "encoder.layer"  # where its layers are
    activation: str = "tanh"  # after the dense layer
    pooled: bool = False  # that layer is pretrained with the encoder; else it is part of the head
    drop_first: bool = False  # dropout before the dense layer too
    offset_positions: bool = False  # the first token stands at pad id + 1, not at 0

    @property
    def head_groups(self) -> tuple[str, ...]:
        """The groups of parameters that start from nothing in a new classifier."""
        return ("head",) if self.pooled else ("pooler", "head")


BERT = Family(
    architecture="BertForSequenceClassification",
    tokenizer="BertTokenizer",
    vocabulary="WordPiece",
    prefix="bert.",
    dense="bert.pooler.dense",
    head="classifier",
    other_heads=("cls.", "qa_outputs."),
    keys=KEYS,
    defaults={"n_types": 2, "pad": 0},
    layer=LAYER,
    pooled=True,
)
ROBERTA = replace(
    BERT,
    architecture="RobertaForSequenceClassification",
    tokenizer="RobertaTokenizer",
    vocabulary="BPE",
    prefix="roberta.",
    dense="classifier.dense",
    head="classifier.out_proj",
    other_heads=("lm_head.", "qa_outputs.", "roberta.pooler."),
    defaults={"n_types": 2, "pad": 1},
    pooled=False,
    drop_first=True,
    offset_positions=True,
)
DISTILBERT = Family(
    architecture="DistilBertForSequenceClassification",
    tokenizer="DistilBertTokenizer",
    vocabulary="WordPiece",
    prefix="distilbert.",
    dense="pre_classifier",
    head="classifier",
    other_heads=("vocab_", "qa_outputs."),
    keys={
        **KEYS,
        "n_types": None,
        "dim": "dim",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "ffn_dim": "hidden_dim",
        "activation": "activation",
        "norm_eps": None,
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
FAMILIES = {  # model_type in config.json -> family
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "xlm-roberta": replace(
        ROBERTA,
        architecture="XLMRobertaForSequenceClassification",
        tokenizer="XLMRobertaTokenizer",
    ),
    "camembert": replace(
        ROBERTA,
        architecture="CamembertForSequenceClassification",
        tokenizer="CamembertTokenizer",
    ),
}
