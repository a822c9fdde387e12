"""One file a task, and the line that names it."""

from .classification import Classification
from .instruct import Instruct
from .language import LanguageModel
from .masked import MaskedWords
from .multilabel import MultiLabel
from .qa import QuestionAnswering
from .regression import Regression
from .tagging import Tagging

TASKS = {
    task.name: task
    for task in (
        *(Classification, MultiLabel, Regression, Tagging, QuestionAnswering),
        *(LanguageModel, Instruct, MaskedWords),
    )
}
