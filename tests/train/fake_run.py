"""A finished comparison run with invented numbers, every part present."""

import numpy as np

from train.metrics import compare, summarise, swap_summary

QUERIERS = ("Amy", "Howard", "Leonard", "Penny", "Raj", "佟湘玉")
NLL = {"zero_shot": 3.4, "ft": 2.45, "qar": 2.33}
ROUGE = {"zero_shot": 0.11, "ft": 0.172, "qar": 0.176}


def records(method: str, worse: float = 0.0) -> list[dict]:
    shared, own = np.random.default_rng(0), np.random.default_rng([len(method), int(100 * worse)])
    rows = []
    for index in range(240):
        tokens = int(shared.integers(5, 40))
        nll = NLL[method] + worse + shared.normal(0, 0.5) + own.normal(0, 0.1)
        score = float(
            np.clip(ROUGE[method] - worse / 20 + shared.normal(0, 0.05) + own.normal(0, 0.05), 0, 1)
        )
        rows.append(
            {"id": str(index), "dialogue": f"d{index // 4}", "querier": QUERIERS[index % 6]}
            | {"nll_sum": nll * tokens, "tokens": tokens, "empty": method == "qar" and index < 2}
            | {"rouge1": score * 1.2, "rouge2": score / 3, "rougeL": score}
        )
    return rows


def results() -> dict:
    runs = {method: records(method) for method in NLL}
    return {
        "conditions": {
            "responders": ["Sheldon"],
            "train_windows": [2210],
            "train": {"model": "Qwen/Qwen2.5-0.5B", "tower": "residual", "expert_rank": 16},
        },
        "methods": {method: summarise(rows) for method, rows in runs.items()},
        "paired": {"qar_vs_ft": compare(runs["qar"], runs["ft"])},
        "swap": {"qar": swap_summary(runs["qar"], records("qar", 0.08))},
    }


def planted() -> dict:
    people = {name: {"ft": 0.2 + 0.02 * i, "qar": 0.95 - 0.05 * i} for i, name in enumerate(QUERIERS)}
    return {"qar_accuracy": 0.83, "ft_accuracy": 0.25, "chance": 0.17, "per_querier": people}


def parts() -> dict:
    """What the page is rendered from."""
    return {
        "results": results(),
        "planted": planted(),
        "seconds": {"ft": 412.3, "qar": 433.0},
        "curves": curves(),
        "similarity": similarity(),
        "samples": samples(),
    }


def curves() -> dict[str, list[dict]]:
    rng, steps = np.random.default_rng(0), range(0, 1000, 5)
    loss = {"ft": 2.2, "qar": 2.1}
    return {
        name: [{"step": s, "lm_loss": low + 1.6 * np.exp(-s / 150) + rng.normal(0, 0.12)} for s in steps]
        for name, low in loss.items()
    }


def similarity() -> dict:
    features = np.random.default_rng(0).normal(size=(len(QUERIERS), 8)) + 0.3
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return {"names": list(QUERIERS), "matrix": (features @ features.T).tolist()}


def samples() -> list[dict]:
    return [
        {
            "query": "Do you want to see a movie <b>tonight</b> & talk?",
            "history": [
                {"from": "Penny", "value": "Hi, sweetie."},
                {"from": "Sheldon", "value": "Hello, Penny. You are in my spot."},
            ],
            "reference": "I'm afraid that's impossible. Tonight is laundry night.",
            "asked_by": "Penny",
            "answers": {
                "Penny": "No. But thank you for asking, Penny.\nPerhaps on Friday.",
                "Leonard": "It's Thursday, Leonard. You know what Thursday is. We have a roommate agreement, "
                "and section nine is perfectly clear about unscheduled entertainment.",
                "Amy": "",
                "佟湘玉": "<script>alert('x')</script> 掌柜的，今晚不行。",
            },
        },
        {
            "query": "What is wrong with you?",
            "history": [],
            "reference": "Nothing. My mother had me tested.",
            "asked_by": "Howard",
            "answers": {"Howard": "Nothing, Howard.", "Amy": "A fascinating question, Amy Farrah Fowler."},
        },
    ]
