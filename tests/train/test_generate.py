"""Who asks and who answers when a trained model is talked to, and how replies are shown."""

import copy
import dataclasses
import shutil
import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest
import torch
from recast import answered_by
from rich.console import Console
from transformers import GenerationConfig

from train import chat as command
from train import generate
from train.chat import Chat
from train.data.encode import encode
from train.data.names import known_querier
from train.data.responders import merge
from train.data.transcript import Turn
from train.dataset import with_context
from train.errors import UserError
from train.generate import answer_table, end_marks, generate_replies, prompt_as
from train.trained import untrained


def asked_alike(trained, example):
    """The prompt for the window's query, as generation writes it, and as training did."""
    history = [turn if turn.speaker != example.responder else Turn(trained.responder, turn.text)
               for turn in example.turns[:-1]]  # fmt: skip
    window = encode(example, trained.tokenizer, **trained.config.encoding)
    return prompt_as(trained, history, example.querier), window.input_ids[: window.prompt_length]


@pytest.fixture
def pairs(config, tiny_data):
    """A model of two responders, and its data."""
    data = merge([tiny_data, answered_by(tiny_data, "Amy Farrah Fowler")])
    return untrained(config.replace(names_in_prompt=True), data.responder, tuple(data.queriers)), data


def test_of_several_responders_the_pairs_own_is_prompted(pairs):
    trained, data = pairs
    for example in (data.dev[0], data.dev[-1]):
        asked, trained_on = asked_alike(trained, example)
        assert asked == trained_on


def test_a_pair_is_known_by_who_asks_where_that_is_clear():
    queriers = ("Bob > Alice", "Bob > Zed", "Carol > Zed")
    assert known_querier(queriers, "Bob > Zed") == "Bob > Zed"
    assert known_querier(queriers, "Carol") == "Carol > Zed"
    with pytest.raises(UserError, match="several responders; expected 'Bob > Alice' or 'Bob > Zed'"):
        known_querier(queriers, "Bob")
    assert known_querier(("José > Zed", "Al B"), "Jose\u0301") == "José > Zed"  # composed and decomposed
    assert known_querier(("José > Zed", "Al B"), "Al  B") == "Al B"
    with pytest.raises(UserError, match="'Carla' is unknown; did you mean Carol > Zed"):
        known_querier(("Carol > Zed",), "Carla")


def test_replies_are_shown_whole_and_as_they_are(pairs):
    trained, _ = pairs
    first, second, *_ = trained.queriers
    chinese = "今天天气好吗" * 12
    screen = Console(width=60, file=StringIO())
    screen.print(answer_table(trained, {first: "[sighs] Well [/quietly]", second: chinese}))
    shown = screen.file.getvalue()
    letters = "".join(letter for letter in shown if not letter.isspace() and letter != "│")
    assert "[sighs]Well[/quietly]" in letters
    assert shown.count("今") == 12 and "…" not in shown


def test_nothing_is_no_query(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", "--model", "not loaded", "--query", " "])
    with pytest.raises(UserError, match="--query: is empty"):
        generate.main()


def test_a_name_in_brackets_is_talked_with(config):
    trained = untrained(config, "[/Wren]", ("[red]Ann",))
    chat = Chat(trained, "[red]Ann", Console(width=60, file=StringIO()), max_new_tokens=2)
    chat.handle("/who")
    chat.handle("Well ?")
    assert chat.console.file.getvalue().startswith("[red]Ann\n[/Wren]: ")


@pytest.mark.parametrize("context", ["role_profile", "querier_profile"])
def test_the_profiles_of_training_are_in_the_prompt(pairs, tmp_path, context):
    trained, data = pairs
    speakers = {turn.speaker for example in data.dev for turn in example.turns}
    profiles = tmp_path / "profiles.yaml"
    profiles.write_text("".join(f"{name}: What {name} says\n" for name in speakers))
    told = dataclasses.replace(
        trained, config=trained.config.replace(context=context, profiles=str(profiles))
    )
    for example in with_context(data, told.config).dev[::5]:
        asked, trained_on = asked_alike(told, example)
        assert example.context and asked == trained_on


def test_retrieved_dialogues_are_refused(pairs):
    trained, _ = pairs
    told = dataclasses.replace(trained, config=trained.config.replace(context="few_shot"))
    with pytest.raises(UserError, match="context: got 'few_shot'"):
        prompt_as(told, [Turn("", "Well ?")], trained.queriers[0])


class Elsewhere:
    """A model on another device than the CPU; it notes what comes, and says nothing."""

    device = torch.device("meta")

    def generate(self, input_ids, attention_mask, querier_ids, **settings):
        self.devices = {tensor.device for tensor in (input_ids, attention_mask, querier_ids)}
        return torch.zeros(input_ids.shape, dtype=torch.int64)


def test_chat_asks_where_the_model_is(pairs):
    trained, _ = pairs
    model = Elsewhere()
    talking = dataclasses.replace(trained, model=model)
    Chat(talking, trained.queriers[0], Console(file=StringIO()), max_new_tokens=2).handle("Well ?")
    assert model.devices == {Elsewhere.device}


def test_what_cannot_be_asked_is_not_part_of_the_talk(pairs):
    trained, _ = pairs
    talking = dataclasses.replace(trained, model=Elsewhere())
    chat = Chat(talking, trained.queriers[0], Console(file=StringIO()), max_new_tokens=2)
    chat.handle("Well ?")
    before = list(chat.history)
    for refused in ("I wrote <|im_end|> there", "Well " * trained.config.max_tokens):
        with pytest.raises(UserError):
            chat.handle(refused)
        assert chat.history == before
    chat.handle("Well ?")
    assert len(chat.history) == 4


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_do_not_end_the_talk(pairs, monkeypatch, capsys, errors):
    trained, _ = pairs
    model = Elsewhere()
    monkeypatch.setattr(command, "load_trained", lambda _: dataclasses.replace(trained, model=model))
    lines = BytesIO(b"Well \xe9t\xe9 ?\n/who\n")
    monkeypatch.setattr("sys.stdin", TextIOWrapper(lines, "utf-8", errors=errors))
    monkeypatch.setattr("sys.argv", ["chat", "--model", "somewhere", "--querier", trained.queriers[0]])
    command.main()
    assert capsys.readouterr().out.count(f"{trained.queriers[0]}: ") == 3  # two lines, and the end
    assert model.devices


OWN = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<over>{% endfor %}"
OWN += "{% if add_generation_prompt %}assistant:{% endif %}"


def test_replies_end_where_an_own_template_ends_them(pairs):
    trained, _ = pairs
    tokenizer = copy.deepcopy(trained.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<over>"]})
    tokenizer.chat_template = OWN
    over = tokenizer.convert_tokens_to_ids("<over>")
    assert end_marks(dataclasses.replace(trained, tokenizer=tokenizer)) == sorted(
        {tokenizer.eos_token_id, over}
    )


def test_replies_are_the_likeliest_whatever_the_base_prefers(config, tiny_data, tiny_model_dir, tmp_path):
    base = shutil.copytree(tiny_model_dir, tmp_path / "chatty")
    GenerationConfig(do_sample=True, top_k=5, repetition_penalty=1.5).save_pretrained(base)
    trained = untrained(config.replace(model=str(base)), tiny_data.responder, tuple(tiny_data.queriers))
    prompt = trained.tokenizer("You are" * 4).input_ids
    (reply,) = generate_replies(trained.model, trained.tokenizer, [prompt], [0], 8, [])
    ids = torch.tensor([prompt])
    for _ in range(8):
        logits = trained.model(ids, querier_ids=torch.tensor([0])).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    assert reply == trained.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()
