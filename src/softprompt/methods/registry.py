"""Every method by name, and what it needs."""

from __future__ import annotations

from softprompt.methods import classical, fine_tuning, hard_prompt, prompt_tuning
from softprompt.methods.method import Method

METHODS: dict[str, Method] = {
    "majority-class": classical.METHODS["majority-class"],
    **hard_prompt.METHODS,
    "tf-idf": classical.METHODS["tf-idf"],
    "peft-prompt-tuning": fine_tuning.METHODS["peft-prompt-tuning"],
    **prompt_tuning.METHODS,
    "lora": fine_tuning.METHODS["lora"],
    "full-fine-tuning": fine_tuning.METHODS["full-fine-tuning"],
}
"""Every method by name, in the order in which they run and are shown."""

SEEDED = ("few-shot", "few-shot-calibrated", "peft-prompt-tuning", "soft-prompt", "prefix", "lora", "full-fine-tuning")
"""Methods that draw something, which run once for every seed."""

VALIDATED = ("soft-prompt", "prefix", "lora", "full-fine-tuning")
"""Methods that are validated while they are trained, all on the same rows."""

NEEDS_LABELS = ("majority-class", "tf-idf", "soft-prompt-ensemble", "soft-prompt-majority")

READS_INSTRUCTIONS = ("instruction", "few-shot")
"""What the names of methods begin with that read the user's instructions."""

OURS = "soft-prompt"
"""The method that all others are compared with."""
