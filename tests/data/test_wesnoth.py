"""The converter on a made-up campaign with every construct that it has to understand."""

import struct

import pytest

from train.cli import run
from train.data.transcript import Turn, read_transcript
from train.data.wesnoth import main, read_campaigns
from train.data.wml import Break, Message, Name, read_wml
from train.errors import UserError

SCENARIO = """\
#textdomain game-tale
[scenario]
    id=01_Start
    name= _ "The Start"
    [unit]
        id=Boss
        name= _ "?"
    [/unit]
    [side]
        id=Boss
        name= _ "Big Boss"   # the leader
    [/side]
    {NAMED_UNIT 1 (Scout) 3 4 "Ro'n" ( _ "Ro’n")}
#define OPEN
    [unit]
        id=Boss
#enddef
    << lua = "[message] is not a tag here" >>
    [event]
        name=start
        [message]
            speaker=narrator
            message= _ "Long ago."
        [/message]
        [message]
            speaker=Boss
            {PORTRAIT angry}
            message= _ "<i>You</i> said ""no"", $unit.name|?"
        [/message]
        [message]
            speaker="Ro'n"
            message= _ "I did. " + {WHISPER _"rude^And will."}
            [option]
                message= _ "A choice of the player"
                [command]
                    [message]
                        id=Boss
                        message= _ "Then go!"
                    [/message]
                [/command]
            [/option]
        [/message]
        [message]
            speaker=Boss
            message=_"Leave
us." # wmllint: no spellcheck
        [/message]
#ifdef HARD
        [message]
            speaker="Ro'n"
            message= _ "Hard."
        [/message]
#else
        [message]
            speaker="Ro'n"
            message= _ "Easy."
        [/message]
#endif
    [/event]
    [event]
        [message]
            speaker=Boss
            message= _ "Who comes?"
        [/message]
        [message]
            speaker=unit
            message= _ "Me."
        [/message]
        [message]
            speaker=Boss,Ro'n
            message= _ "Hm."
        [/message]
        [message]
            speaker=Boss
            message= _ "Welcome."
        [/message]
    [/event]
[/scenario]
"""
CHINESE = {
    "Big Boss": "大王",
    "Ro’n": "罗恩",
    "I did. ": "是的。",
    "rude^And will.": "还要说。",
    "Then go!": "那就走！",
    "Leave\nus.": "退下。",
    "Hard.": "难。",
    "Easy.": "易。",
    "Who comes?": "谁？",
}


def write_catalogue(path, texts):
    """A ``.mo`` file: a header, two tables of (length, offset), and the texts."""
    pairs = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **texts}.items())
    start = 28 + 16 * len(pairs)
    tables, data = [], b""
    for column in (0, 1):
        for pair in pairs:
            text = pair[column].encode()
            tables.append(struct.pack("<2I", len(text), start + len(data)))
            data += text + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    path.parent.mkdir(parents=True)
    path.write_bytes(header + b"".join(tables) + data)


@pytest.fixture
def root(tmp_path):
    scenarios = tmp_path / "game" / "data" / "campaigns" / "Tale" / "scenarios"
    scenarios.mkdir(parents=True)
    (scenarios / "01_Start.cfg").write_text(SCENARIO, encoding="utf-8")
    write_catalogue(tmp_path / "game" / "locale" / "zh_CN" / "LC_MESSAGES" / "game-tale.mo", CHINESE)
    return tmp_path


def test_markup_language():
    found = list(read_wml(SCENARIO))
    names = [item.text.value for item in found if isinstance(item, Name) and item.id == "Boss"]
    assert names == ["?", "Big Boss"]
    messages = [item for item in found if isinstance(item, Message)]
    assert [message.speaker for message in messages] == [
        *("narrator", "Boss", "Ro'n", "Boss", "Boss", "Ro'n", "Ro'n", "Boss", "unit", "Boss,Ro'n", "Boss")
    ]
    assert [text.value for text in messages[2].texts] == ["I did. ", "rude^And will."]
    assert messages[1].texts[0].value == '<i>You</i> said "no", $unit.name|?'
    option = found.index(messages[3])
    assert isinstance(found[option - 1], Break)


def test_english(root):
    scenes = read_campaigns(root)
    assert [(scene.source, scene.title) for scene in scenes[:2]] == [
        ("Tale", "Tale/01_Start 1"),
        ("Tale", "Tale/01_Start 2"),
    ]
    assert [scene.turns for scene in scenes] == [
        (Turn("Ro'n", "I did. And will."),),
        (Turn("Big Boss", "Then go! Leave us."), Turn("Ro'n", "Hard.")),
        (Turn("Ro'n", "Easy."),),
        (Turn("Big Boss", "Who comes?"),),
        (Turn("Big Boss", "Welcome."),),
    ]


def test_chinese_leaves_out_what_is_not_translated(root):
    assert [scene.turns for scene in read_campaigns(root, "zh_CN", ["Tale"])] == [
        (Turn("罗恩", "是的。还要说。"),),
        (Turn("大王", "那就走！退下。"), Turn("罗恩", "难。")),
        (Turn("罗恩", "易。"),),
        (Turn("大王", "谁？"),),
    ]


def test_command_line_writes_a_transcript(root, monkeypatch, capsys):
    out = root / "tale.jsonl"
    options = ["--root", str(root), "--language", "zh_CN", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["wesnoth", *options])
    run(main)
    assert "Tale: 5 turns of 2 speakers" in capsys.readouterr().out
    assert [scene.turns for scene in read_transcript(out)] == [
        scene.turns for scene in read_campaigns(root, "zh_CN")
    ]


def test_mistakes_are_named(root):
    with pytest.raises(UserError, match=r"no campaigns .*install wesnoth"):
        read_campaigns(root / "nowhere")
    with pytest.raises(UserError, match="no translations into 'xx', only en, zh_CN"):
        read_campaigns(root, "xx")
    with pytest.raises(UserError, match="no campaign 'Saga', only Tale"):
        read_campaigns(root, campaigns=["Saga"])
    next(root.rglob("*.mo")).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"game-tale\.mo: not a catalogue"):
        read_campaigns(root, "zh_CN")
