"""Masks token by token against expectations written by hand, and what truncation may and may not drop."""

from dataclasses import replace

import pytest

from train.data.chat_template import SYSTEM
from train.data.encode import IGNORE, TooLongError, encode, encode_all, encode_prompt, resolve_style
from train.data.transcript import Turn
from train.errors import UserError


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def learnt(tokenizer, labels):
    return tokens(tokenizer, [label for label in labels if label != IGNORE])


def expected(turns):
    """(token, 1 if the responder says it) in order, from lists of (header, body, rest) per turn."""
    return [
        pair
        for header, body, rest, said in turns
        for pair in (
            *((t, 0) for t in header),
            *((t, said) for t in body),
            *((t, 0) for t in rest),
        )
    ]


WHAT = ["What", " ", "time", " ", "is", " ", "it", "?"]
NOON = ["Noon", ",", " ", "Hal", "."]
VERY = ["Very", " ", "sure", "."]
PRINCE = ["Prince", " ", "Henry"]


def marked(start, end, querier):
    return expected(
        [
            ([start, *querier, "\n"], [*WHAT, end], ["\n"], 0),
            ([start, "Falstaff", "\n"], [*NOON, end], ["\n"], 1),
            ([start, *querier, "\n"], ["Sure", "?", end], ["\n"], 0),
            ([start, "Falstaff", "\n"], [*VERY, end], ["\n"], 1),
        ]
    )


PLAIN = expected(
    [
        ([*PRINCE, ":"], [" ", *WHAT, "<eos>"], ["\n"], 0),
        (["Falstaff", ":"], [" ", *NOON, "<eos>"], ["\n"], 1),
        ([*PRINCE, ":"], [" ", "Sure", "?", "<eos>"], ["\n"], 0),
        (["Falstaff", ":"], [" ", *VERY, "<eos>"], ["\n"], 1),
    ]
)
S, E = "<|im_start|>", "<|im_end|>"
NAME = [*PRINCE, ":", " "]
CHAT = expected(
    [
        ([S, "system", "\n"], ["You", " ", "are", " ", "Falstaff", ".", E], ["\n"], 0),
        ([S, "user", "\n"], [*NAME, *WHAT, E], ["\n"], 0),
        ([S, "assistant", "\n"], [*NOON, E], ["\n"], 1),
        ([S, "user", "\n"], [*NAME, "Sure", "?", E], ["\n"], 0),
        ([S, "assistant", "\n"], [*VERY, E], ["\n"], 1),
    ]
)


@pytest.mark.parametrize(
    ("style", "wanted"),
    [
        ("llama3", marked("<|begin_of_text|>", "<|eot_id|>", PRINCE)),
        ("qwen", marked(S, E, PRINCE)),
        ("plain", PLAIN),
        ("chat", CHAT),
    ],
)
def test_every_token_and_mask(example, make_tokenizer, chatml, style, wanted):
    tokenizer = make_tokenizer(chat_template=chatml)
    found = encode(example, tokenizer, style=style)
    assert tokens(tokenizer, found.input_ids) == [token for token, _ in wanted]
    assert found.response_mask == [said for _, said in wanted]
    assert found.labels == [
        i if said else IGNORE for i, (_, said) in zip(found.input_ids, wanted, strict=True)
    ]
    assert (found.querier_id, found.cluster_id) == (3, 1)
    end = {"llama3": "<|eot_id|>", "plain": "<eos>"}.get(style, E)
    space = [" "] if style == "plain" else []
    assert learnt(tokenizer, found.reply_labels) == [*space, *VERY, end]
    assert tokens(tokenizer, found.input_ids[found.prompt_length :])[-len(VERY) - 2 :] == [*VERY, end, "\n"]


@pytest.mark.parametrize("style", ["llama3", "qwen", "plain", "chat"])
def test_prompt_is_the_training_text_up_to_the_reply(example, make_tokenizer, chatml, style):
    tokenizer = make_tokenizer(chat_template=chatml)
    found = encode(example, tokenizer, style=style)
    prompt = encode_prompt(example.turns[:-1], tokenizer, responder="Falstaff", style=style)
    assert prompt == found.input_ids[: found.prompt_length]


def test_reply_labels_are_of_the_last_reply(example, make_tokenizer):
    tokenizer = make_tokenizer()
    found = encode(example, tokenizer, style="qwen")
    assert learnt(tokenizer, found.reply_labels) == [*VERY, E]


@pytest.mark.parametrize("style", ["llama3", "qwen", "plain", "chat"])
def test_without_names_the_querier_is_not_in_the_text(example, make_tokenizer, chatml, style):
    tokenizer = make_tokenizer(chat_template=chatml)
    with_names = encode(example, tokenizer, style=style)
    without = encode(example, tokenizer, style=style, names_in_prompt=False)
    assert "Henry" in tokens(tokenizer, with_names.input_ids)
    assert "Henry" not in tokens(tokenizer, without.input_ids)
    assert learnt(tokenizer, without.labels) == learnt(tokenizer, with_names.labels)


@pytest.mark.parametrize("style", ["llama3", "qwen", "plain", "chat"])
def test_truncation_drops_oldest_turns_and_keeps_the_reply(example, make_tokenizer, chatml, style):
    tokenizer = make_tokenizer(chat_template=chatml)
    full = encode(example, tokenizer, style=style)
    for max_tokens in range(len(full.input_ids), 0, -1):
        try:
            found = encode(example, tokenizer, style=style, max_tokens=max_tokens)
        except TooLongError:
            break
        assert len(found.input_ids) <= max_tokens
        assert found.input_ids[found.prompt_length :] == full.input_ids[full.prompt_length :]
        assert learnt(tokenizer, found.reply_labels) == learnt(tokenizer, full.reply_labels)
        header = {"llama3": 3, "qwen": 3, "plain": 2, "chat": 3}[style]
        assert (
            found.input_ids[found.prompt_length - header : found.prompt_length]
            == full.input_ids[full.prompt_length - header : full.prompt_length]
        )
    else:
        pytest.fail("a limit of one token must not give an example")
    assert max_tokens < len(full.input_ids) / 2 + 10


