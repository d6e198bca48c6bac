"""The judge against a stub of a chat API on this machine: nothing leaves it."""

import json
import logging
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from train.cli import run
from train.data.layout import Example, MQDialog
from train.data.mqdialog import write_mqdialog
from train.data.transcript import Turn
from train.endpoint import LONGEST_WAIT, Cached, Endpoint, NoAnswer
from train.errors import UserError
from train.judge import (
    GIVE_UP_AFTER,
    Pair,
    judge_all,
    judge_pair,
    load_records,
    main,
    make_pairs,
    messages,
    parse,
)


class Stub:
    """Answers with ``reply(question)``: a text, or (status, body), or (status, body, headers)."""

    def __init__(self, reply):
        self.reply, self.requests = reply, []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, self.headers.get("Authorization"), body))
                found = stub.reply(body["messages"][-1]["content"])
                completion = json.dumps({"choices": [{"message": {"content": found}}]})
                status, text, *headers = (200, completion) if isinstance(found, str) else found
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that gave up waiting
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub():
    started = []

    def start(reply):
        started.append(Stub(reply))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


def endpoint(stub, **options):
    return Endpoint(stub.url, "judge", **{"first_wait": 0.001, "timeout": 5.0} | options)


def pair(number=0, reply_a="good", reply_b="bad"):
    turns = (Turn("Ann", "How are you?"), Turn("Bob", "The reference."))
    return Pair(Example(f"d{number}_part0", turns, "Bob", "Ann > Bob", 0, 0), reply_a, reply_b)


def shown_first(question):
    return question.partition("A: ")[2].partition("\n")[0]


def prefers(text):
    return lambda question: "A" if shown_first(question) == text else "B"


def test_the_question_names_both_and_hides_the_reference():
    straight, swapped = (messages(pair(), order)[1]["content"] for order in (False, True))
    assert "Ann: How are you?" in straight and "Bob talks with Ann." in straight
    assert "reference" not in straight
    assert "A: good\n\nB: bad" in straight and "A: bad\n\nB: good" in swapped


@pytest.mark.parametrize(
    ("answer", "side"),
    [("A", "a"), (" b.\n", "b"), ("**Tie**", "tie"), ("Answer: A", "a"), ("They differ.\nB", "b")],
)
def test_answers_are_read_and_turned_back(answer, side):
    assert parse(answer, swapped=False) == side
    assert parse(answer, swapped=True) == {"a": "b", "b": "a", "tie": "tie"}[side]


@pytest.mark.parametrize("answer", ["C", "A or B", "A good reply", "Neither", "AB", "A\nbecause"])
def test_other_answers_are_no_judgement(answer):
    with pytest.raises(NoAnswer):
        parse(answer, swapped=False)


def test_a_winner_wins_from_both_positions(stub):
    judge = endpoint(stub(prefers("good")))
    assert judge_pair(pair(), judge) == "a"
    assert judge_pair(pair(0, "bad", "good"), judge) == "b"


@pytest.mark.parametrize("answer", ["A", "B", "tie"])
def test_a_judge_that_goes_by_position_gives_a_tie(stub, answer):
    assert judge_pair(pair(), endpoint(stub(lambda question: answer))) == "tie"


def test_one_vote_and_one_tie_are_a_tie(stub):
    server = stub(lambda question: "A" if shown_first(question) == "good" else "tie")
    assert judge_pair(pair(), endpoint(server)) == "tie" and len(server.requests) == 2


def test_empty_and_equal_replies_are_settled_without_asking(stub):
    server = stub(prefers("good"))
    sides = [
        judge_pair(pair(0, *replies), endpoint(server)) for replies in (("x", " "), ("", "x"), ("x ", "x"))
    ]
    assert sides == ["a", "b", "tie"] and not server.requests


def test_counts_and_rate(stub):
    pairs = [pair(0), pair(1), pair(2, "bad", "good"), pair(3, "x", "x")]
    result = judge_all(pairs, endpoint(stub(prefers("good"))))
    assert [result[key] for key in ("pairs", "wins_a", "wins_b", "ties", "failed")] == [4, 2, 1, 1, 0]
    assert result["win_rate"] == pytest.approx((2 + 0.5) / 4)
    assert result["ci95"][0] < result["win_rate"] < result["ci95"][1] and 0.3 < result["p"] <= 1
    assert result["verdicts"]["d2_part0"] == "b"


@pytest.mark.parametrize(
    "broken",
    [(500, "down"), (400, "too long"), (200, "not json"), (200, "{}"), "", "Well, it depends."],
    ids=["500", "400", "not-json", "no-choices", "no-text", "malformed"],
)
def test_a_failed_judgement_is_counted_and_nobodys_win(stub, broken, caplog):
    server = stub(lambda question: broken if "worse" in question else prefers("good")(question))
    with caplog.at_level(logging.WARNING):
        result = judge_all([pair(0), pair(1, "good", "worse")], endpoint(server, tries=2))
    assert (result["wins_a"], result["wins_b"], result["ties"], result["failed"]) == (1, 0, 0, 1)
    assert result["win_rate"] == 1.0 and result["verdicts"]["d1_part0"] == "failed"
    assert "d1_part0" in caplog.text


