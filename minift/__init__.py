"""minift fine-tunes BERT and GPT-2, with hand-written kernels, from Python or a command line."""

from .batch import Batches, Example
from .config import ModelConfig, RunConfig, TrainConfig
from .data import Columns, Row, read_rows, read_texts
from .errors import InputError
from .explain import attention_probs
from .generate import generate
from .ops import TORCH, TRITON
from .run import fine_tune
from .sampling import GenerateConfig
from .saving import Adapters, load, save
from .search import SearchConfig, search
from .splits import overlap, stratified_split, with_texts
from .stream_text import generate_text, stream_text
from .tasks.classification import Classification, label_names, predict
from .tasks.instruct import Instruct
from .tasks.language import LanguageModel
from .tasks.masked import MaskedWords
from .tasks.multilabel import MultiLabel
from .tasks.qa import QuestionAnswering
from .tasks.regression import Regression
from .tasks.tagging import Tagging
from .tasks.texts import logits_of
from .text_metrics import text_metrics
from .tokenizer import Tokenizer
from .train import Diverged, Step, TrainState, train
from .trials import fine_tune_seeds
from .weights import load_model, save_model

__all__ = [
    "TORCH",
    "TRITON",
    "Adapters",
    "Batches",
    "Classification",
    "Columns",
    "Diverged",
    "Example",
    "GenerateConfig",
    "InputError",
    "Instruct",
    "LanguageModel",
    "MaskedWords",
    "ModelConfig",
    "MultiLabel",
    "QuestionAnswering",
    "Regression",
    "Row",
    "RunConfig",
    "SearchConfig",
    "Step",
    "Tagging",
    "Tokenizer",
    "TrainConfig",
    "TrainState",
    "attention_probs",
    "fine_tune",
    "fine_tune_seeds",
    "generate",
    "generate_text",
    "label_names",
    "load",
    "load_model",
    "logits_of",
    "overlap",
    "predict",
    "read_rows",
    "read_texts",
    "save",
    "save_model",
    "search",
    "stratified_split",
    "stream_text",
    "text_metrics",
    "train",
    "with_texts",
]
