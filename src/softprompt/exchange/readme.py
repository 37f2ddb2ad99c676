"""The page beside exported files: what they are, how to tokenise, and code that gives the answers that ours gives."""

from __future__ import annotations

from softprompt.data.example import Example
from softprompt.exchange.baking import Baked
from softprompt.exchange.check import Checked
from softprompt.exchange.peft_folder import HUB_IDS
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.encoder import recipe
from softprompt.text.tokens import SOFT

_LOAD = """import torch
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained({base!r})
tokenizer = AutoTokenizer.from_pretrained({base!r})
"""

_PEFT_ANSWER = """from peft import PeftModel

model = {load}
ids = torch.tensor([tokens({example})])
answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), {options})
print(tokenizer.decode(answer[0{new}], skip_special_tokens=True))
"""

_EMBEDDED_ANSWER = """{read}
ids = torch.tensor([tokens({example})])
embedded = torch.cat([numbers[None].to(model.dtype), model.get_input_embeddings()(ids)], dim=1)
answer = model.generate(inputs_embeds=embedded, {options})
print(tokenizer.decode(answer[0], skip_special_tokens=True))
"""

_PIPELINE = """from transformers import pipeline

pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
options = {{"add_special_tokens": False, "return_full_text": False, "do_sample": False, "max_new_tokens": 32}}
print(pipe({text!r}, **options)[0]["generated_text"])
"""

_READ = {
    "npy": "import numpy\n\nnumbers = torch.from_numpy(numpy.load({file!r}))",
    "safetensors": "from safetensors.torch import load_file\n\nnumbers = load_file({file!r})['prompt_embeddings']",
}


def peft_code(base: str, task: Task, load: str) -> str:
    """Python code that answers with PEFT: loads the base model and the adapter, tokenises and generates.

    Args:
        base: id or folder of the base model.
        task: the soft prompt's task.
        load: Python source that makes ``model`` with the adapter of ``model``.
    """
    new = "" if task.lm.encoder_decoder else ", ids.shape[1]:"
    answer = _PEFT_ANSWER.format(load=load, example=_example(task), options=_options(task), new=new)
    return "\n".join([_load(base, task), recipe(task.encoder), answer])


def _load(base: str, task: Task) -> str:
    kind = "AutoModelForSeq2SeqLM" if task.lm.encoder_decoder else "AutoModelForCausalLM"
    return _LOAD.format(base=base, kind=kind)


def _options(task: Task) -> str:
    """Arguments of transformers' ``generate``."""
    start = task.lm.decoder_start
    begins = f"decoder_input_ids=torch.tensor([{list(start)}]), " if start else ""
    return f"{begins}max_new_tokens=32, do_sample=False"


def _example(task: Task) -> str:
    """Arguments of ``tokens`` in an example, one a field of the template."""
    return ", ".join(repr("A text.") for _ in task.template.fields)


def _in_pipeline(lm: FrozenLM, task: Task) -> list[str]:
    """How to use it in a pipeline of transformers, which tokenizes all that follows the soft prompt at once."""
    example = Example(dict.fromkeys(task.template.fields, "A text."), None)
    behind = task.template.parts[[part.kind for part in task.template.parts].index("soft") + 1 :]
    text = "".join("A text." if part.kind == "field" else part.value for part in behind).removesuffix(" ")
    ids = task.open_request(example, 1).ids
    if tuple(lm.tokenizer(text, add_special_tokens=False).input_ids) != ids[ids.index(SOFT) + 1 :]:
        return [
            "A `pipeline` tokenizes all that follows the soft prompt at once, which gives other tokens here: use the",
            "code above.",
            "",
        ]
    return [
        "In a `pipeline`, write what follows the soft prompt in the template as one text. Where that gives the tokens",
        "that the code above gives, so is the answer; `pipeline` cannot load this folder by itself.",
        "",
        "```python",
        _PIPELINE.format(text=text) + "```",
        "",
    ]


def readme(lm: FrozenLM, soft_prompt: SoftPrompt, baked: Baked, to: str, checked: Checked | None) -> str:
    """The page, as Markdown."""
    base = HUB_IDS.get(soft_prompt.base, soft_prompt.base)
    what = "keys and values of every layer" if baked.is_kv else "embeddings"
    lines = [
        f"# {soft_prompt.name}",
        "",
        f"A soft prompt for `{base}`: {baked.num_virtual_tokens} virtual tokens, {what}, in the form of {to}.",
        "It was made with [softprompt](https://pypi.org/project/softprompt).",
        "",
    ]
    if base != soft_prompt.base:
        lines += [
            f"It was trained on what softprompt calls `{soft_prompt.base}`, a quantised copy of `{base}`; on the",
            "original weights its answers may differ a little.",
            "",
        ]
    if baked.before:
        text = lm.tokenizer.decode(list(baked.before))
        lines += [
            f"Its first {len(baked.before)} virtual tokens are what stands before the soft prompt in its template,",
            f"{text!r}. Do not put them, or a beginning-of-sequence token, before the text again.",
            "",
        ]
    lines += ["## Use", "", "Tokenise the text so, piece by piece and without special tokens:", "", "```python"]
    if to in _READ:
        read = _READ[to].format(file=f"{soft_prompt.name}.{to}")
        answer = _EMBEDDED_ANSWER.format(example=_example(baked.task), read=read, options=_options(baked.task))
        lines += [_load(base, baked.task), recipe(baked.task.encoder), answer + "```", ""]
    else:
        load = 'PeftModel.from_pretrained(model, ".")  # this folder'
        lines += [peft_code(base, baked.task, load) + "```", "", *_in_pipeline(lm, baked.task)]
    if soft_prompt.verbalizer is not None:
        labels = ", ".join(f"`{label}`" for label in soft_prompt.verbalizer)
        lines += [f"It answers with one of these labels: {labels}.", ""]
    lines += ["Template:", "", "```", soft_prompt.template, "```", ""]
    lines += [f"When it was exported: {checked}." if checked else "It was not compared with the other library.", ""]
    return "\n".join(lines)
