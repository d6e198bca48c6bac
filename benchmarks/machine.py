"""What a result file says about where it was measured: no host name, no path."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "numpy", "qar-kernels")


def describe(device: str) -> dict:
    """The ``machine`` part of a result file."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "name": machine_name(device),
        "device": device,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "date": date.today().isoformat(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "accelerator": properties.name,
            "accelerator_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    else:
        found["threads"] = 1
    return found


def versions() -> dict[str, str]:
    """The ``versions`` part of a result file: what is installed of what is measured."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine_name(device: str) -> str:
    """A short name for file names: the card, or the processor and its number of cores."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match.group(1).replace("/", " ").strip()
    return platform.processor() or platform.machine()
