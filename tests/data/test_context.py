"""A context leads in every style, is never learnt, and never displaces the query or the reply."""

import dataclasses
import logging
import time

import pytest

from train.data.encode import IGNORE, encode, encode_all, encode_prompt
from train.data.transcript import Turn

CONTEXT = "Peace Peace Peace Peace Peace Hal"


@pytest.fixture(params=["chat", "llama3", "qwen", "plain"])
def style(request):
    return request.param


@pytest.fixture
def tokenizer(make_tokenizer, chatml):
    return make_tokenizer(chat_template=chatml)


@pytest.fixture
def told(example):
    return dataclasses.replace(example, context=CONTEXT)


def text_of(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_context_leads_and_is_not_learnt(example, told, tokenizer, style):
    plain, encoded = (encode(one, tokenizer, style=style) for one in (example, told))
    text = text_of(tokenizer, encoded.input_ids[: encoded.prompt_length])
    assert text.index("system") < text.index(CONTEXT) < text.index("What time")
    assert [i for i in encoded.labels if i != IGNORE] == [i for i in plain.labels if i != IGNORE]
    assert len(encoded.labels) == len(encoded.response_mask) == len(encoded.input_ids)
    prompt = encode_prompt(example.turns[:-1], tokenizer, responder="Falstaff", style=style, context=CONTEXT)
    assert prompt == encoded.input_ids[: encoded.prompt_length]


def test_an_empty_context_changes_nothing(example, tokenizer, style):
    blank = dataclasses.replace(example, context=" \n")
    assert (
        encode(blank, tokenizer, style=style).input_ids == encode(example, tokenizer, style=style).input_ids
    )


def test_old_turns_go_before_the_context(told, tokenizer, style):
    whole = len(encode(told, tokenizer, style=style).input_ids)
    shorter = encode(told, tokenizer, style=style, max_tokens=whole - 1)
    assert CONTEXT in text_of(tokenizer, shorter.input_ids)
    assert (shorter.dropped_turns, shorter.dropped_context) == (3, 0)


@pytest.mark.parametrize("max_turns", [2, 3])  # a leading reply is dropped, so 3 are 2 here
def test_only_the_last_turns_are_kept(told, tokenizer, style, max_turns):
    last = dataclasses.replace(told, turns=told.turns[-2:])
    short = encode(told, tokenizer, style=style, max_turns=max_turns)
    assert short.input_ids == encode(last, tokenizer, style=style).input_ids
    assert (short.dropped_turns, short.dropped_context) == (len(told.turns) - 2, 0)
    options = {"responder": "Falstaff", "style": style, "context": CONTEXT}
    prompt = encode_prompt(told.turns[:-1], tokenizer, max_turns=max_turns, **options)
    assert prompt == short.input_ids[: short.prompt_length]


def test_more_turns_than_there_are_change_nothing(told, tokenizer, style):
    assert encode(told, tokenizer, style=style, max_turns=99) == encode(told, tokenizer, style=style)


def test_of_a_long_history_the_newest_turns_that_fit_are_found_without_writing_it_all(tokenizer, style):
    history = [Turn(speaker, "Noon, Hal.") for _ in range(500) for speaker in ("Hal", "Falstaff")][:-1]
    options = {"responder": "Falstaff", "style": style}
    start = time.process_time()
    for kept in (1, 9, 67):
        last = encode_prompt(history[-kept:], tokenizer, max_tokens=9_999, **options)
        for room in (0, 3):
            assert encode_prompt(history, tokenizer, max_tokens=len(last) + room, **options) == last
    assert time.process_time() - start < 10  # from the oldest turn on it is minutes


def test_the_end_of_the_context_goes_before_query_and_reply(told, tokenizer, style, caplog):
    last = dataclasses.replace(told, turns=told.turns[-2:])
    limit = len(encode(last, tokenizer, style=style).input_ids) - 1
    with caplog.at_level(logging.WARNING):
        (cut,) = encode_all([told], tokenizer, style=style, max_tokens=limit)
    text = text_of(tokenizer, cut.input_ids)
    assert CONTEXT not in text and "Peace Peace Peace Peace" in text
    assert "Sure?" in text and "Very sure." in text and len(cut.input_ids) <= limit
    assert (cut.dropped_turns, cut.dropped_context) == (3, len("Hal"))  # no more than has to go
    assert "cut the context of 1 of 1" in caplog.text


def test_where_no_context_fits_the_window_is_that_without_one(example, told, tokenizer, style):
    bare = encode(dataclasses.replace(example, turns=example.turns[-2:]), tokenizer, style=style)
    encoded = encode(told, tokenizer, style=style, max_tokens=len(bare.input_ids))
    assert encoded.input_ids == bare.input_ids and encoded.dropped_context == len(CONTEXT)


def test_a_prompt_says_that_its_context_was_cut(example, tokenizer, style, caplog):
    bare = encode_prompt(example.turns[3:4], tokenizer, responder="Falstaff", style=style)
    limit = len(bare) + 5
    with caplog.at_level(logging.WARNING):
        prompt = encode_prompt(
            example.turns[:4],
            tokenizer,
            responder="Falstaff",
            style=style,
            max_tokens=limit,
            context=CONTEXT * 3,
        )
    assert len(prompt) <= limit and "cut the context" in caplog.text
