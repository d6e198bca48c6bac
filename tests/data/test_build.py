"""From a transcript to data of one responder, several or all, as the command line does it."""

import csv
from pathlib import Path

import pytest

from train.cli import run
from train.data.build import main
from train.data.dialogue import Thresholds
from train.data.mqdialog import load_mqdialog
from train.data.responders import load_dialogues
from train.data.speakers import Pair, Speaker, find_speakers, qualified, survey
from train.data.transcript import Scene, Turn, read_transcript
from train.errors import UserError

LOW = ("--min-turns", 2, "--min-dialogues", 2)


@pytest.fixture
def command(transcript, monkeypatch, capsys):
    """Run the command line on the transcript; returns what it printed."""

    def call(*arguments):
        out = ("--transcript", transcript, "--out", transcript.parent / "out")
        monkeypatch.setattr("sys.argv", ["build", *map(str, (*out, *arguments))])
        run(main)
        return capsys.readouterr().out

    return call


def scene(speakers):
    return Scene(
        "show", speakers, tuple(Turn(name, f"{name}{number}") for number, name in enumerate(speakers))
    )


def test_survey_counts_whom_everybody_answers():
    scenes = [scene("QRQR"), scene("PRPR"), scene("QRPR"), scene("XR")]
    speakers = {speaker.name: speaker for speaker in survey(scenes, Thresholds(2, 2))}
    responder = speakers["R"]
    assert [(pair.querier, pair.turns, pair.dialogues, pair.has_enough) for pair in responder.pairs] == [
        ("P", 3, 2, True),
        ("Q", 3, 2, True),
        ("X", 1, 1, False),
    ]
    assert (responder.turns, responder.dialogues, responder.qualifies) == (7, 4, True)
    assert [pair.querier for pair in speakers["Q"].pairs] == ["R"] and not speakers["Q"].qualifies
    assert "X" not in speakers
    assert qualified(scenes, Thresholds(2, 2)) == ["R"]
    with pytest.raises(UserError, match="nobody has 2 queriers with at least 2 turns and 3 dialogues"):
        qualified(scenes, Thresholds(2, 3))
    with pytest.raises(UserError, match="responder 'X' answers nobody"):
        find_speakers(scenes, ["X"], Thresholds())


def test_a_responder_has_a_dialogue_to_hold_out():
    once, twice = (Pair("Ann", turns=9, dialogues=count, has_enough=True) for count in (1, 2))
    assert not Speaker("Bob", 9, (once, once)).qualifies and Speaker("Bob", 9, (once, twice)).qualifies
    assert not Speaker("Bob", 9, (twice,)).qualifies


def test_one_responder(command, transcript):
    shown = command(*LOW, "--responder", "Doc", "--clusters", 2)
    assert "Doc: 3 queriers, 2 clusters" in shown and "Ann" in shown
    data = load_mqdialog(transcript.parent / "out" / "inn" / "diags_two_role_doc_clustered")
    assert sorted(data.queriers) == ["Ann", "Bob", "Cat"]


def test_planted_has_one_responder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build", "--show", "planted", "--out", str(tmp_path)])
    run(main)
    assert "192 / 48" in capsys.readouterr().out


@pytest.fixture
def busy(transcript):
    """The transcript with a second person whom two people ask."""
    lines = [
        f'{{"scene": "n{number}", "speaker": "{who}", "text": "{text} {number}"}}'
        for number in range(8)
        for who, text in (
            ("AB"[number % 2], "tea?"),
            ("Nurse", "no"),
            ("AB"[number % 2], "cake?"),
            ("Nurse", "no"),
        )
    ]
    transcript.write_text(transcript.read_text() + "\n" + "\n".join(lines))


@pytest.mark.parametrize("choice", [("--all-responders",), ("--responder", "Nurse", "--responder", "Doc")])
def test_several_responders(command, transcript, busy, choice):
    shown = command(*LOW, *choice, "--clusters", 2)
    assert "2 responders" in shown and "Nurse" in shown and "Doc" in shown
    both = load_dialogues(transcript.parent / "out" / "inn")
    assert set(both.queriers) == {"Ann > Doc", "Bob > Doc", "Cat > Doc", "A > Nurse", "B > Nurse"}


