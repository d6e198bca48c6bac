"""Fine-tuning speed against a straightforward implementation of the paper's procedure.

    python -m train.data.build --show plays --responder Falstaff       # once
    python -m benchmarks.finetune_speed --out benchmarks/results/NAME.json

Both train the replace tower with the contrastive loss, from the same initial weights, on the same windows in
the same order, in turns, step by step. Losses that differ by more than 1e-3 at any step are an error.
``--ablation`` also takes the parts of this project's way back one by one. B windows, S tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.finetune_ways import ABLATION, BASELINE, PAIR, Job, Training, Way, peak_bytes
from benchmarks.machine import describe, versions
from benchmarks.runner import Timing
from train.cli import run
from train.config import TrainConfig
from train.errors import UserError
from train.files import check_file, write_atomic

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Measured:
    """One way's loss and seconds at every step, and its peak."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int | None


def measure(job: Job, ways: dict[str, Way], warm_up: int = 1) -> dict[str, Measured]:
    """Train all ways in turns; the first ``warm_up`` steps are not timed."""
    peaks = {name: peak_bytes(job.config, way) for name, way in tqdm(ways.items(), desc="peak memory")}
    trainings = {name: Training(job, way) for name, way in ways.items()}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in tqdm(range(len(job.batches)), desc="steps"):
        for name in _in_turns(list(ways), step):
            start = time.perf_counter()
            losses[name].append(trainings[name].step(step))
            if step >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Measured(losses[name], seconds[name], peaks[name]) for name in ways}


def _in_turns(names: list[str], step: int) -> Iterator[str]:
    """Who starts changes from step to step."""
    shift = step % len(names)
    yield from names[shift:] + names[:shift]


def check_losses(found: dict[str, Measured]) -> float:
    """The largest difference to the baseline's loss at any step.

    Raises:
        UserError: if it is above ``TOLERANCE``: then something else was computed, and times say nothing.
    """
    expected = found[BASELINE].losses
    worst = 0.0
    for name, measured in found.items():
        for step, (loss, base) in enumerate(zip(measured.losses, expected, strict=True)):
            if not abs(loss - base) <= TOLERANCE:
                raise UserError(f"{name}: loss {loss:.5f} at step {step}, {BASELINE} has {base:.5f}")
            worst = max(worst, abs(loss - base))
    return worst


def rows(job: Job, found: dict[str, Measured]) -> list[dict]:
    """One row of the result file per way; ``ratio_to_base`` is time over the baseline's time."""
    config, architecture = job.config, job.model.config
    tokens = [job.tokens(step) for step in range(len(job.batches))]
    shape = {
        "T": int(statistics.median(tokens)),
        "Q": job.queriers(),
        "E": job.model.qar.num_experts,
        "R": config.expert_rank,
        "H": architecture.hidden_size,
        "I": architecture.intermediate_size,
    }
    times = {name: Timing.of([1e3 * s for s in measured.seconds]) for name, measured in found.items()}
    return [
        {"op": "finetune_step", "provider": name, "pass": "fwd+bwd", **shape, "dtype": config.dtype}
        | {"L": architecture.num_hidden_layers, "ms": asdict(times[name]), "peak_bytes": measured.peak_bytes}
        | {"ratio_to_base": times[name].p50 / times[BASELINE].p50}
        for name, measured in found.items()
    ]


def tokens_per_second(job: Job, measured: Measured) -> float:
    """Real tokens over time, of the timed steps."""
    first = len(job.batches) - len(measured.seconds)
    return sum(job.tokens(step) for step in range(first, len(job.batches))) / sum(measured.seconds)


def speedups(found: dict[str, Measured], name: str) -> Timing:
    """The baseline's time over ``name``'s, step by step, as percentiles."""
    pairs = zip(found[BASELINE].seconds, found[name].seconds, strict=True)
    return Timing.of([base / own for base, own in pairs])


def show(job: Job, found: dict[str, Measured], console: Console) -> None:
    """The table, and the losses of every step."""
    table = Table("way", "real tokens/s", "times as fast, p50 [p20, p80]", "peak of a step")
    for name, measured in found.items():
        ratio = speedups(found, name)
        peak = "not measured" if measured.peak_bytes is None else f"{measured.peak_bytes / 2**20:.0f} MiB"
        spread = f"{ratio.p50:.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}]"
        table.add_row(name, f"{tokens_per_second(job, measured):.0f}", spread, peak)
    console.print(table)
    for name, measured in found.items():
        console.print(f"losses, {name}: " + " ".join(f"{loss:.4f}" for loss in measured.losses))
    console.print(f"largest difference of losses at {len(job.batches)} steps: {check_losses(found):.1e}")


def result(job: Job, found: dict[str, Measured]) -> dict:
    """The result file."""
    machine = describe("cpu") | {"threads": torch.get_num_threads()}
    return {"machine": machine, "versions": versions(), "rows": rows(job, found)}


def config_of(arguments: argparse.Namespace) -> TrainConfig:
    """The paper's recipe, without LoRA dropout: both ways must see the same numbers."""
    return TrainConfig(
        data=arguments.data,
        output_dir="unused",
        model=arguments.model,
        tower="replace",
        experts="per_querier",
        expert_rank=16,
        contrastive_weight=0.5,
        lora_alpha=8.0,
        lora_dropout=0.0,
        learning_rate=2e-4,
        trainable_layers=arguments.trainable_layers,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    formatter = functools.partial(argparse.RawTextHelpFormatter, max_help_position=30)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune_speed", description=__doc__, formatter_class=formatter
    )
    add: Callable[..., argparse.Action] = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--data", default="data/plays/diags_two_role_falstaff_clustered")
    add("--steps", type=int, default=21, help="of each way; the first is not timed")
    add("--batch-size", type=int, default=2, help="windows a step")
    add("--max-tokens", type=int, default=592, help="the limit that the straightforward way pads to")
    add("--trainable-layers", type=int, help="LoRA and experts in the last layers only (default: all)")
    add("--ablation", action="store_true", help="also measure ways between the two")
    add("--out", type=Path, help="result file to write")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        raise UserError(f"--steps: got {arguments.steps}, expected at least 2 (the first is not timed)")
    if arguments.out:
        check_file(arguments.out)
    job = Job(config_of(arguments), arguments.steps)
    found = measure(job, PAIR | (ABLATION if arguments.ablation else {}))
    show(job, found, Console())
    if arguments.out:
        write_atomic(arguments.out, json.dumps(result(job, found), indent=1))


if __name__ == "__main__":
    run(main)