def test_where_every_pair_that_was_asked_failed_there_is_no_rate(stub):
    pairs = [pair(0), *(pair(number, "same", "same") for number in range(1, 4)), pair(4, "x", "")]
    failed = judge_all(pairs, endpoint(stub(lambda question: "Well, it depends.")))
    assert (failed["ties"], failed["failed"], failed["win_rate"], failed["ci95"]) == (3, 1, None, None)
    assert (failed["not_asked"], failed["equal"]) == (4, 3)
    unasked = judge_all(pairs[1:], endpoint(stub(lambda question: pytest.fail("asked"))))
    assert unasked["win_rate"] == (1 + 1.5) / 4


def test_half_a_judgement_is_a_failure(stub):
    server = stub(lambda question: "A" if shown_first(question) == "good" else (500, ""))
    result = judge_all([pair()], endpoint(server, tries=1))
    assert (result["wins_a"], result["failed"], result["win_rate"]) == (0, 1, None)


def test_errors_that_pass_are_tried_again(stub):
    states = iter([(503, ""), (429, ""), "A", (500, ""), "B"])
    server = stub(lambda question: next(states))
    assert judge_pair(pair(), endpoint(server)) == "a" and len(server.requests) == 5


def test_the_wait_that_the_endpoint_asks_for_is_kept(stub, monkeypatch):
    soon, never = ((429, "", {"Retry-After": seconds}) for seconds in ("7", "900"))
    waits, states = [], iter([soon, (500, ""), never, "A", "B"])
    monkeypatch.setattr(time, "sleep", waits.append)
    assert judge_pair(pair(), endpoint(stub(lambda question: next(states)), first_wait=1.0)) == "a"
    assert waits == [7, 2, LONGEST_WAIT]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_the_run_at_once(stub, status):
    server = stub(lambda question: (status, "no"))
    with pytest.raises(UserError, match=f"HTTP {status}"):
        judge_all([pair(0), pair(1)], endpoint(server))
    assert len(server.requests) == 1


def test_a_dead_endpoint_is_given_up(stub):
    server = stub(lambda question: "A")
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(UserError, match="in a row"):
        judge_all([pair(number) for number in range(GIVE_UP_AFTER + 5)], endpoint(server, tries=1))
    settled = [pair(number, "same", "same" if number % 2 else "other") for number in range(2 * GIVE_UP_AFTER)]
    with pytest.raises(UserError, match="in a row"):
        judge_all(settled, endpoint(server, tries=1))


def test_a_slow_endpoint_is_a_failure(stub):
    wait = threading.Event()
    server = stub(lambda question: "A" if wait.wait(2) else "B")
    assert judge_all([pair()], endpoint(server, tries=1, timeout=0.05))["failed"] == 1
    wait.set()


def test_the_key_is_sent_and_not_shown(stub, tmp_path):
    server = stub(prefers("good"))
    judge = endpoint(server, key="secret")
    judge_pair(pair(), Cached(judge, tmp_path / "cache.jsonl"))
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("judge", 0)
    assert "secret" not in repr(judge) and "secret" not in (tmp_path / "cache.jsonl").read_text()


def test_a_stopped_run_asks_only_what_it_has_no_answer_to(stub, tmp_path, caplog):
    server, path = stub(prefers("good")), tmp_path / "deep" / "cache.jsonl"
    judge_pair(pair(), Cached(endpoint(server), path))
    with path.open("a") as stream:
        stream.write('\n{"key": "half a li')  # killed while it wrote
    server.requests.clear()
    resumed = Cached(endpoint(server), path)
    judge_all([pair(), pair(1, "good", "worse")], resumed)
    assert len(server.requests) == 2 and "1 damaged" in caplog.text
    assert len(Cached(endpoint(server), path).answers) == 4
    other = Endpoint(server.url, "another judge")
    judge_pair(pair(), Cached(other, path))
    assert len(server.requests) == 4
    elsewhere = stub(prefers("good"))  # of the same name, which may be another model
    judge_pair(pair(), Cached(endpoint(elsewhere), path))
    assert len(elsewhere.requests) == 2


@pytest.mark.parametrize("said", ["good\u2028A", "\ud83d\nA"])
def test_any_answer_is_kept(stub, tmp_path, said):
    path = tmp_path / "cache.jsonl"
    judge = Cached(endpoint(stub(lambda question: said)), path)
    answer = judge.ask([{"role": "user", "content": "?"}])
    assert list(Cached(judge.endpoint, path).answers.values()) == [answer]


