"""The template of an encoder–decoder: two sequences, each tokenized as the tokenizer does it."""

from __future__ import annotations

import copy
import json
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from softprompt.data.example import Conversation, Example
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.task import Task
from softprompt.text.chat import user_template
from softprompt.text.encoder import Encoder, recipe
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from tests.encoder_decoders import make_encoder_decoder, tokenizer_of
from tests.servers import CHAT
from tests.text.test_template import BOTH, bare


def ending(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy that puts its end-of-sequence token behind a text, as T5's does."""
    found: Any = copy.deepcopy(tokenizer)
    closing = str(found.eos_token)
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {closing}", special_tokens=[(closing, found.eos_token_id)]
    )
    return found


@BOTH
def test_both_sequences_are_what_the_tokenizer_makes_of_them(tokenizer: PreTrainedTokenizerBase) -> None:
    closing = ending(tokenizer)
    encoder = Encoder(Template("{soft_prompt}a film : {input}\nLabel: {target}"), closing, encoder_decoder=True)
    found = encoder.encode(
        Example({"input": "good film"}, None), num_virtual_tokens=5, max_length=100, target="bad", append_eos=True
    )
    assert found.ids == (SOFT, *closing("a film : good film\nLabel:").input_ids)
    assert found.target_ids == tuple(closing(text_target="bad").input_ids)
    assert encoder.num_fixed == len(found.ids) - 1 - len(bare(tokenizer, " good film"))
    assert encoder.ends == ((closing.eos_token_id,),)


@BOTH
def test_the_recipe_ends_the_input(tokenizer: PreTrainedTokenizerBase) -> None:
    closing = ending(tokenizer)
    encoder = Encoder(Template("{soft_prompt}a film : {input}\nLabel: {target}"), closing, encoder_decoder=True)
    scope: dict[str, Any] = {"tokenizer": closing}
    exec(recipe(encoder), scope)
    found = encoder.encode(
        Example({"input": "good film"}, None), num_virtual_tokens=5, max_length=100, target=None, append_eos=False
    )
    assert (SOFT, *scope["tokens"]("good film")) == found.ids


def test_a_conversation_goes_into_the_encoder_and_the_answer_out_of_the_decoder() -> None:
    tokenizer = tokenizer_of("t5")
    tokenizer.chat_template = CHAT
    lm = FrozenLM(make_encoder_decoder("t5"), tokenizer, name="chat", dtype="fp32")
    task = Task(lm, user_template(tokenizer), None, 3, lm.window)
    before = json.dumps({"messages": [{"role": "user", "content": "{message 1}"}], "tools": None})
    answer = json.dumps({"role": "assistant", "content": "{answer}"})
    example = Example({"message 1": "a film"}, "very good", conversation=Conversation("row 1", before, answer))
    request = task.target_request(example)
    end = tokenizer.eos_token_id
    given = "".join(map(str, tokenizer.convert_ids_to_tokens(list(request.ids[1:]))))
    assert request.ids[0] == SOFT
    assert given.replace("\u0120", " ").replace("\u010a", "\n") == "user:\na film</s>assistant:\n</s>"
    assert request.words == ((*tokenizer("very good", add_special_tokens=False).input_ids, end),)
