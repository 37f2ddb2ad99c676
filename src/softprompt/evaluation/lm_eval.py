"""A base model with a soft prompt, or none, as a model of lm-evaluation-harness; needs ``softprompt[eval]``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError, TemplateError, missing_library
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.scores import label_scores
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT, Tokens

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise missing_library("lm-evaluation-harness", error.name, "softprompt[eval]") from error

AT_ONCE = 512
"""Requests between two reports of progress; inside, those of one context share its computation."""

MAX_GEN_TOKS = 256
"""Tokens to generate where a task does not say; as the harness's own classes."""

ONLY_SAMPLED = ("top_k", "min_p", "typical_p")
"""Settings of generation that change nothing while the most probable token is taken."""

WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "use_cache": (None, True, False),
}
"""Other settings that tasks give, and the values with which they change nothing."""


class SoftPromptLM(TemplateLM):  # type: ignore[misc]
    """A frozen base model with a soft prompt, or none, for ``lm_eval.simple_evaluate(model=…)``.

    The soft prompt stands at the very start of each sequence, but behind the beginning-of-sequence token where the
    tokenizer puts one first; the harness's own context follows. The soft prompt's template is not used, since a task of
    the harness builds its prompts itself. With ``use_template`` the context is the template's input field and the
    continuation its target. There, a context that is a JSON object of the template's fields fills those, which is the
    only way for a template with several; and a continuation that is one of the soft prompt's labels is scored as
    ``evaluate`` scores that label, by all of its words.

    Text becomes tokens as in the harness's class ``hf``: context and continuation are encoded as one text, blanks at
    the context's end moved to the continuation. What is too long is cut from the left; the soft prompt and what stands
    before it, or the template, stay. Without a soft prompt all numbers are those of ``hf``, up to rounding.

    Requests of one context share its computation, and all of them that of the soft prompt. The harness's batch size is
    not looked at.
    """

    def __init__(
        self,
        lm: FrozenLM,
        soft_prompt: SoftPrompt | None = None,
        *,
        use_template: bool = False,
        base_only: bool = False,
    ) -> None:
        """Binds them.

        Args:
            lm: the base model.
            soft_prompt: what was tuned on it; None: the base model alone.
            use_template: wrap each context in the soft prompt's template.
            base_only: leave the soft prompt out, keep its template if that is used.

        Raises:
            BaseModelError: the soft prompt is of another base model.
            ConfigError: a template is asked for, but there is no soft prompt; or the base model is an encoder–decoder.
        """
        super().__init__()
        if lm.encoder_decoder:
            raise ConfigError(
                f"Expected a causal language model, which goes on where a context ends, found the encoder-decoder "
                f"{lm.name}; measure it with softprompt evaluate."
            )
        if use_template and soft_prompt is None:
            raise ConfigError("use_template needs a soft prompt, whose template it is; give one, or leave it out.")
        task = None if soft_prompt is None else Task.of(lm, soft_prompt)
        self.lm = lm
        self.soft_prompt = soft_prompt
        self.tokenizer = lm.tokenizer
        self._device = lm.device
        self._vectors = [] if soft_prompt is None or base_only else [soft_prompt.vectors]
        self._task = task if use_template else None
        if self._task is not None and base_only:
            self._task = self._task.without_soft_prompt()
        first = _first_tokens(lm)
        self._first = first if self._vectors else ()  # what stands before the soft prompt
        self._before = (*first, SOFT) if self._vectors else ()
        self.num_virtual_tokens = sum(lm.trained.length(own.shape) for own in self._vectors)
        self._prefix_of = lm.kept_prefixes(1)

    # --- what the harness asks about the model ----------------------------------------------------

    @property
    def max_length(self) -> int:
        """The most tokens of the harness in one sequence: the window without the soft prompt and what is before it."""
        return self.lm.window - self.num_virtual_tokens - len(self._first)

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return MAX_GEN_TOKS

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token.

        Raises:
            TemplateError: the tokenizer has none.
        """
        token = self.tokenizer.eos_token_id
        if token is None:
            raise TemplateError(
                f"Expected a tokenizer with an end-of-sequence token, found none in {self.lm.name}; "
                f"choose another base model."
            )
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning-of-sequence token, or else the end-of-sequence
        token."""
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else int(token)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, in the harness's caches of requests."""
        return str(self.tokenizer.name_or_path or self.lm.name).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the base model's own chat template writes them.

        Raises:
            ConfigError: the soft prompt's template is used, too.
            TemplateError: the tokenizer has no chat template.
        """
        if self._task is not None:
            raise ConfigError("A chat template inside the soft prompt's template is not meant; leave one of them out.")
        if not self.tokenizer.chat_template:
            raise TemplateError(
                f"Expected a base model with a chat template, found none in {self.lm.name}; leave it out."
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        name = None if self.soft_prompt is None or not self._vectors else self.soft_prompt.name
        return {
            "base": self.lm.name,
            "soft_prompt": name,
            "num_virtual_tokens": self.num_virtual_tokens,
            "template": None if self._task is None else self._task.template.text,
            "model_num_parameters": self.lm.num_parameters,
            "model_dtype": str(self.lm.dtype),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The text's tokens as ``hf`` gives them: with a beginning-of-sequence token where the tokenizer puts one and
        the text has none."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer(string, verbose=False, **options).input_ids
        self.lm.require_embeddings(ids)
        return ids

    # --- the harness's three kinds of requests ----------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would write it.

        Raises:
            DataError: a continuation that does not fit into the window, or without a token.
        """
        if self._task is None:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return found
        task = self._task
        pairs = [(str(context), str(continuation)) for context, continuation in (one.args for one in requests)]
        labels = {label: _words_of(task, label) for label in task.labels}
        longest = max(map(len, task.words), default=0)  # all labels see the same context
        rows: list[tuple[Request, tuple[Tokens, ...]]] = []
        for context, continuation in pairs:
            words = labels.get(continuation.removeprefix(" "))
            if words is None:
                words = (self._target(continuation),)
                rows.append((self._filled(context, len(words[0])), words))
            else:
                rows.append((self._filled(context, longest), words))
        return self._score(rows, pairs, disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        rows = [(self._placed(context, continuation), (tuple(continuation),)) for _, context, continuation in requests]
        return self._score(rows, [pair for pair, _, _ in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text. One that is longer than the window is scored in windows that do not
        overlap but for a token, each behind the soft prompt.

        Raises:
            ConfigError: the soft prompt's template is used, which running text does not go into.
        """
        if self._task is not None:
            raise ConfigError("A task that scores running text has no use for a template; leave the template out.")
        texts = [str(one.args[0]) for one in requests]
        windows, owners = [], []
        for owner, text in enumerate(texts):
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, found):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, cut before the first of its stop strings.

        A task's ``until``, ``max_gen_toks``, ``temperature`` (0 unless given), ``do_sample`` and ``top_p`` count.

        Raises:
            ConfigError: a setting that would change the text and is not known here, or no room for the tokens that
                the task wants to be generated.
        """
        groups: dict[Sampling, list[int]] = {}
        for place, one in enumerate(requests):
            groups.setdefault(self._sampling(one.args[1]), []).append(place)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for sampling, places in groups.items():
                for start in range(0, len(places), AT_ONCE):
                    part = places[start : start + AT_ONCE]
                    asked = [self._open(str(requests[place].args[0]), sampling.max_new_tokens) for place in part]
                    chunk = replace(sampling, seed=sampling.seed + start)  # as if the requests were not cut into chunks
                    answers = generate(self.lm, asked, self._vectors, chunk, prefix_of=self._prefix_of)
                    for place, answer in zip(part, answers, strict=True):
                        texts[place] = answer.text
                        self.cache_hook.add_partial("generate_until", requests[place].args, answer.text)
                    bar.update(len(part))
        return texts

    # --- texts → requests -------------------------------------------------------------------------

    def _placed(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """The harness's tokens behind the soft prompt, cut from the left so that all but the continuation's last token,
        which is only predicted, fits into the window."""
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"Expected a continuation of 1 to {self.max_length} tokens, which fit into the window of "
                f"{self.lm.name}, found one of {len(continuation)}; leave it out."
            )
        rest = self._behind(context)
        room = self.max_length + 1 - len(continuation)
        return self._request(rest[-room:])

    def _open(self, context: str, most: int) -> Request:
        """A context to be continued by up to ``most`` tokens."""
        if self._task is not None:
            return self._filled(context, most)
        room = self.max_length - most
        if room < 1:
            raise ConfigError(
                f"The task asks for up to {most} tokens, but soft prompt and window of {self.lm.name} leave room for "
                f"{max(0, self.max_length - 1)}; set a smaller max_gen_toks in its generation_kwargs."
            )
        return self._request(self._behind(self.tok_encode(context) or [self.prefix_token_id])[-room:])

    def _behind(self, ids: Sequence[int]) -> Tokens:
        """The tokens without those that stand before the soft prompt."""
        begins = tuple(ids[: len(self._first)]) == self._first
        return tuple(ids[len(self._first) :] if begins else ids)

    def _request(self, rest: Tokens) -> Request:
        return Request((*self._before, *rest), len(self._before), prompt=0 if self._vectors else None)

    def _filled(self, context: str, reserve: int) -> Request:
        """The template around a context, with ``reserve`` tokens free for what follows. Where a context is text, what
        is too long is cut from its left; where it is fields, as in training."""
        task, prompt = self._task, 0 if self._vectors else None
        assert task is not None
        fields = _fields(context, task.template.fields)
        if fields is not None:
            return task.open_request(Example(fields, None), reserve, prompt)
        names = [part.value for part in task.template.parts if part.kind == "field"]
        if len(names) > 1:
            raise ConfigError(
                f"The template {task.template.text!r} has {len(names)} places for input, but a task of the harness has "
                f"one context; leave the template out."
            )
        unlimited = task.encoder.encode(
            Example({names[0]: context}, None),
            num_virtual_tokens=task.num_virtual_tokens,
            max_length=2**62,
            target=None,
            append_eos=False,
        )
        self.lm.require_embeddings(unlimited.ids)
        fixed = task.encoder.num_fixed + task.num_virtual_tokens
        length = len(unlimited.ids) - task.encoder.num_fixed - task.template.has_soft_prompt
        cut = max(0, fixed + length + reserve - task.max_length)
        if cut > 0 and cut >= length:
            raise ConfigError(
                f"The template and {reserve} tokens behind it leave no room for a context in {task.max_length} tokens; "
                f"leave the template out, or set a smaller max_gen_toks in the task's generation_kwargs."
            )
        ids, shared = unlimited.ids, unlimited.shared
        return Request((*ids[:shared], *ids[shared + cut :]), shared, prompt=prompt, truncated=cut > 0)

    def _target(self, continuation: str) -> Tokens:
        """A continuation as the template's target; a blank between them is that of the template if it has one."""
        assert self._task is not None
        parts = self._task.template.parts
        spaced = len(parts) > 1 and parts[-2].kind == "text" and parts[-2].value.endswith(" ")
        target = self._task.encoder.target_ids(continuation.removeprefix(" ") if spaced else continuation)
        if not target:
            raise DataError(f"Expected a continuation with at least one token, found {continuation!r}; leave it out.")
        self.lm.require_embeddings(target)
        return target

    # --- requests → scores ------------------------------------------------------------------------

    def _score(
        self,
        rows: Sequence[tuple[Request, tuple[Tokens, ...]]],
        pairs: Sequence[tuple[str, str] | None],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        """Log of the summed probabilities of each row's words, and whether one of them is what greedy decoding writes.
        Rows with the same context are one request."""
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(rows), disable=disable_tqdm, desc="loglikelihood") as bar:
            for start in range(0, len(rows), AT_ONCE):
                part = rows[start : start + AT_ONCE]
                words: dict[Request, list[tuple[int, Tokens]]] = {}
                for row, (request, several) in enumerate(part):
                    words.setdefault(request, []).extend((row, word) for word in several)
                asked = [
                    Request(one.ids, one.shared, tuple(word for _, word in owned), one.prompt)
                    for one, owned in words.items()
                ]
                scores, greedy = self.lm.score_and_compare(asked, self._vectors, prefix_of=self._prefix_of)
                answers: dict[int, tuple[float, bool]] = {}
                for owned, values, same in zip(words.values(), scores, greedy, strict=True):
                    owners = list(dict.fromkeys(row for row, _ in owned))
                    index = [owners.index(row) for row, _ in owned]
                    summed = label_scores(values[None, : len(owned)], index)[0].tolist()
                    for row, value in zip(owners, summed, strict=True):
                        hits = [bool(same[i]) for i, (owner, _) in enumerate(owned) if owner == row]
                        answers[row] = (value, any(hits))
                found += [answers[row] for row in range(len(part))]
                self._keep(pairs[start : start + AT_ONCE], found[start:])
                bar.update(len(part))
        if any(value != value for value, _ in found):
            raise ConfigError(f"The base model's scores are not numbers in {self.lm.dtype}; load it with dtype fp32.")
        return found

    def _keep(self, pairs: Sequence[tuple[str, str] | None], answers: Sequence[tuple[float, bool]]) -> None:
        for pair, answer in zip(pairs, answers, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        """A task's settings of generation."""
        given = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        stop = tuple(str(text) for text in given.pop("until") if text)
        most, sampled = int(given.pop("max_gen_toks")), bool(given.pop("do_sample"))
        temperature, top_p = float(given.pop("temperature", 0.0) or 0.0), given.pop("top_p", None)
        if sampled and temperature == 0:
            raise ConfigError("The task asks for sampling without a temperature; set one in its generation_kwargs.")
        for name, value in given.items():
            if (name in ONLY_SAMPLED and not sampled) or value in WITHOUT_EFFECT.get(name, (None,)):
                continue
            raise ConfigError(
                f"The task generates with {name}={value!r}, which softprompt cannot do; leave it out of its "
                f"generation_kwargs."
            )
        return Sampling(
            max_new_tokens=most,
            temperature=temperature if sampled else 0.0,
            top_p=1.0 if top_p is None or not sampled else float(top_p),
            stop=tuple(dict.fromkeys((*stop, *filter(None, [self.tokenizer.eos_token])))),
        )


def task_of_rows(soft_prompt: SoftPrompt, dataset: Dataset, name: str = "rows") -> dict[str, Any]:
    """The soft prompt's own task for the harness: multiple choice among its labels, on ``dataset``. To be answered by a
    ``SoftPromptLM`` with ``use_template``.

    Args:
        soft_prompt: its template has the fields, its verbalizer the labels.
        dataset: rows with targets of these labels.
        name: what the results call it.

    Returns:
        A configuration that ``lm_eval.simple_evaluate(tasks=[…])`` takes.

    Raises:
        ConfigError: the soft prompt writes free text.
    """
    if soft_prompt.verbalizer is None:
        raise ConfigError(
            f"A task is made of rows for labels, but the soft prompt {soft_prompt.name!r} writes free text; use "
            f"`softprompt evaluate`."
        )
    labels = list(soft_prompt.verbalizer)
    rows = [
        {"context": json.dumps(dict(example.fields), ensure_ascii=False), "gold": labels.index(str(example.target))}
        for example in dataset.examples
    ]

    def made(**_: Any) -> Any:
        import datasets

        return {"test": datasets.Dataset.from_list(rows)}

    return {
        "task": name,
        "custom_dataset": made,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["context"],
        "doc_to_choice": labels,
        "doc_to_target": lambda doc: doc["gold"],
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _first_tokens(lm: FrozenLM) -> Tokens:
    """What the tokenizer puts before a text by itself: the beginning-of-sequence token, or nothing."""
    token = lm.tokenizer.bos_token_id
    ids: list[int] = lm.tokenizer("a", verbose=False).input_ids
    return (int(token),) if token is not None and ids[:1] == [token] else ()


def _words_of(task: Task, label: str) -> tuple[Tokens, ...]:
    owner = task.labels.index(label)
    return tuple(word for word, label_of in zip(task.words, task.label_of_word, strict=True) if label_of == owner)


def _fields(context: str, names: Sequence[str]) -> dict[str, str] | None:
    """The template's fields, where the context is a JSON object of exactly them."""
    if not context.startswith("{"):
        return None
    try:
        found = json.loads(context)
    except ValueError:
        return None
    right = isinstance(found, dict) and set(found) == set(names) and all(isinstance(v, str) for v in found.values())
    return found if right else None
