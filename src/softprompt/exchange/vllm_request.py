"""Requests to a vLLM server that give the answers of a soft prompt: whole embedded sequences (``prompt_embeds``), and
messages of which one's content is embedded where the base model's chat template gives the same tokens."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt.data.example import Example
from softprompt.errors import TemplateError
from softprompt.exchange.baking import Baked
from softprompt.exchange.check import TEXTS
from softprompt.exchange.peft_folder import HUB_IDS
from softprompt.files import atomic_writer
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import default_sampling
from softprompt.tasks.task import Task
from softprompt.text.encoder import recipe
from softprompt.text.spliced import PLACEHOLDER, Message, Splice, Splicer

NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Said each time: penalties may be set for a server by the model's own files."""

REQUEST, CHAT, CODE = "request.json", "chat.json", "ask.py"

_CODE = '''"""Asks a vLLM server of {base}, started with --enable-prompt-embeds: {usage}"""

import base64
{hashlib}import io
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

def embedded(*texts):
    with torch.no_grad():
        return torch.cat([numbers, table(torch.tensor(tokens(*texts))).float()])


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor.clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def request(*texts):
    return {{"model": BASE, "prompt_embeds": saved(embedded(*texts)), **{options!r}}}

{chat}
def ask(url, body):
    headers = {{"Content-Type": "application/json"}}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)["choices"][0]


if __name__ == "__main__":
{main}'''

_MAIN = """    url, *texts = sys.argv[1:]
    print(ask(f"{url}/v1/completions", request(*texts))["text"].strip())
"""

_MAIN_CHAT = """    url, *texts = [argument for argument in sys.argv[1:] if argument != "--chat"]
    if "--chat" in sys.argv:
        print(ask(f"{url}/v1/chat/completions", chat(*texts))["message"]["content"].strip())
    else:
        print(ask(f"{url}/v1/completions", request(*texts))["text"].strip())
"""

_CHAT = """
PLACE = {place!r}  # as vLLM has it
tokenizer.add_special_tokens({{"additional_special_tokens": [PLACE]}})


def chat(*texts):
    whole = embedded(*texts)
    content = whole[{before}:{stop}]
    messages = [{messages}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    found = [at for at, id in enumerate(ids) if id == tokenizer.convert_tokens_to_ids(PLACE)]
    behind = len(whole) - {before} - len(content)
    if len(found) != 1 or ids[found[0] + 1 :] != tokens(*texts)[-behind:]:
        raise SystemExit("vLLM makes other tokens of this text in a chat; leave --chat out")
    for message in messages:
        if message["content"] == PLACE:
            message["content"] = [{{"type": "prompt_embeds", "data": saved(content)}}]
    salt = hashlib.sha256(numbers.numpy().tobytes() + f" {before} {{len(content)}}".encode()).hexdigest()
    return {{"model": BASE, "messages": messages, "cache_salt": salt, **{options!r}}}

"""

_README = """# {name}

A soft prompt for `{base}`, for a vLLM server of that model. Start it with `--enable-prompt-embeds`:

```sh
vllm serve {base} --enable-prompt-embeds
python ask.py http://localhost:8000 {example}
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d @{request}
```

`ask.py` embeds a text behind the soft prompt and sends the whole sequence. It needs torch, transformers, safetensors
and the base model for its embedding table. `{request}` is the finished request for the text {text!r}.

## As a chat

{chat}

## Template

```
{template}
```
"""

_README_CHAT = """The soft prompt stands within a message of the base model's chat template here, so the chat endpoint
gives the same answers:

```sh
python ask.py --chat http://localhost:8000 {example}
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d @{request}
```

`{request}` is the finished request for the text {text!r}. The content of the {role} message is one part,
`{{"type": "prompt_embeds", "data": …}}`: {what}. The server must use the base model's own chat template.
{limit}
`cache_salt` tells the embeddings, and where they stand, from all others: vLLM up to 0.32 leaves out of the key of its
prefix cache which places hold embeddings (https://github.com/vllm-project/vllm/issues/56655)."""

_README_NO_CHAT = """vLLM's chat endpoint takes embeddings as a part of a message's content, but would not give the
same answers: {reason}. Use `/v1/completions`."""

_LIMIT = """
vLLM tokenizes the text together with the chat template, and takes a special token that is spelled in it for one.
Where that gives other tokens than here, `ask.py --chat` refuses."""


