import dataclasses
import sys

import pytest
from rich.console import Console

from train.config import load_config
from train.data import show
from train.data.encode import encode
from train.data.show import DROPPED, LEARNT, SPEAKER, choose, panels, stretches, window_panel
from train.errors import UserError


def test_stretches_are_the_learnt_replies(tiny_data, tiny_tokenizer):
    example = tiny_data.train[0]
    window = encode(example, tiny_tokenizer, names_in_prompt=False)
    found = list(stretches(window, tiny_tokenizer))
    learnt = ["".join(text.split()) for is_learnt, text in found if is_learnt]
    replies = [turn.text for turn in example.turns if turn.speaker == example.responder]
    assert learnt == ["".join(reply.split()) + "<|im_end|>" for reply in replies]


def test_a_panel_tells_what_was_dropped_and_what_does_not_fit(tiny_data, tiny_tokenizer):
    console = Console(width=100, record=True)
    tight = len(encode(tiny_data.train[0], tiny_tokenizer).input_ids)
    for limit in (tight, 2):
        console.print(*panels(tiny_data.train, [0], tiny_tokenizer, max_tokens=limit))
    text = console.export_text()
    assert f"{tight} tokens" in text
    assert "does not fit into 2 tokens" in text


@pytest.mark.parametrize("style", ["qwen", "chat", "plain"])
def test_names_are_marked_in_every_style_and_dropped_turns_are_there(tiny_data, tiny_tokenizer, style):
    example = tiny_data.train[0]
    asker, responder = (turn.speaker for turn in example.turns)
    # a reply to nothing comes first, which is dropped
    longer = dataclasses.replace(example, turns=(example.turns[1], *example.turns))
    window = encode(longer, tiny_tokenizer, style=style)
    text = window_panel(longer, window, tiny_tokenizer).renderable
    styled = {kind: [] for kind in (SPEAKER, DROPPED, LEARNT)}
    for span in text.spans:
        styled.setdefault(span.style, []).append(text.plain[span.start : span.end].strip())
    replier = [responder] if style != "chat" else []  # the template calls the responder the assistant
    assert styled[SPEAKER] == [responder, asker, *replier]
    assert styled[DROPPED] == [f"{responder}: {example.reply}"]
    assert len(styled[LEARNT]) == 1


def test_choice_of_windows():
    assert choose(5, 2, 3, 0) == [2]
    assert choose(3, None, 9, 0) == [0, 1, 2]
    with pytest.raises(UserError, match="got 5, expected 0 to 4"):
        choose(5, 5, 3, 0)


def test_command_line_writes_a_page(config, tmp_path, monkeypatch, capsys):
    values = {key: value for key, value in config.to_dict().items() if key in ("data", "output_dir", "model")}
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in values.items()))
    page = tmp_path / "windows.html"
    monkeypatch.setattr(sys, "argv", ["show", "--config", str(path), "--html", str(page), "max_tokens=200"])
    show.main()
    assert "learnt" in page.read_text() and str(page) in capsys.readouterr().out
    options = ["--data", values["data"], "--index", "0", f"model={values['model']}"]
    monkeypatch.setattr(sys, "argv", ["show", *options])
    read = []
    monkeypatch.setattr(show, "load_config", lambda *given: read.append(load_config(*given)) or read[-1])
    show.main()
    assert "learnt" in capsys.readouterr().out
    own = load_config(show.CONFIGS / "own.yaml")
    assert read[0].encoding == own.encoding and read[0].validation == own.validation
    monkeypatch.setattr(sys, "argv", ["show", "--config", str(path), "--split", "valid"])
    with pytest.raises(UserError, match="valid split is empty"):
        show.main()