def test_somebody_whom_no_folder_can_be_named_by_is_left_out(command, transcript, busy, caplog, capsys):
    transcript.write_text(transcript.read_text().replace('"Nurse"', '"🐙"'))
    assert "Doc: 3 queriers" in command(*LOW, "--all-responders")
    assert "left out, with no letters or digits to name a folder by: 🐙" in caplog.text
    transcript.write_text(transcript.read_text().replace('"Doc"', '"🦊"'))
    with pytest.raises(SystemExit, match="2"):
        command(*LOW, "--all-responders", "--show", "both")
    assert "🦊, 🐙: no letters or digits to name a folder by" in capsys.readouterr().err


def test_speakers_are_listed(command, transcript, busy):
    shown = command(*LOW, "--list-speakers")
    assert "2 responders" in shown and "Doc" in shown and "Nurse" in shown and "Ann" not in shown
    shown = command(*LOW, "--list-speakers", "--responder", "Doc")
    assert "Ann" in shown and "yes" in shown
    assert "no" in command("--list-speakers", "--responder", "Doc")
    assert not (transcript.parent / "out").exists()


def test_markdown_gives_the_same_data_as_json_lines(command, transcript):
    command(*LOW, "--responder", "Doc")
    data = load_mqdialog(transcript.parent / "out" / "inn" / "diags_two_role_doc_clustered")
    markdown = transcript.with_suffix(".md")
    text = [
        f"## {scene.title}\n" + "\n".join(f"**{turn.speaker}:** {turn.text}" for turn in scene.turns)
        for scene in read_transcript(transcript)
    ]
    markdown.write_text("\n".join(text))
    command(*LOW, "--responder", "Doc", "--transcript", markdown, "--show", "inn_md")
    assert load_mqdialog(transcript.parent / "out" / "inn_md" / "diags_two_role_doc_clustered") == data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--responder", "Dcc"], "closest names: Doc"),
        (["--list-speakers", "--responder", "Dcc"], "closest names: Doc"),
        ([], "--list-speakers shows who there is"),
        (["--responder", "Doc", "--all-responders"], "exclude each other"),
        (["--all-responders"], "nobody has 2 queriers with at least 70 turns and 20 dialogues"),
        (["--transcript", "absent.md", "--all-responders"], "absent.md: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        command(*options)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_csv_with_columns_of_other_names(command, transcript, tmp_path):
    rows = [(s.title, turn.speaker, turn.text) for s in read_transcript(transcript) for turn in s.turns]
    with (tmp_path / "inn.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("scene", "who", "text"), *rows])
    table = ("--transcript", tmp_path / "inn.csv", "--out", tmp_path / "from_csv", "--column", "speaker=who")
    command(*table, *LOW, "--responder", "Doc")
    command(*LOW, "--responder", "Doc")
    folder = Path("inn/diags_two_role_doc_clustered")
    table, lines = (
        load_mqdialog(root / folder) for root in (tmp_path / "from_csv", transcript.parent / "out")
    )
    assert table.train == lines.train and table.dev == lines.dev


def test_columns_are_checked(command, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command("--column", "who=speaker")
    assert "got 'who=speaker', expected scene=NAME, speaker=NAME, text=NAME" in capsys.readouterr().err
    monkeypatch.setattr(
        "sys.argv", ["build", "--show", "plays", "--column", "text=x", "--responder", "Hamlet"]
    )
    with pytest.raises(SystemExit):
        run(main)
    assert "columns are those of a CSV transcript" in capsys.readouterr().err


def test_a_name_may_be_typed_in_another_unicode_form(command, transcript):
    said = transcript.read_text()
    transcript.write_text(said.replace('"Ann"', '"Jos\xe9"', 5).replace('"Ann"', '"Jose\u0301"'), "utf-8")
    assert command("--list-speakers", "--responder", " Doc", *LOW).count("Jos") == 1
    command(*LOW, "--responder", "Doc ", "--querier", "Jose\u0301", "--clusters", 2)
    data = load_mqdialog(transcript.parent / "out" / "inn" / "diags_two_role_doc_clustered")
    assert data.queriers == ["Jos\xe9"] and {e.dialogue for e in data.train + data.dev} == {
        f"scene_{number}_dialogue_0" for number in range(0, 30, 3)
    }


def test_names_in_brackets_are_shown(command, transcript):
    transcript.write_text(transcript.read_text().replace('"Ann"', '"[i]Ann"').replace('"Doc"', '"[red]Doc"'))
    for shown in (command("--list-speakers", *LOW), command("--responder", "[red]Doc", *LOW)):
        assert "[red]Doc" in shown
    assert "[i]Ann" in command("--list-speakers", "--responder", "[red]Doc", *LOW)
