"""What a server shows of the inside of its soft prompts: the views that need the embedding table alone."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from softprompt.errors import SoftPromptError
from softprompt.inspection.answers import document
from softprompt.inspection.report import inspect_vectors
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.model.embedder import Embedder
from softprompt.serving.catalog import content_of
from softprompt.serving.openai_api import ApiError
from softprompt.serving.served import Entry
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task

MOST = 64
"""Soft prompts whose views are kept, about 0.2 MB each."""

_VIEWS = ("base", "num_virtual_tokens", "warning", "answers", "nearest", "added", "words", "norms", "map")


class Inspector:
    """Looks at soft prompts in a thread of its own, one at a time, each content once."""

    def __init__(self, lm: Embedder) -> None:
        """Prepares to look; the embedding table is first read when somebody asks.

        Args:
            lm: the base model; its tokenizer is copied, since one is not made for several threads.
        """
        self._lm = Embedder.of(lm)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inspector")
        self._found: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        """Ends when what it looks at is done."""
        self._thread.shutdown(cancel_futures=True)

    async def views(self, entry: Entry) -> dict[str, Any]:
        """JSON values: what ``softprompt inspect --json`` says without a model. The file is read again: what is served
        is rounded to the base model's dtype.

        Raises:
            ApiError: 400, it is the base model or a trained KV prefix, or the file cannot be read; 409, the file holds
                something else now.
        """
        if entry.path is None:
            found = "an ensemble" if "ensemble" in entry.card else "the base model"
            raise ApiError(400, f"Expected a soft prompt, found {found} {entry.name!r}.", param="name")
        loop = asyncio.get_running_loop()
        try:
            views = await loop.run_in_executor(self._thread, self._look, entry, entry.path)
        except SoftPromptError as error:
            raise ApiError(400, str(error), param="name") from error
        return {"id": entry.name, "object": "soft_prompt.inspection", "content_hash": entry.content, **views}

    def _look(self, entry: Entry, path: Path) -> dict[str, Any]:
        soft_prompt = SoftPrompt.load(path)
        if content_of(soft_prompt, entry.card["max_model_len"]) != entry.content:
            raise ApiError(409, f"The file of {entry.name!r} was changed since it was loaded; load it again.")
        key = entry.content + json.dumps(soft_prompt.training, sort_keys=True)  # by that record the start is made again
        if key not in self._found:
            report = document(inspect_vectors(soft_prompt, Task.of(self._lm, soft_prompt), self._vocabulary))
            while len(self._found) >= MOST:
                del self._found[next(iter(self._found))]
            self._found[key] = {name: report[name] for name in _VIEWS}
        return self._found[key]

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._lm)
