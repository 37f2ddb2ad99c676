"""Adapt a frozen language model to a task by learning a soft prompt: kilobytes a task, one model in memory."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.api import evaluate, fit_many, load_model, predict, serve, train
    from softprompt.data.example import Dataset, Example
    from softprompt.data.reading import read_dataset
    from softprompt.errors import (
        ArtifactError,
        BaseModelError,
        ConfigError,
        DataError,
        HubError,
        SoftPromptError,
        StoreError,
        TemplateError,
        TrainingError,
    )
    from softprompt.evaluation.evaluate import Evaluation
    from softprompt.evaluation.metrics import Metric
    from softprompt.model.frozen import FrozenLM
    from softprompt.model.request import Sampling
    from softprompt.sharing import export, from_peft, inputs_for, pull, push
    from softprompt.soft_prompts.soft_prompt import SoftPrompt, load, save
    from softprompt.soft_prompts.store import Store
    from softprompt.tasks.predict import Prediction, Predictions, Query
    from softprompt.tasks.task import Task
    from softprompt.text.template import Template, chat_template, default_template
    from softprompt.text.verbalizer import Verbalizer
    from softprompt.tuning.config import TrainConfig, preset
    from softprompt.tuning.step import Step
    from softprompt.tuning.training import Training

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
    "HubError",
    "Metric",
    "Prediction",
    "Predictions",
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
    "export",
    "fit_many",
    "from_peft",
    "inputs_for",
    "load",
    "load_model",
    "predict",
    "preset",
    "pull",
    "push",
    "read_dataset",
    "save",
    "serve",
    "train",
]

_HOMES = {
    "softprompt.api": ("evaluate", "fit_many", "load_model", "predict", "serve", "train"),
    "softprompt.sharing": ("export", "from_peft", "inputs_for", "pull", "push"),
    "softprompt.data.example": ("Dataset", "Example"),
    "softprompt.data.reading": ("read_dataset",),
    "softprompt.errors": (
        "ArtifactError",
        "BaseModelError",
        "ConfigError",
        "DataError",
        "HubError",
        "SoftPromptError",
        "StoreError",
        "TemplateError",
        "TrainingError",
    ),
    "softprompt.evaluation.evaluate": ("Evaluation",),
    "softprompt.evaluation.metrics": ("Metric",),
    "softprompt.model.frozen": ("FrozenLM",),
    "softprompt.model.request": ("Sampling",),
    "softprompt.soft_prompts.soft_prompt": ("SoftPrompt", "load", "save"),
    "softprompt.soft_prompts.store": ("Store",),
    "softprompt.tasks.predict": ("Prediction", "Predictions", "Query"),
    "softprompt.tasks.task": ("Task",),
    "softprompt.text.template": ("Template", "chat_template", "default_template"),
    "softprompt.text.verbalizer": ("Verbalizer",),
    "softprompt.tuning.config": ("TrainConfig", "preset"),
    "softprompt.tuning.training": ("Step", "Training"),
}
"""Where the public names are. Each is imported when it is asked for: a command that needs no torch loads none."""

_ROOMS = ("compare", "inspection", "methods", "serving")
"""What is found as an attribute without an import of its own, too."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f"softprompt.{name}")
        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
