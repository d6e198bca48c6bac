"""Talk with a trained responder, as any querier it knows.

    python -m train.chat --model runs/demo/cells/qar-seed0/trained --querier "Prince Henry"

``/as NAME`` changes who asks, in mid-conversation; ``/all`` shows what every querier would be answered to the
last query; ``/who`` lists the names; ``/quit`` (or Ctrl-D) ends.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import transformers
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer

from train.cli import positive_int, run
from train.data.names import known_querier
from train.data.transcript import Turn
from train.errors import UserError
from train.generate import answer, answer_table, end_marks, generate_replies, prompt_as
from train.trained import Trained, load_trained


class Chat:
    """One conversation; its history stays when somebody else goes on asking."""

    def __init__(self, trained: Trained, querier: str, console: Console, max_new_tokens: int) -> None:
        self.trained, self.console, self.max_new_tokens = trained, console, max_new_tokens
        self.history: list[Turn] = []
        self.switch(querier)

    def switch(self, querier: str) -> None:
        """Let ``querier`` ask from now on."""
        self.querier = known_querier(self.trained.queriers, querier)

    def handle(self, line: str) -> None:
        """Run a command or answer a query."""
        command, _, rest = line.partition(" ")
        if command == "/as":
            self.switch(rest.strip())
        elif command == "/who":
            self.console.print(Text(", ".join(self.trained.queriers)))
        elif command == "/all":
            self._answer_all()
        elif line.startswith("/"):
            raise UserError(f"command '{command}' is unknown, expected /as NAME, /all, /who or /quit")
        elif line.strip():
            self._answer(line.strip())

    def _answer(self, query: str) -> None:
        asked = [*self.history, Turn(self.querier, query)]
        prompt = prompt_as(self.trained, asked, self.querier)  # a refused query is not kept
        responder = self.trained.roles(self.querier)[1]
        self.console.print(Text.assemble((responder, "bold"), ": "), end="")
        tokenizer = self.trained.tokenizer
        (reply,) = generate_replies(
            self.trained.model,
            tokenizer,
            [prompt],
            [self.trained.querier_id(self.querier)],
            self.max_new_tokens,
            end_marks(self.trained),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        self.history = [*asked, Turn(self.trained.responder, reply)]

    def _answer_all(self) -> None:
        asked = [index for index, turn in enumerate(self.history) if turn.speaker != self.trained.responder]
        if not asked:
            raise UserError("/all answers the last query, but nothing was asked yet")
        history = self.history[: asked[-1] + 1]
        replies = answer(self.trained, history, self.trained.queriers, self.max_new_tokens)
        self.console.print(answer_table(self.trained, replies))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder written by train.finetune")
    parser.add_argument("--querier", required=True, help="who asks first")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sys.stdin.reconfigure(errors="replace")  # invalid bytes are a slip of typing
    transformers.logging.disable_progress_bar()
    console = Console()
    chat = Chat(load_trained(arguments.model), arguments.querier, console, arguments.max_new_tokens)
    while True:
        try:
            line = console.input(Text(f"{chat.querier}: ", "dim"))
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        try:
            chat.handle(line)
        except UserError as error:  # a slip does not end the conversation
            console.print(Text(str(error), "red"))


if __name__ == "__main__":
    run(main)
