from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softprompt.data.example import Example
from softprompt.errors import TemplateError
from softprompt.text.encoder import Encoder
from softprompt.text.template import DEFAULT_TEMPLATE, Template, chat_template
from softprompt.text.tokens import SOFT, TokenSequence

TEXTS = [
    "the answer is positive or negative .",
    "a good film is a good answer : great , awful !",
    "Review : the film is great\nAnswer : positive",
    "Answer: negative\nReview: awful . ( good )",
] * 3


def byte_level(**options: Any) -> PreTrainedTokenizerBase:
    """Like SmolLM2's or GPT-2's: every byte is a token, a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, **options
    )


def sentence_piece() -> PreTrainedTokenizerBase:
    """Like Llama 2's or T5's: a space is ▁, one is put before every text, and BOS comes first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=list("<s/>\n:.!()"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


BPE = byte_level(eos_token="<|im_end|>", pad_token="<|endoftext|>")
SPM = sentence_piece()
BOTH = pytest.mark.parametrize("tokenizer", [BPE, SPM], ids=["bpe", "spm"])

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {json: {}}\n{% endif %}"
)


def encoded(
    text: str, tokenizer: PreTrainedTokenizerBase, target: str | None = None, /, **fields: str
) -> TokenSequence:
    return Encoder(Template(text), tokenizer).encode(
        Example(fields, None), num_virtual_tokens=5, max_length=1000, target=target, append_eos=False
    )


def tokens(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[str]:
    return ["SOFT" if id == SOFT else str(tokenizer.convert_ids_to_tokens(id)) for id in ids]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode([id for id in ids if id != SOFT], clean_up_tokenization_spaces=False))