@dataclass(frozen=True)
class _Chat:
    """A request as messages.

    Attributes:
        messages: the template's.
        splice: those of the request.
        length: embeddings in the content.
    """

    messages: tuple[Message, ...]
    splice: Splice
    length: int

    @property
    def embeds_fields(self) -> bool:
        """Whether the message with the soft prompt has input text, too."""
        return any(message.has_soft_prompt and message.fields for message in self.messages)

    def body(self, lm: FrozenLM, soft_prompt: SoftPrompt, baked: Baked, ids: Sequence[int]) -> dict[str, Any]:
        """What the chat endpoint is sent, without options."""
        embedded = lm.embed(self.splice.content(ids), soft_prompt.vectors).float().cpu()
        place = f" {self.splice.before} {self.length}".encode()
        salt = hashlib.sha256(baked.numbers.contiguous().numpy().tobytes() + place).hexdigest()
        return {"messages": self.splice.conversation(saved(embedded)), "cache_salt": salt}

    def code(self, task: Task, options: dict[str, Any]) -> str:
        """Python source of ``chat(*texts)``."""
        before = self.splice.before
        stop = f"len(whole) - {self.splice.behind}" if self.embeds_fields else str(before + self.length)
        names = {name: f"texts[{number}]" for number, name in enumerate(task.template.fields)}
        messages = []
        for message in self.messages:
            pieces = [names[part.value] if part.kind == "field" else repr(part.value) for part in message.parts]
            content = "PLACE" if message.has_soft_prompt else " + ".join(pieces) or "''"
            messages.append(f'{{"role": {message.role!r}, "content": {content}}}')
        return _CHAT.format(place=PLACEHOLDER, before=before, stop=stop, messages=", ".join(messages), options=options)

    def page(self, example: str) -> str:
        """What the README says of it."""
        role = next(message.role for message in self.messages if message.has_soft_prompt)
        what = "the soft prompt, and what stands beside it in that message"
        limit = "" if self.embeds_fields else _LIMIT
        if self.embeds_fields:
            what = "the soft prompt and the embedded text"
        return _README_CHAT.format(example=example, request=CHAT, text=TEXTS[0], role=role, what=what, limit=limit)


def _chat(lm: FrozenLM, task: Task, example: Example, request: Request) -> _Chat:
    """A request as messages.

    Raises:
        TemplateError: there are none; the message is a reason.
    """
    splicer = Splicer(lm.tokenizer)
    messages = splicer.messages(task.template)
    splice = splicer.splice(task.template, example.fields, request.ids)
    chat = _Chat(messages, splice, len(splice.content(request.ids)) - 1 + task.num_virtual_tokens)
    if chat.embeds_fields and any(message.fields and not message.has_soft_prompt for message in messages):
        raise TemplateError("input text stands both in the soft prompt's message and in another one")
    return chat


def write(path: Path, lm: FrozenLM, soft_prompt: SoftPrompt, baked: Baked, file: str) -> None:
    """Writes finished requests, code that makes others, and a README.

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
    request = task.open_request(example, longest)
    sequence = lm.embed(request.ids, soft_prompt.vectors).float().cpu()
    texts = " ".join(f'"{TEXTS[0]}"' for _ in task.template.fields)
    files = {REQUEST: json.dumps({"model": base, "prompt_embeds": saved(sequence), **options})}
    code = {"usage": "python ask.py URL TEXT", "hashlib": "", "chat": "", "main": _MAIN}
    try:
        chat = _chat(lm, task, example, request)
        files[CHAT] = json.dumps({"model": base, **chat.body(lm, soft_prompt, baked, request.ids), **options})
        code = {"usage": "python ask.py [--chat] URL TEXT", "hashlib": "import hashlib\n", "main": _MAIN_CHAT}
        code["chat"] = chat.code(task, options)
        as_chat = chat.page(texts)
    except TemplateError as error:
        as_chat = _README_NO_CHAT.format(reason=error)
    files[CODE] = _CODE.format(base=base, file=file, recipe=recipe(task.encoder), options=options, **code)
    files["README.md"] = _README.format(
        name=soft_prompt.name,
        base=base,
        example=texts,
        request=REQUEST,
        text=TEXTS[0],
        chat=as_chat,
        template=soft_prompt.template,
    )
    for name, text in files.items():
        with atomic_writer(path / name) as out:
            out.write(text.encode())


def saved(embedded: torch.Tensor) -> str:
    """A tensor as vLLM reads it: what ``torch.save`` writes, in base64."""
    file = io.BytesIO()
    torch.save(embedded, file)
    return base64.b64encode(file.getbuffer()).decode()
