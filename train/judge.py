"""A chat model judges, pair by pair, which of two methods' replies fits the querier better.

    python -m train.judge --a RUNS/cells/qar-seed0/result.json --b RUNS/cells/ft-seed0/result.json \
        --data RUNS/data/SHOW --endpoint http://localhost:8000/v1 --model MODEL \
        [--key-variable OPENAI_API_KEY]

Nothing else calls it. Each pair is judged twice, with the replies swapped: if the judge does not stay with
the same reply, it has no preference and the pair is a tie. A pair that could not be judged counts as failed,
and as a win for neither side. Answers are saved as they arrive, so a stopped run resumes where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm

from train.cli import run
from train.data.layout import Example
from train.data.responders import load_dialogues
from train.endpoint import Cached, Endpoint, Message, NoAnswer
from train.errors import UserError
from train.files import check_file, load_json, write_atomic
from train.metrics import Record
from train.metrics.bootstrap import bootstrap_ci, listed, sign_flip_p

logger = logging.getLogger(__name__)

Side = Literal["a", "b", "tie"]

GIVE_UP_AFTER = 10
"""After so many failed pairs in a row the endpoint is at fault, not the pairs."""
SYSTEM = (
    "You compare two replies in a dialogue. Judge only how well each fits the person who is spoken to: what "
    "the speaker would say to just this person, in this situation. Length and correctness do not count for "
    "themselves, and neither does the order in which the replies are shown."
)
QUESTION = """{responder} talks with {querier}. The dialogue so far:

{dialogue}

Two replies that {responder} could give to {querier} now:

A: {first}

B: {second}

Which of them would {responder} rather give to {querier}? Answer with one word: A, B or tie."""


@dataclass(frozen=True)
class Pair:
    """Two methods' replies to one window."""

    example: Example
    reply_a: str
    reply_b: str


class Judge(Protocol):
    """Anything that answers messages: an endpoint, with or without a cache."""

    def ask(self, messages: Sequence[Message]) -> str:
        """The text of the answer; raises ``NoAnswer`` if there is none."""


