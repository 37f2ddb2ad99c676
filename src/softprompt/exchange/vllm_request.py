"""Requests to a vLLM server that give the answers of a soft prompt: whole embedded sequences (``prompt_embeds``)."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import torch

from softprompt.data.example import Example
from softprompt.exchange.baking import Baked
from softprompt.exchange.check import TEXTS
from softprompt.exchange.peft_folder import HUB_IDS
from softprompt.files import atomic_writer
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import default_sampling
from softprompt.text.encoder import recipe

NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Said each time: penalties may be set for a server by the model's own files."""

REQUEST, CODE = "request.json", "ask.py"

_CODE = '''"""Asks a vLLM server of {base}, started with --enable-prompt-embeds: python ask.py URL TEXT"""

import base64
import io
import json
import sys
import urllib.request

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = {base!r}
tokenizer = AutoTokenizer.from_pretrained(BASE)
table = AutoModelForCausalLM.from_pretrained(BASE).get_input_embeddings()
numbers = load_file({file!r})["prompt_embeddings"]


{recipe}

def request(*texts):
    ids = torch.tensor(tokens(*texts))
    with torch.no_grad():
        embedded = torch.cat([numbers, table(ids).float()])
    file = io.BytesIO()
    torch.save(embedded, file)
    return {{"model": BASE, "prompt_embeds": base64.b64encode(file.getvalue()).decode(), **{options!r}}}


if __name__ == "__main__":
    url, *texts = sys.argv[1:]
    body = json.dumps(request(*texts)).encode()
    headers = {{"Content-Type": "application/json"}}
    with urllib.request.urlopen(urllib.request.Request(f"{{url}}/v1/completions", body, headers)) as answer:
        print(json.load(answer)["choices"][0]["text"].strip())
'''

_README = """# {name}

A soft prompt for `{base}`, for a vLLM server of that model. Start it with `--enable-prompt-embeds`:

```sh
vllm serve {base} --enable-prompt-embeds
python ask.py http://localhost:8000 {example}
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d @{request}
```

`ask.py` embeds a text behind the soft prompt and sends the whole sequence. It needs torch, transformers, safetensors
and the base model for its embedding table. `{request}` is the finished request for the text {text!r}.

vLLM takes `prompt_embeds` in `/v1/completions`. Never mix token ids and embeddings in one request.

Template:

```
{template}
```
"""


def write(path: Path, lm: FrozenLM, soft_prompt: SoftPrompt, baked: Baked, file: str) -> None:
    """Writes a finished request, code that makes others, and a README.

    Args:
        path: the folder, which holds ``file`` already.
        lm: the base model.
        soft_prompt: what is exported.
        baked: its embeddings at the start of a sequence.
        file: the safetensors file with these.

    Raises:
        OSError: the folder cannot be written.
    """
    base, task = HUB_IDS.get(soft_prompt.base, soft_prompt.base), baked.task
    longest = max((len(word) for word in task.words), default=default_sampling(task).max_new_tokens)
    options = {"max_tokens": longest, "temperature": 0, **NEUTRAL}
    example = Example(dict.fromkeys(task.template.fields, TEXTS[0]), None)
    sequence = lm.embed(task.open_request(example, longest).ids, soft_prompt.vectors).float().cpu()
    body = {"model": base, "prompt_embeds": saved(sequence), **options}
    code = _CODE.format(base=base, file=file, recipe=recipe(task.encoder), options=options)
    page = _README.format(
        name=soft_prompt.name,
        base=base,
        example=" ".join(f'"{TEXTS[0]}"' for _ in task.template.fields),
        request=REQUEST,
        text=TEXTS[0],
        template=soft_prompt.template,
    )
    for name, text in ((REQUEST, json.dumps(body)), (CODE, code), ("README.md", page)):
        with atomic_writer(path / name) as out:
            out.write(text.encode())


def saved(embedded: torch.Tensor) -> str:
    """A tensor as vLLM reads it: what ``torch.save`` writes, in base64."""
    file = io.BytesIO()
    torch.save(embedded, file)
    return base64.b64encode(file.getbuffer()).decode()
