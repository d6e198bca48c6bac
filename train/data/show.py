"""Look at windows as the model sees them: what is context, what is learnt, who speaks, what was dropped.

python -m train.data.show --config train/configs/demo.yaml [--split dev] [--index 3 | --sample 5] [key=value]
python -m train.data.show --data data/my_show --html windows.html model=path/to/qwen

What is dropped and learnt depends on a run's settings (max_tokens, style and more). They are those of
--config, by default own.yaml, with which one's own dialogues are trained, or demo.yaml without --data.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from train.base_model import load_tokenizer
from train.cli import positive_int, run
from train.config import load_config
from train.data.encode import IGNORE, Encoded, TooLongError, encode
from train.data.layout import Example
from train.dataset import load_data
from train.errors import UserError
from train.files import check_file, write_atomic

CONFIGS = Path(__file__).parents[1] / "configs"
CONTEXT, LEARNT, SPEAKER, DROPPED = "bright_black", "bold green", "bold magenta", "strike red"
LEGEND = Text("  ").join(
    [
        Text("context", CONTEXT),
        Text("speaker", SPEAKER),
        Text("learnt: replies and their end marks", LEARNT),
        Text("dropped: does not fit, or a reply to nothing", DROPPED),
    ]
)


def window_panel(example: Example, window: Encoded, tokenizer: PreTrainedTokenizerBase) -> Panel:
    """One window: its tokens as text, each stretch coloured by what it is for."""
    text = Text()
    for turn in example.turns[: window.dropped_turns]:
        text.append(f"{turn.speaker}: {turn.text}\n", DROPPED)
    for learnt, piece in stretches(window, tokenizer):
        text.append(piece, LEARNT if learnt else CONTEXT)
    text.highlight_regex(speaker_pattern({turn.speaker for turn in example.turns}), SPEAKER)
    learnt = sum(label != IGNORE for label in window.labels)
    facts = [
        f"{len(window.input_ids)} tokens",
        f"{learnt} learnt",
        f"prompt {window.prompt_length}",
        f"querier {window.querier_id}",
        f"cluster {window.cluster_id}",
    ]
    if window.dropped_turns:
        facts.append(f"{window.dropped_turns} oldest turns dropped")
    title = f"{example.querier} asks {example.responder} ({example.id})"
    return Panel(
        text, title=Text(title), subtitle=", ".join(facts), title_align="left", subtitle_align="left"
    )


def stretches(window: Encoded, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """(learnt, text) of maximal runs of tokens that are learnt, or not."""
    marked = zip(window.labels, window.input_ids, strict=True)
    for learnt, run_of in groupby(marked, key=lambda pair: pair[0] != IGNORE):
        yield learnt, tokenizer.decode([token for _, token in run_of])


def speaker_pattern(names: Iterable[str]) -> str:
    """Where a style writes a name: at the start of a line or after a mark, before a colon or a newline.

    Spaces around it come from tokenizers that separate words when decoding.
    """
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return rf"(?:^|(?<=[\n>])) *(?:{either})(?= ?[:\n])"


def choose(count: int, index: int | None, sample: int, seed: int) -> list[int]:
    """Which of ``count`` windows to show; ``UserError`` for an index that is not there."""
    if index is not None and not 0 <= index < count:
        raise UserError(f"--index: got {index}, expected 0 to {count - 1}")
    if index is not None:
        return [index]
    return sorted(random.Random(seed).sample(range(count), min(sample, count)))


def panels(
    examples: Sequence[Example], indices: Sequence[int], tokenizer: PreTrainedTokenizerBase, **options: object
) -> Iterator[Panel]:
    """A panel for each chosen window; one too long for the token limit says so instead."""
    for index in indices:
        example = examples[index]
        try:
            yield window_panel(example, encode(example, tokenizer, **options), tokenizer)
        except TooLongError as error:
            yield Panel(str(error), title=Text(example.id), style="red", title_align="left")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="a YAML file (default: own.yaml with --data, else demo.yaml)"
    )
    parser.add_argument("--data", help="the data folder, instead of the file's")
    parser.add_argument("--split", choices=("train", "valid", "dev"), default="train")
    parser.add_argument("--index", type=int, help="this window")
    parser.add_argument(
        "--sample", type=positive_int, default=3, help="this many at random (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--html", type=Path, help="write a page instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace keys of the file")
    return parser.parse_intermixed_args()


def main() -> None:
    """The command line."""
    arguments = _arguments()
    if arguments.html:
        check_file(arguments.html)
    data = [] if arguments.data is None else [f"data={json.dumps(arguments.data)}"]
    default = CONFIGS / ("own.yaml" if data else "demo.yaml")
    config = load_config(arguments.config or default, [*arguments.overrides, *data])
    found = load_data(config)
    examples = {"train": found.data.train, "dev": found.data.dev, "valid": found.valid}[arguments.split]
    if not examples:
        raise UserError(f"the {arguments.split} split is empty (validation={config.validation})")
    chosen = choose(len(examples), arguments.index, arguments.sample, arguments.seed)
    shown = Group(LEGEND, *panels(examples, chosen, load_tokenizer(config.model), **config.encoding))
    if arguments.html is None:
        Console().print(shown)
        return
    page = Console(record=True, width=110, file=io.StringIO())
    page.print(shown)
    write_atomic(arguments.html, page.export_html())
    Console().print(str(arguments.html), soft_wrap=True, markup=False)


if __name__ == "__main__":
    run(main)