def test_a_refusal_that_breaks_off_is_a_failure(stub):
    server = stub(lambda question: (400, "half", {"Content-Length": "100"}))
    assert judge_all([pair()], endpoint(server, tries=1, timeout=0.2))["failed"] == 1


def test_the_reason_of_a_refusal_is_shown_and_a_broken_key_is_not(stub):
    server = stub(lambda question: (400, "use 'max_completion_tokens'"))
    with pytest.raises(NoAnswer, match="max_completion_tokens"):
        endpoint(server).ask([{"role": "user", "content": "?"}])
    with pytest.raises(UserError, match="key: holds characters") as error:
        endpoint(server, key="sk-secret\r")
    assert "secret" not in str(error.value)


def test_failures_are_not_kept(stub, tmp_path):
    down = True
    server = stub(lambda question: (500, "") if down else prefers("good")(question))
    judge = Cached(endpoint(server, tries=1), tmp_path / "cache.jsonl")
    assert judge_all([pair()], judge)["failed"] == 1
    down = False
    assert judge_all([pair()], judge)["wins_a"] == 1


def records(*replies):
    return [
        {"id": f"d{number}_part0", "reply": reply, "rougeL": None if reply == "unasked" else 0.0}
        for number, reply in enumerate(replies)
    ]


def test_pairs_are_what_both_were_asked_for():
    examples = [pair(number).example for number in range(3)]
    (first, last) = make_pairs(
        records("x", "y", None), list(reversed(records("a", "unasked", "c"))), examples
    )
    assert (first.reply_a, first.reply_b) == ("x", "a")
    assert (last.example.id, last.reply_a, last.reply_b) == ("d2_part0", "", "c")  # a failed generation
    with pytest.raises(UserError, match="d1_part0"):
        make_pairs(records("x", "y"), records("a", "b"), examples[:1])
    with pytest.raises(UserError, match="in common"):
        make_pairs(records("unasked"), records("b"), examples)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "records.json"
    for text, message in (("{", "damaged JSON"), ("{}", "list of records"), ('[{"id": "1"}]', "'reply'")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_records(path)


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8000",
        "http://",
        "http://local host/v1",
        "http://localhost:80x/v1",
        "http://[::1/v1",
        "http://ö/",
    ],
)
def test_an_address_that_nobody_can_have_is_refused(address):
    with pytest.raises(UserError, match=r"endpoint: got .*, expected an address"):
        Endpoint(address, "judge")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_time_that_no_socket_can_wait_is_refused(timeout):
    with pytest.raises(UserError, match=r"timeout: got .*, expected seconds above 0"):
        Endpoint("http://[::1]:8000/v1", "judge", timeout=timeout)


@pytest.fixture
def command(stub, tmp_path):
    """A stub of an endpoint, and the words that ask it about two pairs."""
    server = stub(prefers("good"))
    examples = [Example(f"d{number}_part0", pair().example.turns, "Bob", "Ann", 0, 0) for number in range(2)]
    write_mqdialog(MQDialog("Bob", ["Ann"], 1, examples[:1], examples), tmp_path / "data", "show")
    for side, reply in (("a", "good"), ("b", "bad")):
        (tmp_path / f"{side}.json").write_text(json.dumps({"records": records(reply, reply)}))
    places = {"a": "a.json", "b": "b.json", "data": "data", "cache": "cache.jsonl", "out": "out.json"}
    command = [part for name, place in places.items() for part in (f"--{name}", str(tmp_path / place))]
    return server, ["judge", *command, "--endpoint", server.url, "--model", "judge"]


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_asked(
    command, option, tmp_path, monkeypatch
):
    server, words = command
    monkeypatch.setattr(sys, "argv", [*words, option, str(tmp_path)])
    with pytest.raises(UserError, match="is a folder, expected a file"):
        main()
    assert not server.requests


def test_where_nothing_could_be_judged_the_command_fails(command, tmp_path, monkeypatch, capsys):
    server, words = command
    server.reply = lambda question: "Well, it depends."
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        run(main)
    assert "none of 2 pairs could be judged (0 more" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "out.json").read_text())["failed"] == 2


def test_command_line(command, tmp_path, monkeypatch, capsys):
    server, command = command
    monkeypatch.setattr(sys, "argv", command)
    main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "win rate of a: 100.0 %" in shown and "2 pairs were asked, 0 more needed no judge" in shown
    assert json.loads((tmp_path / "out.json").read_text())["wins_a"] == 2
    monkeypatch.setattr(sys, "argv", [*command, "--key-variable", "NO_SUCH_KEY"])
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        main()
    server.reply = lambda question: (401, "no")
    monkeypatch.setattr(sys, "argv", [*command, "--cache", str(tmp_path / "other.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        run(main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "HTTP 401" in error
