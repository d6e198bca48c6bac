"""Names of people: how they are spelt, and what a querier of one or several responders is called."""

import difflib
import re
import unicodedata
from collections.abc import Sequence

from train.errors import UserError

ARROW = " > "
"""Between the two names of a pair, and so in nobody's own name."""
NO_WIDTH = re.compile(r"[\u200b\u2060\ufeff]")
"""Characters that nobody sees; those that join letters or keep them apart may belong to a name."""


def plain_name(name: str) -> str:
    """``name`` as it looks: composed letters (NFC), single spaces, nothing invisible.

    What looks the same is the same person, whichever system or hand wrote it.
    """
    return unicodedata.normalize("NFC", " ".join(NO_WIDTH.sub("", name).split()))


def check_name(name: str, where: str) -> None:
    """``UserError`` for a name that would be read as two, or would be with another name behind it."""
    if ARROW in f"{name} ":
        raise UserError(f"{where}: got the name '{name}', expected one without '{ARROW}', which joins names")


def short_name(name: str) -> str:
    """Only the letters, their marks and the digits of ``name``, for file names: ``MistressQuickly``."""
    return "".join(one for one in name if one.isalnum() or unicodedata.category(one).startswith("M"))


def pair_name(querier: str, responder: str) -> str:
    """What a pair is called among the queriers of a data set of several responders."""
    return f"{querier}{ARROW}{responder}"


def split_pair(name: str) -> tuple[str, str | None]:
    """Who asks and who answers in a pair's name; a name that is no pair's has None for the latter."""
    querier, arrow, responder = name.partition(ARROW)
    return querier, responder if arrow else None


def name_beside(queriers: Sequence[str], querier: str, responder: str) -> str:
    """What ``querier`` of ``responder`` is called among ``queriers``: a pair if those are pairs."""
    pairs = split_pair(queriers[0])[1] is not None
    return pair_name(querier, responder) if pairs else querier


def known_querier(queriers: Sequence[str], name: str) -> str:
    """The querier called ``name``; a pair is also found by who asks, if they ask only one responder.

    Raises ``UserError`` with the pairs that an ambiguous name could mean, or the names closest to an unknown
    one.
    """
    for spelling in (name, plain_name(name)):  # the latter as names of transcripts are
        if spelling in queriers:
            return spelling
        pairs = [pair for pair in queriers if split_pair(pair)[0] == spelling]
        if len(pairs) > 1:
            expected = " or ".join(map(repr, pairs))
            raise UserError(f"querier '{name}' asks several responders; expected {expected}")
        if pairs:
            return pairs[0]
    close = difflib.get_close_matches(name, queriers, n=1) or list(queriers)[:5]
    raise UserError(f"querier '{name}' is unknown; did you mean {' or '.join(close)}?")
