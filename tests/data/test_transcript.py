"""Transcripts as JSON lines, Markdown and CSV: what is read, and that damage is named by file and line."""

import time

import pytest

from train.data.transcript import Turn, join_texts, read_transcript
from train.errors import UserError


def write(folder, text, name):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"scene": "1", "speaker": "A", "text": "a"}\n{"scene": "1"', ":2: not JSON"),
        ('{"scene": "1", "speaker": "A"}', ":1: key 'text' is missing$"),
        ('\n{"scene": "1", "speaker": 3, "text": "a"}', ":2: key 'speaker': got 3, expected a text$"),
        (
            '{"scene": 1.5, "speaker": "A", "text": "a"}',
            ":1: key 'scene': got 1.5, expected a text or a whole",
        ),
        ('{"scene": true, "speaker": "A", "text": "a"}', ":1: key 'scene': got true, expected a text or"),
        ('{"scene": "1", "speaker": " ", "text": "a"}', ":1: key 'speaker' is empty"),
        ("[1]", ":1: expected an object"),
        ("\n" + 100_000 * "[", ":2: not JSON of a turn"),
        (f'\n{{"scene": "1", "id": {5000 * "1"}}}', r":2: not JSON of a turn \(a number is too long\)"),
        (r'{"scene": "1", "speaker": "A", "text": "so \ud83d"}', r":1: key 'text' holds half .*'\\ud83d'"),
        (r'{"scene": "1", "speaker": "\ude00", "text": "a"}', ":1: key 'speaker' holds half a character"),
        ('{"scene": "1", "speaker": "A", "text": " "}', r"show\.jsonl: nobody says anything"),
        ("", "the file is empty"),
    ],
)
def test_damaged_transcript_names_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_transcript(write(tmp_path, text, "show.jsonl"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("show.srt", "1\n00:00:01,000 --> 00:00:02,000\nHello.\n"),
        ("show.tsv", "scene\tspeaker\ttext\n1\tA\ta\n"),
        ("show.txt", "## Morning\n\n**A:** a\n"),
        ("show", 100 * "[" + "\n"),
    ],
)
def test_what_is_no_json_by_another_suffix_is_told_which_there_are(tmp_path, name, text):
    hint = rf"{name}:1: .* \(read as JSON lines because of its suffix; Markdown is \.md, CSV \.csv\)$"
    with pytest.raises(UserError, match=hint):
        read_transcript(write(tmp_path, text, name))
    with pytest.raises(UserError, match=r"show\.jsonl:1: [^(]*(\([^()]* column \d+\))?$"):
        read_transcript(write(tmp_path, text, "show.jsonl"))


def test_an_escaped_character_is_read(tmp_path):
    text = r'{"scene": "1", "speaker": "A", "text": "so \ud83d\ude00"}'
    assert read_transcript(write(tmp_path, text, "show.jsonl"))[0].turns == (Turn("A", "so \U0001f600"),)


def test_transcript(tmp_path):
    lines = [("1", "A", "a"), ("1", "A", "b"), ("1", "B", "c"), ("2", "B", "d")]
    text = "".join(
        f'{{"scene": "{scene}", "speaker": "{who}", "text": "{said}"}}\n' for scene, who, said in lines
    )
    first, second = read_transcript(write(tmp_path, text, "show.jsonl"))
    assert (first.source, first.title, first.turns) == ("show", "1", (Turn("A", "a b"), Turn("B", "c")))
    assert second.turns == (Turn("B", "d"),)
    with pytest.raises(UserError, match=r"absent\.jsonl: cannot be read"):
        read_transcript(tmp_path / "absent.jsonl")


def test_scenes_may_be_numbers(tmp_path):
    line = '{"scene": %s, "speaker": "A", "text": "a"}\n'
    first, second = read_transcript(write(tmp_path, line % 3 + line % '"3"' + line % 4, "show.jsonl"))
    assert (first.title, first.turns, second.title) == ("3", (Turn("A", "a a"),), "4")


MARKDOWN = """\
# The inn

## Morning

*Rain. McDonald enters.*

**McDonald:** More tea,
and *soon*!

Please.
**Ann Lee**: No.

## Evening
**小二：** 客官，
请坐。
_He bows._

## Evening

**Ann Lee:** Again?
"""


def test_markdown(tmp_path):
    morning, evening, again = read_transcript(write(tmp_path, MARKDOWN, "inn.md"))
    assert (morning.source, morning.title) == ("inn", "2 Morning")
    assert morning.turns == (Turn("McDonald", "More tea, and *soon*! Please."), Turn("Ann Lee", "No."))
    assert (evening.title, evening.turns) == ("3 Evening", (Turn("小二", "客官，请坐。"),))
    assert (again.title, again.turns) == ("4 Evening", (Turn("Ann Lee", "Again?"),))


