"""A model card for saved folders."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import nn

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- querier-aware
---

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
    """Write ``README.md`` into ``folder``, unless it has one."""
    path = Path(folder) / "README.md"
    if path.exists():
        return
    shown = ("num_queriers", "tower", "experts", "expert_rank", "unknown_querier", "num_clusters")
    values = {name: getattr(model.qar, name) for name in shown}
    values["queriers"] = ", ".join(model.queriers) or "(no names)"
    settings = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    path.write_text(_CARD.format(name=type(model).__name__, settings=settings), encoding="utf-8")
