"""Ways to train that :mod:`benchmarks.finetune_speed` compares: their model, batches and one step of each.

B windows, S tokens.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.straightforward import IGNORE, Straightforward
from train.base_model import load_base
from train.batches import Collator, PackingCollator, Windows, use_packed_attention
from train.config import TrainConfig
from train.data.encode import encode_all
from train.data.mqdialog import load_mqdialog
from train.errors import UserError
from train.trained import build

BASELINE, OURS = "straightforward", "qar"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        layout: how windows become a batch: ``"packed"``, or padded to the ``"longest"`` of the batch or to
            the ``"limit"`` of all windows.
        straightforward: by :class:`Straightforward` and not by this project's model.
        skip_logits: logits at labelled positions only.
    """

    layout: str
    straightforward: bool = False
    skip_logits: bool = False


PAIR = {BASELINE: Way("limit", straightforward=True), OURS: Way("packed", skip_logits=True)}
ABLATION = {
    "straightforward-longest": Way("longest", straightforward=True),
    "qar-limit": Way("limit", skip_logits=True),
    "qar-longest": Way("longest", skip_logits=True),
    "qar-all-logits": Way("packed"),
}


class Job:
    """The model, the data and their order, the same for every way.

    Args:
        config: ``model``, ``data``, ``batch_size``, ``max_tokens`` and the recipe.
        steps: batches to train on.
    """

    def __init__(self, config: TrainConfig, steps: int) -> None:
        data = load_mqdialog(Path(config.data))
        model, self.tokenizer = load_base(config.model)
        transformers.set_seed(config.seed)  # behind the model, whose first conversion draws numbers
        encoded = encode_all(
            data.train,
            self.tokenizer,
            max_tokens=config.max_tokens,
            names_in_prompt=config.names_in_prompt,
        )
        self.config, self.windows = config, Windows(encoded)
        needed = steps * config.batch_size
        if len(encoded) < needed:
            raise UserError(f"--steps: got {steps}, but {len(encoded)} windows give fewer batches")
        self.batches = torch.randperm(len(encoded))[:needed].view(steps, -1).tolist()
        build(model, config, tuple(data.queriers), data.num_clusters)
        self.model: PreTrainedModel = model.train()

    def tokens(self, step: int) -> int:
        """Real tokens of a batch."""
        return sum(self.windows.lengths[index] for index in self.batches[step])

    def queriers(self) -> int:
        """How many queriers a batch has, in the median."""
        windows = self.windows.windows
        present = [len({windows[index].querier_id for index in batch}) for batch in self.batches]
        return int(statistics.median(present))


class Training:
    """One way's own copy of the model, and its optimizer."""

    def __init__(self, job: Job, way: Way) -> None:
        self.job, self.way = job, way
        self.model = Straightforward(job.model) if way.straightforward else copy.deepcopy(job.model)
        if way.layout == "packed":
            use_packed_attention(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        config = job.config
        self.optimizer = torch.optim.AdamW(
            trained, config.learning_rate, (0.9, config.adam_beta2), weight_decay=config.weight_decay
        )

    def step(self, step: int) -> float:
        """Collate, forward, backward, update: the loss."""
        batch = self._collate([self.job.windows[index] for index in self.job.batches[step]])
        self.optimizer.zero_grad()
        if self.way.straightforward:
            loss = self.model(**batch)
        else:
            loss = self.model(**batch, use_cache=False, skip_logits=self.way.skip_logits).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _collate(self, items: list[dict]) -> Batch:
        if self.way.layout == "packed":
            return PackingCollator()(items)
        padding = self.job.tokenizer.pad_token_id
        batch = Collator(padding)(items)
        if self.way.layout == "longest":
            return batch
        missing = self.job.config.max_tokens - batch["input_ids"].shape[1]
        fills = {"input_ids": padding, "labels": IGNORE, "attention_mask": 0, "response_mask": 0}
        return batch | {name: F.pad(batch[name], (0, missing), value=fill) for name, fill in fills.items()}


def peak_bytes(config: TrainConfig, way: Way) -> int | None:
    """Memory that one step takes above the loaded model (Linux; elsewhere None), in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_here, config, way, torch.get_num_threads()).result()


def _peak_here(config: TrainConfig, way: Way, threads: int) -> int | None:
    torch.set_num_threads(threads)
    training = Training(Job(config, 1), way)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        return None
    before = _resident("VmRSS")
    training.step(0)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
