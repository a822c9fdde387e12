"""ModelConfig, from and to config.json."""

import json

import pytest
from transformers import BertConfig

from minift import InputError, ModelConfig

RAW = {
    **{"model_type": "bert", "vocab_size": 11, "max_position_embeddings": 12},
    **{"type_vocab_size": 3, "hidden_size": 14, "num_hidden_layers": 5},
    **{"num_attention_heads": 7, "intermediate_size": 16, "hidden_act": "gelu_new"},
    **{"layer_norm_eps": 1e-7, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
    **{"classifier_dropout": 0.4, "initializer_range": 0.5, "unknown": {"kept": [1]}},
    "id2label": {"0": "ham", "1": "spam"},
}


def without(*names: str) -> dict:
    return {k: v for k, v in RAW.items() if k not in names}


def test_every_field_is_read_from_its_own_name():
    """All numbers differ, so that no two can be mixed up."""
    config = ModelConfig.from_hf(RAW)
    assert config == ModelConfig(
        vocab_size=11,
        max_len=12,
        n_types=3,
        dim=14,
        n_layer=5,
        n_head=7,
        ffn_dim=16,
        activation="gelu_tanh",
        norm_eps=1e-7,
        embedding_dropout=0.2,
        hidden_dropout=0.2,
        attention_dropout=0.3,
        classifier_dropout=0.4,
        init_std=0.5,
        labels=("ham", "spam"),
    )


def test_defaults_are_transformers():
    """What a config.json may leave out means what it means there."""
    optional = {"type_vocab_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob"}
    optional |= {"attention_probs_dropout_prob", "initializer_range", "classifier_dropout"}
    config, theirs = ModelConfig.from_hf(without(*optional, "id2label")), BertConfig()
    assert (config.n_types, config.norm_eps) == (theirs.type_vocab_size, theirs.layer_norm_eps)
    assert (config.activation, theirs.hidden_act) == ("gelu_erf", "gelu")
    assert config.hidden_dropout == theirs.hidden_dropout_prob
    assert config.attention_dropout == theirs.attention_probs_dropout_prob
    assert config.init_std == theirs.initializer_range
    assert config.labels == ()


@pytest.mark.parametrize("classifier", [{}, {"classifier_dropout": None}])
def test_head_drops_as_the_hidden_states_unless_told(classifier):
    """As transformers': null and absent are one."""
    raw = without("classifier_dropout") | classifier
    assert ModelConfig.from_hf(raw).classifier_dropout == 0.2
    assert ModelConfig.from_hf(raw | {"classifier_dropout": 0}).classifier_dropout == 0.0


def test_labels_are_in_the_order_of_numbers():
    """ "10" is after "9", and the order of the file says nothing."""
    numbers = [10, 3, 0, 1, 2, 4, 9, 8, 7, 6, 5]
    config = ModelConfig.from_hf(RAW | {"id2label": {str(i): f"n{i}" for i in numbers}})
    assert config.labels == tuple(f"n{i}" for i in range(11))


@pytest.mark.parametrize(
    ("activation", "ours"),
    [("gelu", "gelu_erf"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_activations(activation, ours):
    assert ModelConfig.from_hf(RAW | {"hidden_act": activation}).activation == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "t5"},
            "expected model_type bert, roberta, distilbert, xlm-roberta, camembert, gpt2 in "
            "config.json, got 't5'",
        ),
        (
            {"position_embedding_type": "relative_key"},
            "expected absolute positions in config.json, got relative ones",
        ),
        (
            {"hidden_act": "relu"},
            "expected hidden_act gelu or gelu_new or gelu_pytorch_tanh, got 'relu'",
        ),
        (
            {"hidden_size": "14"},
            "expected hidden_size in config.json as a number in [1, 2147483648), got '14'",
        ),
        (
            {"num_hidden_layers": 2.5},
            "expected num_hidden_layers in config.json as a number in [1, 2147483648), got 2.5",
        ),
        (
            {"vocab_size": True},
            "expected vocab_size in config.json as a number in [1, 2147483648), got True",
        ),
        (
            {"intermediate_size": -1},
            "expected intermediate_size in config.json as a number in [1, 2147483648), got -1",
        ),
        (
            {"max_position_embeddings": None},
            "expected max_position_embeddings in config.json as a number in [1, 2147483648), "
            "got None",
        ),
        (
            {"layer_norm_eps": [1]},
            "expected layer_norm_eps in config.json as a number in [0, 1), got [1]",
        ),
        ({"hidden_size": 15}, "hidden_size=15 is not divisible by 7 heads"),
        (
            {"num_attention_heads": 0},
            "expected num_attention_heads in config.json as a number in [1, 2147483648), got 0",
        ),
        ({"id2label": ["ham"]}, "expected id2label as number -> name, got ['ham']"),
        ({"id2label": {"a": "b"}}, "expected id2label as number -> name, got {'a': 'b'}"),
    ],
)
def test_what_cannot_be_used(changes, message):
    """One line that says what was expected and what was found."""
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf(RAW | changes)
    assert str(error.value) == message


