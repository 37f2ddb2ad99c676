"""Adapt a frozen language model to a task by learning a soft prompt: kilobytes a task, one model in memory."""

from importlib.metadata import version

from softprompt.artifact import load, save
from softprompt.config import TrainConfig, preset
from softprompt.data import Dataset, Example, read_dataset
from softprompt.errors import (
    ArtifactError,
    BaseModelError,
    ConfigError,
    DataError,
    SoftPromptError,
    StoreError,
    TemplateError,
    TrainingError,
)
from softprompt.evaluate import Evaluation, Prediction, Query, evaluate, predict
from softprompt.frozen import FrozenLM, Sampling
from softprompt.metrics import Metric
from softprompt.prompt import SoftPrompt
from softprompt.store import Store
from softprompt.task import Task
from softprompt.template import Template, Verbalizer, chat_template, default_template
from softprompt.train import Step, Training

__version__ = version("softprompt")

__all__ = [
    "ArtifactError",
    "BaseModelError",
    "ConfigError",
    "DataError",
    "Dataset",
    "Evaluation",
    "Example",
    "FrozenLM",
    "Metric",
    "Prediction",
    "Query",
    "Sampling",
    "SoftPrompt",
    "SoftPromptError",
    "Step",
    "Store",
    "StoreError",
    "Task",
    "Template",
    "TemplateError",
    "TrainConfig",
    "Training",
    "TrainingError",
    "Verbalizer",
    "__version__",
    "chat_template",
    "default_template",
    "evaluate",
    "load",
    "predict",
    "preset",
    "read_dataset",
    "save",
]
