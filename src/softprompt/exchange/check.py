"""Whether another library computes from a folder what we compute from a soft prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from softprompt.data.example import Example
from softprompt.errors import SoftPromptError
from softprompt.files import StrPath, local_path
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT, Tokens

TEXTS = (
    "A fine film, and funny throughout.",
    "The parcel came late, and the box was open",
    "What is the capital of Peru?",
)
"""What is asked for a check, whatever the task is."""

COMPARED = 256
"""Tokens whose log-probabilities are compared, the most probable by the other library among them."""

WRITTEN = 8
"""Tokens that are written greedily and compared."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""The largest difference in log-probability, in nats, that rounding explains, by dtype of the base model."""

Peer = Callable[[Tokens, Tokens], torch.Tensor]
"""Tokens behind the virtual ones, and those that were written → logits float32 ``[V]`` of the next token."""


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        by: the other library.
        texts: how many texts were asked.
        difference: the largest difference in log-probability, in nats.
        same_text: how many of them both continued with the same tokens, greedily.
        passed: whether the difference is one of rounding.
    """

    by: str
    texts: int
    difference: float
    same_text: int
    passed: bool

    def as_dict(self) -> dict[str, object]:
        """JSON values by attribute."""
        return asdict(self)

    def __str__(self) -> str:
        """``checked with PEFT on 3 texts: log-probabilities within 2.1e-06, 3 of 3 greedy texts equal``."""
        verdict = "checked" if self.passed else "NOT the same"
        return (
            f"{verdict} with {self.by} on {self.texts} texts: log-probabilities within {self.difference:.1e}, "
            f"{self.same_text} of {self.texts} greedy texts equal"
        )


def against_peft(
    lm: FrozenLM, task: Task, vectors: torch.Tensor, folder: StrPath, multitask: int | None = None
) -> Checked:
    """Compares a soft prompt with a PEFT folder as PEFT reads it.

    Args:
        lm: the base model, which PEFT uses, too.
        task: the soft prompt's task.
        vectors: the soft prompt.
        folder: the PEFT folder.
        multitask: which task of a multitask prompt, from 0.

    Raises:
        ImportError: PEFT is not installed.
    """
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PEFT, about settings that it fills in by itself
        adapted: Any = PeftModel.from_pretrained(lm.model, str(local_path(folder))).eval()

    @torch.no_grad()
    def logits(rest: Tokens, written: Tokens) -> torch.Tensor:
        options = {} if multitask is None else {"task_ids": torch.tensor([multitask], device=lm.device)}
        ids, decoder = _placed(lm, rest, written)
        given = torch.tensor([ids], device=lm.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = adapted(input_ids=given, attention_mask=torch.ones_like(given), **options, **decoder)
        return out.logits[0, -1].float().cpu()  # type: ignore[no-any-return]

    return _compared("PEFT", lm, task, vectors, logits)


def against_embeddings(lm: FrozenLM, task: Task, vectors: torch.Tensor, numbers: torch.Tensor) -> Checked:
    """Compares a soft prompt with the embeddings of a file, before the embedded text, in transformers' own forward.

    Args:
        lm: the base model.
        task: the soft prompt's task.
        vectors: the soft prompt.
        numbers: float ``[P', H]``.
    """

    @torch.no_grad()
    def logits(rest: Tokens, written: Tokens) -> torch.Tensor:
        ids, decoder = _placed(lm, rest, written)
        text = lm.look_up(torch.tensor(ids, dtype=torch.long, device=lm.device))
        embedded = torch.cat([numbers.to(text), text])[None]
        return lm.model(inputs_embeds=embedded, use_cache=False, **decoder).logits[0, -1].float().cpu()  # type: ignore[no-any-return]

    return _compared("transformers", lm, task, vectors, logits)


def _placed(lm: FrozenLM, rest: Tokens, written: Tokens) -> tuple[Tokens, dict[str, torch.Tensor]]:
    """The input's tokens, and of an encoder–decoder what its decoder reads: there, written tokens are none of the
    input's."""
    if not lm.encoder_decoder:
        return (*rest, *written), {}
    ids = torch.tensor([(*lm.decoder_start, *written)], device=lm.device)
    return rest, {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


def _compared(by: str, lm: FrozenLM, task: Task, vectors: torch.Tensor, peer: Peer) -> Checked:
    difference, same = 0.0, 0
    requests = _requests(task)
    with lm.eager():
        for request in requests:
            rest = request.ids[request.ids.index(SOFT) + 1 :]
            theirs = peer(rest, ()).log_softmax(dim=0)
            tokens = theirs.topk(min(COMPARED, len(theirs))).indices.tolist()
            asked = Request(request.ids, request.shared, tuple((token,) for token in tokens), request.prompt)
            ours = lm.score([asked], [vectors])[0]
            difference = max(difference, float((ours - theirs[tokens]).abs().max()))
            written = generate(lm, [request], [vectors], Sampling(max_new_tokens=WRITTEN))[0].ids
            same += all(int(peer(rest, written[:i]).argmax()) == token for i, token in enumerate(written))
    return Checked(by, len(requests), difference, same, difference <= TOLERANCE.get(lm.dtype, 0.3))


def _requests(task: Task) -> Sequence[Request]:
    examples = [Example(dict.fromkeys(task.template.fields, text), None) for text in TEXTS]
    found = []
    for example in examples:
        try:
            found.append(task.open_request(example, WRITTEN))
        except SoftPromptError:  # a window too short for this text
            continue
    return found
