"""Runs of ``finetune`` in processes of their own: several ranks, and ranks that are killed."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from train.cli import run
from train.config import TrainConfig
from train.finetune import LOG, finetune

TIMEOUT = 120
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# the server imports everything once; each rank is then a fork of it, within a fraction of a second
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.finetune", "peft.tuners.lora.model", "torch.utils.tensorboard"])


@dataclass
class Run:
    """Processes of one run, and the file that each writes stdout and stderr to."""

    processes: list
    outputs: list[Path]

    def wait(self) -> list[int]:
        """Exit codes, in order of rank."""
        for process in self.processes:
            process.join(TIMEOUT)
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
        assert not alive, f"still running after {TIMEOUT} s: {self.text()}"
        return [process.exitcode for process in self.processes]

    def text(self, rank: int = 0) -> str:
        """What a rank wrote."""
        return self.outputs[rank].read_text()


def start(config: TrainConfig, ranks: int = 1, resume: bool = False, before: Callable | None = None) -> Run:
    """Start ``finetune`` on that many ranks; ``before`` is called in each of them first."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    folder = Path(config.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    outputs = [folder.parent / f"{folder.name}_rank{rank}.txt" for rank in range(ranks)]
    port = free_port()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, ranks, port, config, resume, before, outputs[rank]))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Run(processes, outputs)


def completed(config: TrainConfig, ranks: int = 1, **options) -> Run:
    """A run that must succeed."""
    started = start(config, ranks, **options)
    assert started.wait() == [0] * ranks, "\n".join(started.text(rank) for rank in range(ranks))
    return started


def log_of(config: TrainConfig) -> list[dict]:
    """The rows of every step, without what depends on the clock."""
    rows = json.loads((Path(config.output_dir) / LOG).read_text())
    return [{key: row[key] for key in row if key != "tokens_per_second"} for row in rows if "loss" in row]


def _rank(rank, ranks, port, config, resume, before, output):
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    if ranks > 1 or config.deepspeed:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if before is not None:
        before(rank)
    run(lambda: finetune(config, resume))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