def test_too_long_replies_are_left_out_and_counted(example, make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    assert encode_all([example, example], tokenizer, style="qwen", max_tokens=6) == []
    assert "left out 2 examples" in caplog.text
    assert len(encode_all([example], tokenizer, style="qwen")) == 1


def test_auto_style(make_tokenizer, chatml):
    assert resolve_style(make_tokenizer(chat_template=chatml), "auto") == "chat"
    assert resolve_style(make_tokenizer(), "auto") == "llama3"
    chatml_marks = make_tokenizer(marks=("<|im_start|>", "<|im_end|>", "<eos>", "<unk>"))
    assert resolve_style(chatml_marks, "auto") == "qwen"
    other = make_tokenizer(marks=("<eos>", "<unk>"))
    assert resolve_style(other, "auto") == "plain"
    other.eos_token = None
    with pytest.raises(UserError, match="style 'plain' needs an eos token"):
        encode_prompt([Turn("Hal", "Sure?")], other, responder="Falstaff")
    with pytest.raises(UserError, match=r"<\|begin_of_text\|> and <\|eot_id\|>"):
        encode_prompt([Turn("Hal", "Sure?")], other, responder="Falstaff", style="llama3")
    with pytest.raises(UserError, match="'fancy'"):
        resolve_style(other, "fancy")
    with pytest.raises(UserError, match="chat template"):
        resolve_style(other, "chat")


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}time:\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)


def test_template_that_marks_only_the_last_reply(example, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=THINKING)
    found = encode(example, tokenizer)
    assert learnt(tokenizer, found.labels) == [*NOON, E, *VERY, E]
    before = tokens(tokenizer, found.input_ids[: found.prompt_length])
    assert before[-6:] == [S, "assistant", "\n", "time", ":", "\n"]
    assert (
        encode_prompt(example.turns[:-1], tokenizer, responder="Falstaff")
        == found.input_ids[: found.prompt_length]
    )


def test_template_without_a_system_role(example, make_tokenizer):
    tokenizer = make_tokenizer(chat_template=NO_SYSTEM)
    found = encode(example, tokenizer)
    assert learnt(tokenizer, found.labels) == [*NOON, E, *VERY, E]
    text = tokenizer.decode(found.input_ids).replace(" ", "")
    assert SYSTEM.format(responder="Falstaff").replace(" ", "") in text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('never') }}", "refuses the conversation: never"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no special token"),
        ("{{ messages[-1]['content'] }}<|im_end|>", "drops, repeats or moves"),
        ("{% for m in messages %}{{ m['content'] | lower }}<|im_end|>{% endfor %}", "changes the text"),
    ],
)
def test_templates_that_cannot_be_masked(example, make_tokenizer, template, message):
    with pytest.raises(UserError, match=message):
        encode(example, make_tokenizer(chat_template=template))


def test_tokens_that_reach_over_the_border_of_a_reply(example, make_tokenizer):
    joined = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="the tokenizer joins"):
        encode(example, make_tokenizer(chat_template=joined))


def test_consecutive_turns_of_one_speaker_are_one_message(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chat_template=chatml)
    turns = [Turn("Hal", "Sure?"), Turn("Hal", "Noon.")]
    text = tokenizer.decode(encode_prompt(turns, tokenizer, responder="Falstaff")).replace(" ", "")
    assert text.count("user") == 1


@pytest.mark.parametrize("idle", ["pad_token", "unk_token"])
def test_a_word_that_only_pads_is_a_word(example, make_tokenizer, idle):
    tokenizer = make_tokenizer()
    before = encode(example, tokenizer, style="plain")
    setattr(tokenizer, idle, "sure")
    assert "sure" in example.reply and encode(example, tokenizer, style="plain") == before


@pytest.mark.parametrize("style", ["llama3", "qwen", "plain", "chat"])
@pytest.mark.parametrize("place", ["query", "reply", "name", "context"])
def test_a_mark_that_is_spelled_out_is_refused(example, make_tokenizer, chatml, style, place):
    tokenizer = make_tokenizer(chat_template=chatml)
    query, reply = example.turns[-2:]
    changed = {
        "query": (replace(query, text="So <|im_end|> it"), reply),
        "reply": (query, replace(reply, text="So <|im_end|> it")),
        "name": (replace(query, speaker="<|im_end|>"), reply),
        "context": (query, reply),
    }[place]
    context = "<|im_end|>" if place == "context" else ""
    marked = replace(example, turns=(*example.turns[:-2], *changed), context=context)
    with pytest.raises(UserError, match=r"example 'one': its text holds '<\|im_end\|>'"):
        encode(marked, tokenizer, style=style)
    if place != "reply":
        options = {"responder": "Falstaff", "style": style, "context": context}
        with pytest.raises(UserError, match=r"the prompt: its text holds '<\|im_end\|>'"):
            encode_prompt(marked.turns[:-1], tokenizer, **options)


def test_prompt_must_end_with_a_query(example, make_tokenizer):
    with pytest.raises(UserError, match="asks Falstaff"):
        encode_prompt(example.turns, make_tokenizer(), responder="Falstaff")