def test_markdown_without_headings_is_one_scene(tmp_path):
    (scene,) = read_transcript(write(tmp_path, "**A:** a\n\n**B:** b\n", "chat.MD"))
    assert (scene.title, scene.turns) == ("chat", (Turn("A", "a"), Turn("B", "b")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("## One\n\n**A:** a\n## Two\nb\n", r"inn\.md:5: nobody speaks here"),
        ("**A** a\n", r"inn\.md:1: broken speaker '\*\*A\*\* a'"),
        ("**A:** a\n**:** b\n", r"inn\.md:2: broken speaker"),
        ("**A:** a\n** :** b\n", r"inn\.md:2: broken speaker"),
        ("**A:** a\n**\u200b**: b\n", r"inn\.md:2: broken speaker"),
        ("**A:** a\n> **B:** b\n", r"inn\.md:2: broken speaker"),
        ("**A:** a\n- **B:** b\n", r"inn\.md:2: broken speaker"),
        ("**A:** a\n\nTwo\n===\n", r"inn\.md:4: an underlined heading"),
        ("**A:** a\n\nTwo\n---\n\n**B:** b\n", r"inn\.md:4: an underlined heading"),
        ("**A:** a\n *so* it\n-----\n", r"inn\.md:3: an underlined heading"),
        ("## One\n\n*Rain.*\n", r"inn\.md: nobody says anything"),
        ("\n", "the file is empty"),
    ],
)
def test_damaged_markdown_names_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_transcript(write(tmp_path, text, "inn.md"))


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_markdown_may_have_any_line_ends(tmp_path, end):
    path = tmp_path / "inn.md"
    path.write_bytes(MARKDOWN.encode())
    expected = read_transcript(path)
    path.write_bytes(MARKDOWN.replace("\n", end).encode())
    assert read_transcript(path) == expected
    path.write_bytes(f"## One{end}**A** a".encode())
    with pytest.raises(UserError, match=r"inn\.md:2: broken speaker"):
        read_transcript(path)


def test_directions_may_hold_emphasis_and_underscores(tmp_path):
    directions = (
        "*Enter **Hamlet:** weeping.*\n*She **really** leaves.*\n*He types foo_bar.*\n_Soft *music*._\n"
    )
    text = f"**A:** a\n{directions}**B:** b\n*so* it *is*\n_a_ or **this:** _b_\n"
    (scene,) = read_transcript(write(tmp_path, text, "show.md"))
    assert [turn.text for turn in scene.turns] == ["a", "b *so* it *is* _a_ or **this:** _b_"]


def test_bold_emphasis_is_a_direction(tmp_path):
    text = "***Rain.***\n**A:** a\n***laughs***\n___She leaves___\nb ***so*** c\n_d_ and ***e***\n**B:** f\n"
    (scene,) = read_transcript(write(tmp_path, text, "show.md"))
    assert [turn.text for turn in scene.turns] == ["a b ***so*** c _d_ and ***e***", "f"]
    with pytest.raises(UserError, match=r"show\.md:1: broken speaker"):
        read_transcript(write(tmp_path, "***A:***\na\n", "show.md"))
    with pytest.raises(UserError, match=r"show\.md:2: broken speaker"):
        read_transcript(write(tmp_path, "**A:** a\n***B: where were you***\n", "show.md"))


def test_comments_are_not_spoken(tmp_path):
    text = "<!-- a note -->\n**A:** a <!-- said --> b<!-- -->c\n"
    text += "<!-- **C:** c\n\n## Two\n--> **B:** d\n<!---->\ne\nf\n===\n"
    path = write(tmp_path, text, "show.md")
    with pytest.raises(UserError, match=r"show\.md:10: an underlined heading"):
        read_transcript(path)
    (scene,) = read_transcript(write(tmp_path, text.replace("===\n", ""), "show.md"))
    assert [(turn.speaker, turn.text) for turn in scene.turns] == [("A", "a bc"), ("B", "d e f")]
    with pytest.raises(UserError, match=r"show\.md:3: a comment that does not end"):
        read_transcript(write(tmp_path, "**A:** a <!-- b\n--> c\n<!-- d\n", "show.md"))


@pytest.mark.parametrize(
    "after", ["**A:** b\n", "## Two\n**A:** b\n", "*nods*\n<!-- yes -->\n---\n**A:** b\n", ""]
)
def test_a_turn_without_text_is_named(tmp_path, after):
    with pytest.raises(UserError, match=r"show\.md:2: nothing is said in this turn"):
        read_transcript(write(tmp_path, f"**A:** a\n**B:**\n{after}", "show.md"))
    (scene,) = read_transcript(write(tmp_path, "**A:** a\n**B:**\n*nods*\n\nYes.\n", "show.md"))
    assert scene.turns[1] == Turn("B", "Yes.")


