"""Stand-ins of llama-cpp-python, as far as the page about other servers uses it, and of SGLang's ``/generate``: they
compute with transformers' own forward of the tiny model."""

from __future__ import annotations

import ctypes
import io
import json
import urllib.request
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from softprompt.model.frozen import FrozenLM
from tests.conftest import make_model


class Tiny:
    """The tiny model, and the tokens that end a text."""

    def __init__(self, lm: FrozenLM) -> None:
        self.lm, self.model = lm, make_model("llama").eval()

    @torch.no_grad()
    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """``[V]`` behind the embeddings ``[T, H]``."""
        found: torch.Tensor = self.model(inputs_embeds=rows[None]).logits[0, -1]
        return found


def llama_cpp(lm: FrozenLM) -> Any:
    """In the place of the module."""
    tiny = Tiny(lm)

    def batch_init(length: int, width: int, sequences: int) -> Any:
        assert sequences == 1
        return SimpleNamespace(
            n_tokens=0,
            embd=(ctypes.c_float * (length * width))() if width else None,
            token=[-1] * length,
            pos=[-1] * length,
            n_seq_id=[0] * length,
            seq_id=[[-1] for _ in range(length)],
            logits=[False] * length,
        )

    def init(model: Any, options: Any) -> Any:
        assert options.n_batch >= options.n_ubatch > 0
        return SimpleNamespace(rows=torch.empty(0, tiny.lm.hidden_size), options=options, logits=None)

    def decode(context: Any, batch: Any) -> int:
        length, start = batch.n_tokens, len(context.rows)
        assert batch.pos[:length] == list(range(start, start + length))
        assert (batch.n_seq_id[:length], batch.seq_id[:length]) == ([1] * length, [[0]] * length)
        assert batch.logits[:length] == [False] * (length - 1) + [True]
        assert length <= context.options.n_ubatch
        assert start + length <= context.options.n_ctx
        if batch.embd is None:
            rows = tiny.lm.look_up(torch.tensor(batch.token[:length]))
        else:
            rows = torch.from_numpy(numpy.ctypeslib.as_array(batch.embd).reshape(length, -1).copy())
        context.rows = torch.cat([context.rows, rows])
        context.logits = tiny.logits(context.rows).numpy().copy()
        return 0

    def logits_of(context: Any, place: int) -> Any:
        assert place == -1
        return context.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    return SimpleNamespace(
        llama_model_default_params=SimpleNamespace,
        llama_model_load_from_file=lambda path, options: SimpleNamespace(path=path),
        llama_model_get_vocab=lambda model: model,
        llama_vocab_n_tokens=lambda vocabulary: len(lm.embedding),
        llama_vocab_is_eog=lambda vocabulary, token: token in lm.end_tokens,
        llama_context_default_params=SimpleNamespace,
        llama_init_from_model=init,
        llama_batch_init=batch_init,
        llama_decode=decode,
        llama_get_logits_ith=logits_of,
        llama_batch_free=lambda batch: None,
        llama_free=lambda context: None,
    )


def sglang(lm: FrozenLM, request: urllib.request.Request) -> Any:
    """In the place of ``urllib.request.urlopen``."""
    assert request.full_url == "http://localhost:30000/generate"
    assert isinstance(request.data, bytes)
    body = json.loads(request.data)
    rows, tiny, ids = torch.tensor(body.pop("input_embeds")), Tiny(lm), list[int]()
    assert body["sampling_params"]["temperature"] == 0
    while len(ids) < body["sampling_params"]["max_new_tokens"] and not lm.end_tokens.intersection(ids):
        ids.append(int(tiny.logits(rows).argmax()))
        rows = torch.cat([rows, lm.look_up(torch.tensor(ids[-1:]))])
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    return io.BytesIO(json.dumps({"text": text, "meta_info": {}}).encode())
