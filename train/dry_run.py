"""What a run would do, before it does it: ``python -m train.finetune --config ... --dry-run``.

Memory of one rank, in bytes; P all parameters that the trainer sees, T the trained ones, N ranks:

- weights: P at the base's width, T at 4 (2 under DeepSpeed in 16 bits); ZeRO-3 keeps 1/N
- gradients: T at the trained parameters' width; ZeRO-2 and 3 keep 1/N
- optimizer: 8 T for Adam's two moments, and 4 T for fp32 masters under DeepSpeed in 16 bits; ZeRO keeps 1/N
- experts with row-sparse gradients: the same, but whole on every rank; gradients only for those in a step
- contrastive memory: ``QARConfig.contrastive_memory_bytes``, in fp32, on every rank
- activations: micro-batch tokens (batch_size times the longest window) times, for every trained layer,
  10 H + 4 I values (norms, projections, attention, gate, up, their product), or H with gradient
  checkpointing plus one layer in full; and fp32 logits with their gradient for half of the tokens.
  The replace tower runs every token twice.

It is an estimate that ignores the allocator, communication buffers and offloading.

Without a launcher there is no DeepSpeed: a run that asks for it is planned for one rank, and its first steps
run without.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from qar_models import sparse_parameters
from train import ranks
from train.config import DTYPES, TrainConfig
from train.data.layout import MQDialog
from train.data.tables import num_dialogues
from train.dataset import load_data
from train.files import check_place, read_json
from train.run_file import RUN
from train.setup import Prepared, make_trainer, prepare
from train.trained import is_querier_part

MEASURED = 4  # steps; the first one pays for warming up and is left out of the estimate


def dry_run(config: TrainConfig) -> None:
    """Prepare everything, run the first steps without keeping anything, and print the plan."""
    check_place(Path(config.output_dir) / RUN)
    _zero_stage(config)  # a missing file shows before the model is loaded
    ranks.start(config.deepspeed if ranks.launched() else None)
    with ranks.watching():
        _dry_run(config)


def _dry_run(config: TrainConfig) -> None:
    found = load_data(config)
    prepared = prepare(config, found)
    alone = config if ranks.launched() else config.replace(deepspeed=None)
    plan: dict[str, Mapping[str, Any]] = {
        "data": data_sizes(found.data, prepared),
        "trainable parameters": trainable(prepared),
        "memory of one rank (estimate)": {
            name: f"{size / 2**20:,.1f} MiB" for name, size in memory(prepared, config).items()
        },
        "frozen layers' states, on disk and in host memory": {
            "all windows": f"{sum(state.nbytes for state in prepared.windows.states or ()) / 2**20:,.1f} MiB"
        },
        "time": _times(first_steps(prepared, alone), num_steps(config, len(prepared.windows))),
    }
    if alone != config:
        plan["DeepSpeed"] = {config.deepspeed: "no launcher: steps ran without"}
    if ranks.is_main():
        Console().print(plan_table(config, plan))


def plan_table(config: TrainConfig, plan: Mapping[str, Mapping[str, Any]]) -> Table:
    """One section for each part of the plan."""
    title = Text(f"{config.method} on {config.model}, {ranks.world_size()} rank(s)")
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, rows in plan.items():
        table.add_section()
        table.add_row(Text(part, "bold"))
        for name, value in rows.items():
            table.add_row(Text(f"  {name}"), Text(f"{value:,}" if isinstance(value, int) else str(value)))
    return table


def data_sizes(data: MQDialog, prepared: Prepared) -> dict[str, int]:
    """Counts of the training split."""
    windows = prepared.windows.windows
    return {
        "windows": len(windows),
        "windows left out (too long)": len(data.train) - len(windows),
        "dialogues": num_dialogues(data.train),
        "tokens": sum(len(window.input_ids) for window in windows),
        "tokens in replies": sum(sum(window.response_mask) for window in windows),
        "queriers": len(data.queriers),
        "clusters": data.num_clusters,
    }


def trainable(prepared: Prepared) -> dict[str, int]:
    """Parameters that are trained, by group."""
    groups = {"LoRA": 0, "experts and norms": 0, "contrastive heads": 0}
    for name, parameter in prepared.model.named_parameters():
        if parameter.requires_grad:
            kind = "LoRA" if not is_querier_part(name) else "experts and norms"
            groups["contrastive heads" if "contrast." in name else kind] += parameter.numel()
    return {**groups, "all": sum(groups.values())}


def memory(prepared: Prepared, config: TrainConfig) -> dict[str, float]:
    """Bytes on one rank; the formulas are in this module's docstring."""
    stage = _zero_stage(config)
    trained = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    by_rows = sum(p.numel() for p in sparse_parameters(prepared.model).values())
    dense = trained - by_rows
    asking = config.batch_size * config.gradient_accumulation / prepared.model.qar.num_queriers
    frozen = sum(p.numel() for p in prepared.model.parameters() if not p.requires_grad)
    width = DTYPES[config.dtype].itemsize
    masters = stage > 0 and width == 2
    trained_width = 2 if masters else 4
    share = [1 / ranks.world_size() if stage >= least else 1.0 for least in (1, 2, 3)]
    contrast = prepared.model.qar.contrastive_memory_bytes if config.method == "qar" else 0
    parts = {
        "weights": (frozen * width + trained * trained_width) * share[2],
        "gradients": (dense * share[1] + by_rows * min(1.0, asking)) * trained_width,
        "optimizer": (dense * share[0] + by_rows) * (12 if masters else 8),
        "contrastive memory": contrast,
        "activations": _activations(prepared, config),
    }
    return {**parts, "all": sum(parts.values())}


def _activations(prepared: Prepared, config: TrainConfig) -> float:
    shape, width = prepared.model.config, DTYPES[config.dtype].itemsize
    tokens = config.batch_size * max(len(window.input_ids) for window in prepared.windows.windows)
    rows = tokens * (2 if config.method == "qar" and config.tower == "replace" else 1)
    layer = 10 * shape.hidden_size + 4 * shape.intermediate_size
    layers = shape.num_hidden_layers
    kept = layers * shape.hidden_size + layer if config.gradient_checkpointing else layers * layer
    return rows * kept * width + tokens / 2 * shape.vocab_size * 8


def _zero_stage(config: TrainConfig) -> int:
    if config.deepspeed is None:
        return 0
    return read_json(Path(config.deepspeed), ()).get("zero_optimization", {}).get("stage", 0)


def num_steps(config: TrainConfig, windows: int) -> int:
    """Optimizer steps of the whole run, counted as transformers' Trainer counts them."""
    batches = math.ceil(windows / (config.batch_size * ranks.world_size()))
    return math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation))


def first_steps(prepared: Prepared, config: TrainConfig) -> list[float]:
    """Seconds of each of the first steps; the weights change, nothing is written."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as scratch:
        settings = config.replace(output_dir=scratch, report_to="none")
        trainer = make_trainer(
            prepared.model,
            prepared.tokenizer,
            prepared.windows,
            settings,
            max_steps=MEASURED,
            save_strategy="no",
        )
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def _times(seconds: list[float], steps: int) -> dict[str, Any]:
    rest = seconds[1:] or seconds
    mean = sum(rest) / len(rest)
    return {
        "steps": steps,
        f"first {len(seconds)} steps": ", ".join(f"{second:.2f}" for second in seconds) + " s",
        "all steps (estimate, without saving)": f"{steps * mean / 60:,.1f} min",
    }