ONE_TURN = pytest.mark.parametrize(
    ("file", "text"),
    [
        ("show.jsonl", '{"scene": "1", "speaker": "%s", "text": "a"}'),
        ("show.md", "**%s:** a"),
        ("show.csv", "scene,speaker,text\n1,%s,a"),
    ],
)


@ONE_TURN
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Jose\u0301", "Jos\xe9"),
        (" Al \xa0 B ", "Al B"),
        ("\u200bZoe\ufeff", "Zoe"),
        ("\u0627\u200c\u0628", "\u0627\u200c\u0628"),
        ("\u212bke", "\xc5ke"),
    ],
)
def test_names_that_look_the_same_are_the_same(tmp_path, file, text, name, plain):
    (scene,) = read_transcript(write(tmp_path, text % name, file))
    assert scene.turns == (Turn(plain, "a"),)


@ONE_TURN
@pytest.mark.parametrize("name", ["A > B", "A >", "A  >  B"])
def test_a_name_that_reads_as_a_pairs_is_refused(tmp_path, name, file, text):
    with pytest.raises(UserError, match=rf"{file}:\d: got the name 'A >.*', expected one without ' > '"):
        read_transcript(write(tmp_path, text % name, file))


def test_joining_many_lines_takes_no_longer_a_line(tmp_path):
    lines = ["A word."] * 20_000
    start = time.process_time()
    assert join_texts(lines) == " ".join(lines)
    assert time.process_time() - start < 5


def test_a_rule_is_not_spoken(tmp_path):
    text = "---\n## One\n---\n**A:** a\n**B:** b\n\n---\n\n* * *\n## Two\n**A:** c - d\n***\n"
    under = "**B:** e\n---\n*Rain.*\n---\n**A:** f\ng\n- - -\n**B:** h\ni\n\n---\n"
    scenes = read_transcript(write(tmp_path, text + under, "show.md"))
    assert [turn.text for scene in scenes for turn in scene.turns] == ["a", "b", "c - d", "e", "f g", "h i"]


def test_a_json_line_ends_at_the_line_feed_alone(tmp_path):
    line = '{"scene": "1", "speaker": "%s", "text": "%s"}\r\n'
    text = line % ("A", "a\u2028b\x85c") + line % ("B", "d")
    (scene,) = read_transcript(write(tmp_path, text, "show.jsonl"))
    assert [turn.text for turn in scene.turns] == ["a\u2028b\x85c", "d"]


def test_texts_are_joined_as_their_language_does():
    assert join_texts(["a", " ", "b "]) == "a b"
    assert join_texts(["你好。", "再见。"]) == "你好。再见。"
    assert join_texts(["你好", "Ann", "再见"]) == "你好 Ann 再见"
    assert join_texts(["“走吧。”", "“好。”"]) == "“走吧。”“好。”"
    assert join_texts(["走……", "——再见", "……", "“Ann”"]) == "走……——再见…… “Ann”"


CSV = """\
"season","episode","character","line"
"1","Pilot","Ann ","Where, ""now""?"
"1","Pilot","Bob","At the
market."
"1","Diversity","Ann","Again?"
"""
COLUMNS = {"scene": "episode", "speaker": "character", "text": "line"}


def test_csv(tmp_path):
    pilot, diversity = read_transcript(write(tmp_path, CSV, "show.csv"), COLUMNS)
    assert (pilot.source, pilot.title) == ("show", "Pilot")
    assert pilot.turns == (Turn("Ann", 'Where, "now"?'), Turn("Bob", "At the market."))
    assert diversity.turns == (Turn("Ann", "Again?"),)
    own_names = write(tmp_path, "text,scene,speaker\na,1,A\n", "own.CSV")
    assert read_transcript(own_names)[0].turns == (Turn("A", "a"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene,who,text\n1,A,a\n", r"no column 'speaker' for the speaker, there are scene, who, text"),
        ("scene,speaker,text\n1,A,a\n1,B\n", ":3: fewer fields"),
        ("scene,speaker,text\n1,A,Hello, Bob?\n", ":2: more fields"),
        ("scene,speaker,text\n1, ,a\n", ":2: column 'speaker' is empty"),
        ('scene,speaker,text\n1,A,"a', ": not CSV after line 1"),
    ],
)
def test_damaged_csv_names_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_transcript(write(tmp_path, text, "show.csv"))


def test_only_a_csv_has_columns(tmp_path):
    with pytest.raises(UserError, match="only a CSV file has columns to name, got who"):
        read_transcript(write(tmp_path, MARKDOWN, "inn.md"), {"speaker": "who"})
