"""minift fine-tunes BERT and its kin, with hand-written kernels, from Python or a command line."""

from .batch import Batches, Example
from .config import ModelConfig, RunConfig, TrainConfig
from .data import Columns, Row, read_rows, read_texts
from .errors import InputError
from .explain import attention_probs
from .ops import TORCH, TRITON
from .run import fine_tune
from .splits import overlap, stratified_split, with_texts
from .tasks.classification import Classification, label_names, logits_of, predict
from .tokenizer import Tokenizer
from .train import Diverged, Step, TrainState, train
from .weights import load, load_model, save, save_model

__all__ = [
    "TORCH",
    "TRITON",
    "Batches",
    "Classification",
    "Columns",
    "Diverged",
    "Example",
    "InputError",
    "ModelConfig",
    "Row",
    "RunConfig",
    "Step",
    "Tokenizer",
    "TrainConfig",
    "TrainState",
    "attention_probs",
    "fine_tune",
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
    "stratified_split",
    "train",
    "with_texts",
]
