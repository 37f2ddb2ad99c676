"""What can go wrong by a user's hand, as one tree.

    SoftPromptError          root; ``str(error)`` is one sentence for the user: expected, found and where, what to do
    ├── ConfigError          an option's value, or two options that exclude each other
    ├── DataError            a file, column, row or target
    ├── TemplateError        a template or verbalizer that does not parse or does not fit the model
    ├── BaseModelError       a base model that cannot be loaded, or is not the one a soft prompt was tuned on
    ├── ArtifactError        a soft prompt's file that is truncated, corrupted or foreign
    ├── StoreError           a name or folder of the store: unknown, taken, unwritable, full
    ├── HubError             the Hugging Face Hub cannot be reached, refuses, or answers what cannot be used
    ├── TrainingError        a training that cannot go on: a loss that is not finite
    └── ProcessError         another process of the same run is lost, or cannot be reached

The command line prints the sentence on stderr and exits with 2. Anything else that is raised is a defect of ours.
``SoftPromptWarning`` is what a user should know of a run that goes on.
"""

from __future__ import annotations


class SoftPromptError(Exception):
    """Root of every error that a user can cause and mend."""


class ConfigError(SoftPromptError):
    """An option's value is outside its range, or two options exclude each other."""


class DataError(SoftPromptError):
    """A data file, column, row or target is not what the task needs."""


class TemplateError(SoftPromptError):
    """A template or verbalizer does not parse, or leaves no room in the model's window."""


class BaseModelError(SoftPromptError):
    """A base model cannot be loaded, or is not the one that a soft prompt was tuned on."""


class ArtifactError(SoftPromptError):
    """A soft prompt's file is truncated, corrupted or not one of ours."""


class StoreError(SoftPromptError):
    """A name is unknown or taken, or the store's folder cannot be written."""


class HubError(SoftPromptError):
    """The Hugging Face Hub cannot be reached, refuses, or answers what cannot be used."""


class TrainingError(SoftPromptError):
    """Training cannot go on, for example since the loss is no longer finite."""


class ProcessError(SoftPromptError):
    """Another process of the same run is lost or cannot be reached."""


def missing_library(purpose: str, library: str | None, package: str) -> ConfigError:
    """What is told of a library that is not there.

    Args:
        purpose: what needs it, as the subject of a sentence.
        library: its name.
        package: what to install, such as ``softprompt[serve]``.
    """
    return ConfigError(f'{purpose} needs the library {library}, which is not installed; pip install "{package}".')


class SoftPromptWarning(UserWarning):
    """Something is not as it should be, and the run goes on without it; the command line prints it on stderr."""


class PrecisionWarning(SoftPromptWarning):
    """A soft prompt is used on its base model in another precision than it was trained in."""
