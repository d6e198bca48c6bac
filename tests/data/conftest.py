"""A tiny tokenizer with the marks of all styles, so that masks can be checked token by token; a show."""

import json
import random
import re

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.data.layout import Example
from train.data.transcript import Turn

MARKS = ("<|begin_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<eos>", "<unk>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(text: str, marks=MARKS, chat_template=None) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the marks, words, and single other characters of ``text``."""
    words = sorted(set(re.findall(r"\w+|[^\w]", text + "\n :.system user assistant You are")))
    vocabulary = {token: index for index, token in enumerate([*marks, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def example() -> Example:
    turns = (
        Turn("Falstaff", "Peace."),
        Turn("Prince Henry", "What time is it?"),
        Turn("Falstaff", "Noon, Hal."),
        Turn("Prince Henry", "Sure?"),
        Turn("Falstaff", "Very sure."),
    )
    return Example("one", turns, "Falstaff", "Prince Henry", 3, 1)


@pytest.fixture
def make_tokenizer(example):
    text = " ".join(f"{turn.speaker} {turn.text}" for turn in example.turns)
    return lambda **options: build_tokenizer(text, **options)


@pytest.fixture
def chatml() -> str:
    return CHATML


@pytest.fixture
def transcript(tmp_path):
    generator = random.Random(0)
    rows = []
    for scene in range(30):
        querier = ("Ann", "Bob", "Cat")[scene % 3]
        for _ in range(generator.randrange(1, 4)):
            words = [generator.choice(["tea", "cake", "rain", "snow", "horse"]) for _ in range(4)]
            rows += [(scene, querier, " ".join(words) + "?"), (scene, "Doc", f"Yes {scene}.")]
    path = tmp_path / "inn.jsonl"
    path.write_text("\n".join(json.dumps({"scene": str(s), "speaker": w, "text": t}) for s, w, t in rows))
    return path