def bare(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """What the tokenizer itself makes of the whole text."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def failure(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(TemplateError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# Parsing


def test_a_template_knows_its_fields() -> None:
    template = Template("{soft_prompt}Premise: {premise}\n{Review Text} {premise}{{x}}: {target}")
    assert template.fields == ("premise", "Review Text")
    assert template.has_soft_prompt
    assert not Template("{input}{target}").has_soft_prompt
    assert Template(DEFAULT_TEMPLATE).fields == ("input",)
    assert Template("{input}{target}") == Template("{input}{target}") != template
    assert hash(Template("{input}{target}")) == hash(Template("{input}{target}"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{input}", "Expected {target} at the end of the template, found none in '{input}'; append it."),
        (
            "{input}{target}.",
            "Expected {target} at the end of the template, found '.' after it in '{input}{target}.'; "
            "move it to the end.",
        ),
        (
            "{target}{{{input}",
            "Expected {target} at the end of the template, found '{{{input}' after it in '{target}{{{input}'; "
            "move it to the end.",
        ),
        (
            "{soft_prompt}{target}",
            "Expected an input field such as {input} in the template, found none in '{soft_prompt}{target}'; add one.",
        ),
        (
            "{input}{target} {target}",
            "Expected {target} once in the template, found another at character 17 of '{input}{target} {target}'; "
            "remove one.",
        ),
        (
            "{soft_prompt}{input}{soft_prompt}{target}",
            "Expected {soft_prompt} once in the template, found another at character 21 of "
            "'{soft_prompt}{input}{soft_prompt}{target}'; remove one.",
        ),
        (
            "a {input}{target",
            "Expected braces in pairs in the template, found { alone at character 10 of 'a {input}{target'; "
            "close it, or write {{ for a literal brace.",
        ),
        (
            "{input}} {target}",
            "Expected braces in pairs in the template, found } alone at character 8 of '{input}} {target}'; "
            "close it, or write }} for a literal brace.",
        ),
        *(
            (
                f"{name}{{target}}",
                f"Expected a field's name between braces in the template, found {name} at character 1 of "
                f"'{name}{{target}}'; write {{{{ and }}}} for literal braces.",
            )
            for name in ["{}", "{0}", "{input!r}", "{input:>10}", "{input[0]}", "{ input }", "{a  b}", "{-x}"]
        ),
    ],
)
def test_what_is_no_template_is_refused(text: str, sentence: str) -> None:
    assert failure(Template, text) == sentence


LITERAL = st.text(st.sampled_from("ab {}\n:.")).map(lambda text: ("text", text))
FIELD = st.sampled_from(["input", "premise", "Review Text", "x.y-z", "_1"]).map(lambda name: ("field", name))
SOFT_PROMPT = st.just(("soft", ""))


@st.composite
def template_parts(draw: st.DrawFn) -> list[tuple[str, str]]:
    parts = draw(st.lists(LITERAL | FIELD, max_size=6))
    parts.insert(draw(st.integers(0, len(parts))), draw(FIELD))
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), draw(SOFT_PROMPT))
    return parts


def written(parts: list[tuple[str, str]], soft: str = "{soft_prompt}") -> str:
    def one(kind: str, value: str) -> str:
        if kind == "text":
            return "".join(letter * 2 if letter in "{}" else letter for letter in value)
        return soft if kind == "soft" else "{" + value + "}"

    return "".join(one(*part) for part in parts) + "{target}"


@given(parts=template_parts(), hard=st.text(st.sampled_from("ab {}\n")))
def test_a_parsed_template_says_what_was_written(parts: list[tuple[str, str]], hard: str) -> None:
    template = Template(written(parts))
    assert template.fields == tuple(dict.fromkeys(value for kind, value in parts if kind == "field"))
    assert template.has_soft_prompt == (("soft", "") in parts)
    escaped = hard.replace("{", "{{").replace("}", "}}")
    assert template.replace_soft_prompt(hard) == Template(written(parts, soft=escaped))
    assert not template.replace_soft_prompt(hard).has_soft_prompt
    # the text of all pieces together, with str.format as the oracle (it reads these templates, too)
    values = {"input": "A", "premise": "P", "_1": "U"}
    if set(template.fields) <= set(values):
        sequence = encoded(template.text, BPE, "T", **values)
        expected = template.text.format(soft_prompt="", target="T", **values)
        assert decoded(BPE, sequence.ids + sequence.target_ids) == expected
        assert sequence.ids.count(SOFT) == template.has_soft_prompt


# Placing


def test_a_space_before_a_field_or_the_target_moves_to_it() -> None:
    sequence = encoded("{soft_prompt}Review: {input}\nAnswer: {target}", BPE, "positive", input="good film")
    assert tokens(BPE, sequence.ids)[0] == "SOFT"
    assert decoded(BPE, sequence.ids) == "Review: good film\nAnswer:"
    # here the byte-level pre-tokenizer splits at these places anyway: the whole text has the same tokens
    assert sequence.ids[1:] + sequence.target_ids == bare(BPE, "Review: good film\nAnswer: positive")
    assert tokens(BPE, sequence.target_ids) == ["Ġpositive"]
    assert sequence.shared == 1 + len(bare(BPE, "Review:"))
    assert not sequence.truncated


def test_only_one_space_moves_and_only_to_a_field_or_the_target() -> None:
    sequence = encoded("Answer: {soft_prompt} {input}  {target}", BPE, "positive", input="good")
    assert tokens(BPE, sequence.ids[sequence.ids.index(SOFT) - 1 :]) == ["Ġ", "SOFT", "Ġgood", "Ġ"]
    assert sequence.shared == len(bare(BPE, "Answer: ")) + 1
    assert tokens(BPE, sequence.target_ids) == ["Ġpositive"]
    sequence = encoded("{input}\n{target}", BPE, " positive", input=" good")
    assert (*sequence.ids, *sequence.target_ids) == (*bare(BPE, " good"), *bare(BPE, "\n"), *bare(BPE, " positive"))


def test_a_tokenizer_that_adds_a_space_gets_none() -> None:
    sequence = encoded("{soft_prompt}{input}\nAnswer: {target}", SPM, "positive", input="good film")
    assert tokens(SPM, sequence.ids)[:2] == ["<s>", "SOFT"]
    assert sequence.shared == 2
    assert decoded(SPM, sequence.ids[2:]) == "good film\nAnswer:"
    assert sequence.target_ids == bare(SPM, "positive")
    assert decoded(SPM, sequence.ids[2:] + sequence.target_ids) == "good film\nAnswer: positive"


@pytest.mark.parametrize("text", ["{input}\nAnswer:{target}", "({input}){target}", "{input}.{target}"])
def test_a_tokenizer_that_adds_a_space_adds_none_inside_the_text(text: str) -> None:
    sequence = encoded(text, SPM, "good", input="a film")
    assert decoded(SPM, sequence.ids[1:] + sequence.target_ids) == text.format(input="a film", target="good")


@BOTH
def test_shared_counts_what_no_example_changes(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "the film : {soft_prompt} is ( {input} ) good {soft}{target}"
    one = encoded(text, tokenizer, input="great", soft="a")
    two = encoded(text, tokenizer, input="awful , awful", soft="b")
    assert one.shared == two.shared
    assert SOFT in one.ids[: one.shared]
    assert one.ids[: one.shared] == two.ids[: two.shared]
    hard = len(bare(tokenizer, "the film : ")) + len(bare(tokenizer, " is ("))
    assert one.shared == hard + 1 + (tokenizer is SPM)


def test_without_hard_text_only_bos_is_shared() -> None:
    assert encoded("{input}{soft_prompt}{target}", BPE, input="good").shared == 0
    assert encoded("{input}{soft_prompt}{target}", SPM, input="good").shared == 1


@BOTH
def test_the_start_of_a_sequence_does_not_depend_on_its_target(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "{soft_prompt}{input} is {target}"
    without = encoded(text, tokenizer, None, input="the film")
    assert without.target_ids == ()
    for target in ["good", "!", "\n", " x", "ing"]:
        assert encoded(text, tokenizer, target, input="the film").ids == without.ids


def test_bos_is_first_and_never_twice() -> None:
    assert tokens(SPM, encoded("{input}{target}", SPM, input="a").ids)[0] == "<s>"
    sequence = encoded("<s>the {soft_prompt}{input}{target}", SPM, input="film")
    assert sequence.ids.count(SPM.bos_token_id) == 1
    assert sequence.ids[0] == SPM.bos_token_id
    assert SPM.bos_token_id in encoded("the {soft_prompt}{input}{target}", SPM, input="film").ids


@BOTH
def test_a_hard_prompt_takes_the_soft_prompts_place(tokenizer: PreTrainedTokenizerBase) -> None:
    template = Template("{soft_prompt}{input}\nAnswer: {target}").replace_soft_prompt("Review {x} : ")
    assert template.text == "Review {{x}} : {input}\nAnswer: {target}"
    example = Example({"input": "good film"}, None)
    sequence = Encoder(template, tokenizer).encode(
        example, num_virtual_tokens=100, max_length=60, target="positive", append_eos=False
    )
    assert SOFT not in sequence.ids
    assert not sequence.truncated  # no virtual tokens, whatever their number
    assert sequence.shared == len(bare(tokenizer, "Review {x} :")) + (tokenizer is SPM)
    empty = Encoder(Template(DEFAULT_TEMPLATE).replace_soft_prompt(""), tokenizer)
    soft = Encoder(Template(DEFAULT_TEMPLATE), tokenizer)
    options: dict[str, Any] = {"num_virtual_tokens": 5, "max_length": 60, "target": None, "append_eos": False}
    with_soft = soft.encode(example, **options).ids
    assert empty.encode(example, **options).ids == tuple(id for id in with_soft if id != SOFT)


SHOT_VALUES = st.fixed_dictionaries({name: st.text(st.sampled_from("xy {}\n"), max_size=4) for name in ("input", "_1")})


@settings(deadline=None)
@given(
    pieces=st.lists(LITERAL | st.sampled_from([("field", "input"), ("field", "_1"), ("soft", "")]), max_size=5),
    shots=st.lists(st.tuples(SHOT_VALUES, st.text(st.sampled_from("st{} "), max_size=3)), max_size=3),
    hard=st.text(st.sampled_from("ab {}\n"), max_size=4),
)
def test_shots_are_the_same_template_filled_in_and_a_blank_line_after_each(
    pieces: list[tuple[str, str]], shots: list[tuple[dict[str, str], str]], hard: str
) -> None:
    first_soft = pieces.index(("soft", "")) if ("soft", "") in pieces else None
    parts = [part for i, part in enumerate(pieces) if part[0] != "soft" or i == first_soft]
    template = Template(written([*parts, ("field", "input")]))
    # str.format is the oracle; the hard prompt is where the first of all these texts has its soft prompt
    texts = []
    for number, (values, target) in enumerate([*shots, ({"input": "A", "_1": "U"}, "T")]):
        texts.append(template.text.format(soft_prompt=hard if number == 0 else "", target=target, **values))
    long = template.with_shots(shots)
    assert long.has_soft_prompt == template.has_soft_prompt
    assert long.fields == template.fields
    sequence = encoded(long.replace_soft_prompt(hard).text, BPE, "T", input="A", _1="U")
    assert decoded(BPE, sequence.ids + sequence.target_ids) == "\n\n".join(texts)
    assert template.with_shots([]) == template


def test_shots_are_a_shared_prefix_and_a_chat_models_turns_stay_turns() -> None:
    tokenizer = byte_level(eos_token="<|im_end|>", chat_template=CHAT)
    template = chat_template(tokenizer).with_shots([({"input": "good"}, "positive"), ({"input": "a <b"}, "x")])
    sequence = encoded(template.text, tokenizer, input="the film")
    turn, soft = bare(tokenizer, "<|im_start|>")[0], sequence.ids.index(SOFT)
    assert [sequence.ids[: sequence.shared].count(turn), sequence.ids.count(turn)] == [5, 6]
    assert decoded(tokenizer, sequence.ids[:soft]) == "<|im_start|>user\n"
    assert decoded(tokenizer, sequence.ids[soft:]).startswith(
        "good<|im_end|>\n<|im_start|>assistant {json: {}}\npositive"
    )


def test_eos_follows_the_target_where_it_is_asked_for() -> None:
    encoder = Encoder(Template("{input} {target}"), BPE)
    assert encoder.target_ids("good", append_eos=True) == (*bare(BPE, " good"), BPE.eos_token_id)
    example = Example({"input": "a"}, "not this one")
    options: dict[str, Any] = {"num_virtual_tokens": 5, "max_length": 60, "append_eos": True}
    assert encoder.encode(example, target="good", **options).target_ids == encoder.target_ids("good", append_eos=True)
    assert encoder.encode(example, target=None, **options).target_ids == ()
    sentence = failure(Encoder(Template("{input} {target}"), byte_level()).target_ids, "good", append_eos=True)
    assert sentence == (
        "Expected a tokenizer with an end-of-sequence token to end the targets with, found none; "
        "choose another base model."
    )


# Special tokens


@pytest.mark.parametrize(("tokenizer", "special"), [(BPE, "<|im_end|>"), (SPM, "</s>")], ids=["bpe", "spm"])
def test_only_the_templates_own_special_tokens_are_special(tokenizer: PreTrainedTokenizerBase, special: str) -> None:
    (special_id,) = bare(tokenizer, special)
    sequence = encoded(f"{{soft_prompt}}{{input}}{special}\n{{target}}", tokenizer, "good", input="film")
    assert sequence.ids.count(special_id) == 1
    for value in [special, f"a {special}", f" {special}a", f"a{special}{special}"]:
        sequence = encoded("{soft_prompt}{input}\n{target}", tokenizer, value, input=value)
        assert special_id not in sequence.ids + sequence.target_ids
        # and the text is still all there
        assert decoded(tokenizer, sequence.ids).replace(" ", "").removeprefix("<s>") == f"{value}\n".replace(" ", "")
        assert decoded(tokenizer, sequence.target_ids).replace(" ", "") == value.replace(" ", "")
    # the next literal text is parsed as before
    assert special_id in encoded(f"{{input}}{special}{{target}}", tokenizer, input=special).ids


def test_the_models_own_chat_template() -> None:
    tokenizer = byte_level(eos_token="<|im_end|>", chat_template=CHAT)
    template = chat_template(tokenizer)
    assert template.text == (
        "<|im_start|>user\n{soft_prompt}{input}<|im_end|>\n<|im_start|>assistant {{json: {{}}}}\n{target}"
    )
    encoder = Encoder(template, tokenizer)
    example = Example({"input": "the film <|im_end|>"}, None)
    plain = encoder.encode(
        Example({"input": "the film"}, None), num_virtual_tokens=5, max_length=99, target="good", append_eos=True
    )
    messages = [{"role": "user", "content": "the film"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(rendered, str)
    assert tuple(id for id in plain.ids if id != SOFT) == bare(tokenizer, rendered)
    assert plain.target_ids == (*bare(tokenizer, "good"), tokenizer.eos_token_id)
    injected = encoder.encode(example, num_virtual_tokens=5, max_length=99, target=None, append_eos=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plain.ids.count(end) == injected.ids.count(end) == 1


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (None, "Expected a base model with a chat template, found a tokenizer without one; write a template instead."),
        (
            "{{ raise_exception('Roles must alternate.') }}",
            "Expected a chat template that takes one message of the user, found one that fails "
            "(Roles must alternate); write a template instead.",
        ),
        (
            "{{ messages[0]['content'] }} {{ messages[0]['content'] }}",
            "Expected a chat template that repeats the message once, found one that does so 2 times; "
            "write a template instead.",
        ),
    ],
)
def test_a_chat_template_that_does_not_serve_is_refused(source: str | None, sentence: str) -> None:
    assert failure(chat_template, byte_level(chat_template=source)) == sentence


# Truncation


def fit(text: str, max_length: int, /, target: str = "x", reserve: int = 0, **fields: str) -> TokenSequence:
    return Encoder(Template(text), BPE).encode(
        Example(fields, None, (), "a.csv:3"),
        num_virtual_tokens=5,
        max_length=max_length,
        target=target,
        append_eos=True,
        reserve=reserve,
    )


def test_the_longest_field_is_cut_first_and_from_its_end() -> None:
    text = "{soft_prompt}{a}!{b}!{c}!{target}"
    # 5 virtual tokens, 3 literals, a letter and EOS as target; every letter x, y, z is a token of its own
    fixed = 5 + 3 + 1 + 1

    def cut(room: int) -> str:
        sequence = fit(text, fixed + room, a="xxxx", b="yy", c="zzzzzz")
        assert sequence.truncated == (room < 12)
        return decoded(BPE, sequence.ids)

    assert len(bare(BPE, "xxxx") + bare(BPE, "yy") + bare(BPE, "zzzzzz")) == 12
    assert [cut(room) for room in (99, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3)] == [
        "xxxx!yy!zzzzzz!",
        "xxxx!yy!zzzzzz!",
        "xxxx!yy!zzzzz!",
        "xxxx!yy!zzzz!",
        "xxx!yy!zzzz!",
        "xxx!yy!zzz!",
        "xx!yy!zzz!",
        "xx!yy!zz!",
        "xx!y!zz!",
        "x!y!zz!",
        "x!y!z!",
    ]
    assert failure(fit, text, fixed + 2, a="xxxx", b="yy", c="zzzzzz") == (
        f"a.csv:3: expected at most {fixed + 2} tokens, found 8 of template and soft prompt, 2 of the target and "
        "at least 3 of the input; shorten one of them or choose a longer window."
    )


def test_reserved_room_counts_where_the_target_is_shorter() -> None:
    text = "{soft_prompt}{input}{target}"
    long = "x" * 50
    assert len(fit(text, 30, input=long).ids) == 1 + 30 - 5 - 2
    assert len(fit(text, 30, reserve=2, input=long).ids) == 1 + 30 - 5 - 2
    assert len(fit(text, 30, reserve=10, input=long).ids) == 1 + 30 - 5 - 10
    assert failure(fit, text, 30, reserve=25, input=long) == (
        "a.csv:3: expected at most 30 tokens, found 5 of template and soft prompt, 25 of the target and "
        "at least 1 of the input; shorten one of them or choose a longer window."
    )
    assert not fit(text, 7, input="").truncated  # an empty value needs no room


def test_a_missing_field_is_named() -> None:
    assert failure(fit, "{premise}{target}", 30, input="x") == (
        "a.csv:3: expected a text for the template's field {premise}, found none; "
        "give it, or choose a template without this field."
    )
    assert failure(encoded, "{premise}{target}", BPE) == (
        "Expected a text for the template's field {premise}, found none; "
        "give it, or choose a template without this field."
    )


ENCODERS = [
    (tokenizer, Encoder(Template(text), tokenizer))
    for tokenizer in (BPE, SPM)
    for text in ("Review: {soft_prompt}{a}\n{b}\nAnswer: {target}", "{a} is {b} {a} : {target}")
]


@settings(deadline=None)
@given(
    index=st.integers(0, len(ENCODERS) - 1),
    a=st.text(max_size=40),
    b=st.text(max_size=40),
    target=st.none() | st.text(max_size=10),
    virtual=st.integers(1, 20),
    reserve=st.integers(0, 10),
    max_length=st.integers(0, 120),
)
def test_a_sequence_fits_and_keeps_template_and_target(
    index: int, a: str, b: str, target: str | None, virtual: int, reserve: int, max_length: int
) -> None:
    tokenizer, encoder = ENCODERS[index]
    example = Example({"a": a, "b": b}, None)

    def encode(length: int) -> TokenSequence:
        return encoder.encode(
            example, num_virtual_tokens=virtual, max_length=length, target=target, append_eos=True, reserve=reserve
        )

    def total(sequence: TokenSequence) -> int:
        soft = virtual - 1 if SOFT in sequence.ids else 0
        return len(sequence.ids) + soft + max(len(sequence.target_ids), reserve)

    whole = encode(100_000)
    assert not whole.truncated
    try:
        sequence = encode(max_length)
    except TemplateError:
        assert total(whole) > max_length
        return
    assert total(sequence) <= max_length
    assert sequence.truncated == (total(whole) > max_length)
    assert sequence.target_ids == whole.target_ids
    assert sequence.shared == whole.shared
    assert sequence.ids[: whole.shared] == whole.ids[: whole.shared]
    if sequence.truncated:
        assert total(sequence) == max_length  # no more is cut than must be
        # what stays is the whole sequence without some tokens, and the literal text at its end is there
        rest = iter(whole.ids)
        assert all(id in rest for id in sequence.ids)
        end = bare(tokenizer, "\nAnswer:" if encoder.template.has_soft_prompt else "a :")[-1:]
        assert sequence.ids[-1:] == end
    else:
        assert sequence == whole
