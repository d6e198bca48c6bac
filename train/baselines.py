"""The paper's prompt baselines: contexts that say who answers, who asks, or how others were answered.

Each function returns the same dialogues with more ``context``, so they can be chained, and the result can
be prompted with or trained on like any other data:

    few_shot(role_profile(data, load_profiles(path)))
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from train.data.layout import Example, MQDialog
from train.data.names import plain_name
from train.errors import UserError
from train.files import read_mapping

Missing = Literal["error", "name"]

ROLE = "{profile}"
QUERIER = "You are talking with {name}. {profile}"
SHOTS = "This is how {responder} talks in other conversations:"


def load_profiles(path: Path) -> dict[str, str]:
    """A YAML file of ``name: description``; ``UserError`` naming the file for anything else."""
    profiles = read_mapping(path)
    for name, profile in profiles.items():
        if not isinstance(name, str) or not isinstance(profile, str) or not profile.strip():
            raise UserError(f"{path}: profile of '{name}': got {profile!r}, expected a description")
    described = {name: " ".join(profile.split()) for name, profile in profiles.items()}
    return described | {plain_name(name): profile for name, profile in described.items()}


def role_profile(data: MQDialog, profiles: Mapping[str, str], missing: Missing = "error") -> MQDialog:
    """RPG: the written profile of the responder before the query.

    Responders without a profile are listed in a ``UserError``; with ``missing="name"`` they are described by
    their name alone, which the prompt holds anyway.
    """
    known = _known(profiles, (example.responder for example in _examples(data)), missing)
    return _with_contexts(
        data, [ROLE.format(profile=known[example.responder]) for example in _examples(data)]
    )


def querier_profile(data: MQDialog, profiles: Mapping[str, str], missing: Missing = "error") -> MQDialog:
    """QCG: who asks, by name and written characteristics, before the query.

    Queriers without a profile are listed in a ``UserError``; with ``missing="name"`` only their name is
    given.
    """
    names = [example.asker for example in _examples(data)]
    known = _known(profiles, names, missing)
    return _with_contexts(data, [QUERIER.format(name=name, profile=known[name]) for name in names])


def few_shot(data: MQDialog, k: int = 5) -> MQDialog:
    """Few-shot: ``k`` training windows of the same responder, each of another dialogue, before the query.

    The windows with the queries most similar to this window's are chosen, most similar first, so that a
    prompt that is too long loses the least similar. Similar is what shares words (characters where the text
    has no spaces), by TF-IDF. The window's own dialogue is never used. If a responder has fewer than ``k``
    other training dialogues, all of them are given.
    """
    if k < 1:
        raise UserError(f"few-shot: got {k} examples, expected at least 1")
    asking, contexts = _examples(data), {}
    for responder in {example.responder for example in asking}:
        windows = [window for window in data.train if window.responder == responder]
        indices = [index for index, example in enumerate(asking) if example.responder == responder]
        shots = _nearest([asking[index] for index in indices], windows, k)
        contexts |= {index: _transcript(found) for index, found in zip(indices, shots, strict=True)}
    return _with_contexts(data, [contexts[index] for index in range(len(asking))])


def _nearest(asking: Sequence[Example], windows: Sequence[Example], k: int) -> list[list[Example]]:
    """For each of ``asking`` the ``k`` windows of other dialogues with the most similar queries."""
    if not windows:
        return [[] for _ in asking]
    known = [window.query for window in windows]
    tfidf = _tfidf(known)
    vectors, queries = tfidf.transform(known), tfidf.transform([example.query for example in asking])
    chosen = []
    for row, example in enumerate(asking):
        similarity = (vectors @ queries[[row]].T).toarray()[:, 0]
        ranked = (windows[index] for index in np.argsort(-similarity, kind="stable"))
        dialogues: dict[tuple[int, str], Example] = {}
        for window in ranked:
            if _dialogue(window) != _dialogue(example):
                dialogues.setdefault(_dialogue(window), window)
            if len(dialogues) == k:
                break
        chosen.append(list(dialogues.values()))
    return chosen


def _transcript(windows: Sequence[Example]) -> str:
    if not windows:
        return ""
    texts = ["\n".join(f"{turn.speaker}: {turn.text}" for turn in window.turns) for window in windows]
    return "\n\n".join([SHOTS.format(responder=windows[0].responder), *texts])


def _tfidf(texts: Sequence[str]) -> TfidfVectorizer:
    """Vectors of unit length, fitted on ``texts``."""
    spaced = sum(bool(re.search(r"\w\s+\w", text)) for text in texts) * 2 >= len(texts)
    words = {"token_pattern": r"(?u)\b\w+\b"} if spaced else {"analyzer": "char", "ngram_range": (1, 2)}
    never_empty = [*texts, "a"]
    return TfidfVectorizer(sublinear_tf=True, **words).fit(never_empty)


def _dialogue(example: Example) -> tuple[int, str]:
    return example.querier_id, example.dialogue


def _examples(data: MQDialog) -> list[Example]:
    return [*data.train, *data.dev]


def _known(profiles: Mapping[str, str], names: Iterable[str], missing: Missing) -> dict[str, str]:
    if missing not in ("error", "name"):
        raise UserError(f"missing: got {missing!r}, expected 'error' or 'name'")
    needed = sorted(set(names))
    absent = [name for name in needed if name not in profiles]
    if absent and missing == "error":
        raise UserError(f"no profile of: {', '.join(absent)}; describe them, or pass missing='name'")
    return {name: profiles.get(name, "") for name in needed}


def _with_contexts(data: MQDialog, contexts: Sequence[str]) -> MQDialog:
    """``data`` with one more context per window; the contexts of ``train`` come first."""
    told = [
        dataclasses.replace(example, context="\n".join(filter(None, [example.context, context.strip()])))
        for example, context in zip(_examples(data), contexts, strict=True)
    ]
    return dataclasses.replace(data, train=told[: len(data.train)], dev=told[len(data.train) :])
