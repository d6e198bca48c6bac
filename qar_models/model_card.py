"""A model card for saved folders."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from torch import nn

_MARK = "<!-- written by qar_models with every save; delete this line to keep a card of your own -->"
_NAMES = 20  # that a card shows
_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- querier-aware
---
{mark}

# {name}

A querier-aware language model (arXiv 2412.11736): its answer depends on who asks.

| setting | value |
|---|---|
{settings}

```python
import torch
import qar_models  # registers the model with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)
model.generate(**tokens, querier_ids=torch.tensor([ID]), max_new_tokens=64)  # model.queriers: name -> id
```
"""


def write_model_card(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write ``README.md`` into ``folder``, unless it has one that was not written here."""
    path = Path(folder) / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    shown = ("num_queriers", "tower", "experts", "expert_rank", "unknown_querier", "num_clusters")
    values = {name: getattr(model.qar, name) for name in shown}
    values["queriers"] = _names(list(model.queriers))
    settings = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    card = _CARD.format(mark=_MARK, name=type(model).__name__, settings=settings)
    path.write_text(card, encoding="utf-8")


def _names(names: list[str]) -> str:
    """As one cell of the table: in one line, without Markdown."""
    cell = ", ".join(re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(name.split())) for name in names[:_NAMES])
    return f"{cell} and {len(names) - _NAMES} more" if len(names) > _NAMES else cell or "(no names)"
