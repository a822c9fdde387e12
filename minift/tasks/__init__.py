"""One file a task, and the line that names it."""

from .classification import Classification
from .instruct import Instruct
from .language import LanguageModel
from .masked import MaskedWords

TASKS = {task.name: task for task in (Classification, LanguageModel, Instruct, MaskedWords)}