def test_a_missing_kind_of_model():
    with pytest.raises(InputError, match="got None"):
        ModelConfig.from_hf(without("model_type"))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": ["gelu"]},
        {"layer_norm_eps": float("nan")},
        {"hidden_dropout_prob": 1.0},
        {"attention_probs_dropout_prob": 1.5},
        {"num_hidden_layers": 0},
        {"hidden_size": 0},
        {"is_decoder": True},
        {"id2label": {"0": "same", "1": "same"}},
    ],
)
def test_what_cannot_be_used_either(changes):
    """NaN and dropout of everything train to NaN; a decoder looks back only; names are unique."""
    with pytest.raises(InputError):
        ModelConfig.from_hf(RAW | changes)


def test_to_hf_keeps_what_was_read_and_says_what_the_head_is():
    """Strangers' settings survive; paths of another machine and an old dtype do not."""
    raw = RAW | {"_name_or_path": "/home/x", "torch_dtype": "float16", "dtype": "bfloat16"}
    content = ModelConfig.from_hf(raw).to_hf()
    assert content == RAW | {
        "architectures": ["BertForSequenceClassification"],
        "label2id": {"ham": 0, "spam": 1},
        "problem_type": "single_label_classification",
        "dtype": "float32",
    }
    json.dumps(content, allow_nan=False)
    assert ModelConfig.from_hf(content) == ModelConfig.from_hf(RAW)


def test_what_was_read_is_not_changed():
    """The caller's dictionary is the caller's."""
    raw = dict(RAW)
    config = ModelConfig.from_hf(raw)
    config.to_hf()["vocab_size"] = 0
    assert raw == RAW
    assert config.raw is not raw


def test_gpt2_knows_the_names_of_other_families():
    """transformers takes them for its own; here they would have meant the sizes of GPT-2 small."""
    raw = dict(model_type="gpt2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = ModelConfig.from_hf(raw | {"max_position_embeddings": 64})
    assert (config.dim, config.n_layer, config.n_head, config.max_len) == (32, 2, 4, 64)
    assert "hidden_size" not in config.to_hf()


@pytest.mark.parametrize(
    ("problem", "task"),
    [
        ("regression", "regression"),
        ("multi_label_classification", "multilabel"),
        ("single_label_classification", ""),
        (None, ""),
    ],
)
def test_the_kind_of_loss_names_the_task_of_anothers_classifier(problem, task):
    """Our own name of the task wins, and a head for tokens has no such loss."""
    raw = RAW | {"architectures": ["BertForSequenceClassification"], "problem_type": problem}
    assert ModelConfig.from_hf(raw).task == task
    assert ModelConfig.from_hf(raw | {"task": "classification"}).task == "classification"
    tokens = raw | {"architectures": ["BertForTokenClassification"]}
    assert ModelConfig.from_hf(tokens).task == ""


@pytest.mark.parametrize(
    ("more", "task"),
    [
        ({"id2label": {"0": "LABEL_0"}}, "regression"),
        ({"id2label": {"0": "LABEL_0"}, "problem_type": "single_label_classification"}, ""),
        ({"id2label": {"0": "no", "1": "yes"}}, ""),
        ({"id2label": {"0": "LABEL_0"}, "task": "classification"}, "classification"),
        ({"id2label": {"0": "LABEL_0"}, "architectures": ["BertForTokenClassification"]}, ""),
    ],
)
def test_one_output_is_a_number(more, task):
    """As transformers takes it: a softmax over one output would be sure of it always."""
    raw = RAW | {"architectures": ["BertForSequenceClassification"]}
    assert ModelConfig.from_hf(raw | more).task == task


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_the_task_of_a_classifier_is_its_kind_of_loss(task):
    """What transformers is told is what it tells us."""
    config = ModelConfig.from_hf(RAW | {"task": task})
    saved = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(saved).task == task
    del saved["task"]
    assert ModelConfig.from_hf(saved).task == {"classification": ""}.get(task, task)


@pytest.mark.parametrize(
    ("ending", "head"),
    [
        ("ForSequenceClassification", "classifier"),
        ("ForTokenClassification", "tokens"),
        ("ForQuestionAnswering", "span"),
        ("ForMaskedLM", "lm"),
        ("Model", "classifier"),
    ],
)
def test_heads_are_known_by_their_classes(ending, head):
    config = ModelConfig.from_hf(RAW | {"architectures": ["Bert" + ending]})
    assert config.head == head
    if ending != "Model":
        assert config.trained_head
        assert config.to_hf()["architectures"] == ["Bert" + ending]
    assert ("id2label" in config.to_hf()) == (head in ("classifier", "tokens"))


def test_settings_of_a_task_come_back():
    """What is no object is nobody's, and nothing is written where there is nothing."""
    config = ModelConfig.from_hf(RAW | {"task_settings": {"threshold": 0.25}})
    assert config.settings == {"threshold": 0.25}
    assert ModelConfig.from_hf(config.to_hf()).settings == config.settings
    assert ModelConfig.from_hf(RAW | {"task_settings": [1]}).settings == {}
    assert "task_settings" not in ModelConfig.from_hf(RAW).to_hf()