def messages(pair: Pair, swapped: bool) -> list[Message]:
    """The prompt of the judge; ``swapped`` shows the reply of b as A."""
    replies = (pair.reply_b, pair.reply_a) if swapped else (pair.reply_a, pair.reply_b)
    example = pair.example
    question = QUESTION.format(
        responder=example.responder,
        querier=example.asker,
        dialogue="\n".join(f"{turn.speaker}: {turn.text}" for turn in example.turns[:-1]),
        first=replies[0],
        second=replies[1],
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def parse(answer: str, swapped: bool) -> Side:
    """The side that the last line of the answer names; raises ``NoAnswer`` unless it is A, B or tie."""
    found = re.fullmatch(r"\W*(?:answer\W+)?(a|b|tie)\W*", answer.strip().splitlines()[-1], re.IGNORECASE)
    if not found:
        raise NoAnswer(f"not A, B or tie: {answer[:80]!r}")
    shown = found[1].lower()
    return {"a": "b", "b": "a", "tie": "tie"}[shown] if swapped else shown


def settled(pair: Pair) -> Side | None:
    """The verdict that needs no judge: an empty reply loses, and two equal replies are a tie."""
    a, b = pair.reply_a.strip(), pair.reply_b.strip()
    if a == b:
        return "tie"
    return None if a and b else "a" if a else "b"


def judge_pair(pair: Pair, judge: Judge) -> Side:
    """The winner, judged once in each order; a tie if the two verdicts differ."""
    known = settled(pair)
    if known:
        return known
    first, second = (parse(judge.ask(messages(pair, swapped)), swapped) for swapped in (False, True))
    return first if first == second else "tie"


def judge_all(pairs: Sequence[Pair], judge: Judge) -> dict[str, Any]:
    """Judge every pair and count.

    Returns:
        ``wins_a``, ``wins_b``, ``ties``, ``failed``, which add up to ``pairs``; ``not_asked``: how many of
        them were :func:`settled`, among them ``equal`` ties; ``win_rate``: the share of judged pairs that a
        won, ties counted as half (None if every pair that was asked failed), with ``ci95`` over dialogues and
        ``p`` (:func:`train.metrics.bootstrap.sign_flip_p`) against a rate of one half; ``verdicts``: id -> a,
        b, tie or failed.

    Raises:
        UserError: if the endpoint refuses, or ``GIVE_UP_AFTER`` pairs in a row could not be judged.
    """
    verdicts: dict[str, str] = {}
    failed_in_a_row = 0
    for pair in tqdm(pairs, desc="judging", unit="pair"):
        try:
            verdicts[pair.example.id] = judge_pair(pair, judge)
            if not settled(pair):
                failed_in_a_row = 0
        except NoAnswer as error:
            logger.warning("%s: %s", pair.example.id, error)
            verdicts[pair.example.id] = "failed"
            failed_in_a_row += 1
            if failed_in_a_row == GIVE_UP_AFTER:
                raise UserError(f"{GIVE_UP_AFTER} pairs in a row could not be judged: {error}") from error
    return _counted(pairs, verdicts)


def _counted(pairs: Sequence[Pair], verdicts: Mapping[str, str]) -> dict[str, Any]:
    worth = {"a": 1.0, "tie": 0.5, "b": 0.0}
    judged = [pair.example for pair in pairs if verdicts[pair.example.id] != "failed"]
    not_asked = [side for side in map(settled, pairs) if side]
    if len(judged) == len(not_asked) < len(pairs):
        judged = []  # what is known without the judge alone is no rate
    values = [worth[verdicts[example.id]] for example in judged]
    dialogues = [example.dialogue for example in judged]
    counts = Counter(verdicts.values())
    return {
        "pairs": len(pairs),
        "wins_a": counts["a"],
        "wins_b": counts["b"],
        "ties": counts["tie"],
        "failed": counts["failed"],
        "not_asked": len(not_asked),
        "equal": not_asked.count("tie"),
        "win_rate": sum(values) / len(values) if values else None,
        "ci95": listed(bootstrap_ci(values, dialogues)) if values else None,
        "p": sign_flip_p([value - 0.5 for value in values], dialogues) if values else None,
        "verdicts": dict(verdicts),
    }


def make_pairs(a: Sequence[Record], b: Sequence[Record], examples: Iterable[Example]) -> list[Pair]:
    """The windows that both methods answered, in the order of ``a``; a failed generation is an empty reply.

    Raises ``UserError`` if there is none, or if a window is not among ``examples``.
    """
    known = {example.id: example for example in examples}
    others = {record["id"]: record for record in b if record["rougeL"] is not None}
    both = [record for record in a if record["rougeL"] is not None and record["id"] in others]
    if not both:
        raise UserError("the two methods answered no window in common")
    unknown = [record["id"] for record in both if record["id"] not in known]
    if unknown:
        raise UserError(
            f"the data has no held-out window '{unknown[0]}', but the records do ({len(unknown)} in all)"
        )
    return [
        Pair(known[record["id"]], record.get("reply") or "", others[record["id"]].get("reply") or "")
        for record in both
    ]


def load_records(path: Path) -> list[Record]:
    """Records from a JSON file: a list, or an object with the list under ``records``."""
    found = load_json(path)
    records = found.get("records") if isinstance(found, dict) else found
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: expected a list of records, or an object with one under 'records'")
    for index, record in enumerate(records):
        missing = {"id", "rougeL", "reply"} - set(record)
        if missing:
            raise UserError(f"{path}: record {index}: key '{min(missing)}' is missing")
    return records


def _key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise UserError(f"--key-variable: the environment variable {variable} is not set")
    return os.environ[variable] if variable is not None else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--a", type=Path, required=True, help="JSON with the records of the first method")
    parser.add_argument("--b", type=Path, required=True, help="JSON with the records of the second method")
    parser.add_argument("--data", type=Path, required=True, help="the dialogues they were evaluated on")
    parser.add_argument("--endpoint", required=True, help="base URL of an OpenAI-compatible API")
    parser.add_argument("--model", required=True, help="name of the judge at the endpoint")
    parser.add_argument(
        "--key-variable", help="environment variable that holds the API key (default: no key)"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per attempt")
    parser.add_argument("--cache", type=Path, default=Path("runs/judge/answers.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/judge/judgement.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for path in (arguments.cache, arguments.out):
        check_file(path)
    endpoint = Endpoint(
        arguments.endpoint, arguments.model, _key(arguments.key_variable), timeout=arguments.timeout
    )
    pairs = make_pairs(
        load_records(arguments.a), load_records(arguments.b), load_dialogues(arguments.data).dev
    )
    result = judge_all(pairs, Cached(endpoint, arguments.cache))
    sides = {"a": str(arguments.a), "b": str(arguments.b), "judge": arguments.model}
    write_atomic(arguments.out, json.dumps(sides | result, indent=1, ensure_ascii=False) + "\n")
    asked = result["pairs"] - result["not_asked"]
    known = f"{result['not_asked']} more needed no judge, {result['equal']} of them equal replies"
    if result["win_rate"] is None:
        raise UserError(
            f"{arguments.out}: none of {asked} pairs could be judged ({known}), so there is no win rate"
        )
    rate = f"{100 * result['win_rate']:.1f} %"
    counts = ", ".join(f"{result[name]} {name}" for name in ("wins_a", "wins_b", "ties", "failed"))
    result_line = f"win rate of a: {rate} ({counts}; {asked} pairs were asked, {known}); {arguments.out}"
    Console().print(Text(result_line))


if __name__ == "__main__":
    run(main)
