"""What a result depends on beside its inputs: installed packages, and the machine with its way of computing.

None of it may be part of a DVC out. Training keeps it beside its state, and `haplovl publish` with the version.
"""

import platform
import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

CPU_INFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = re.compile(r"(avx|amx|sse4|fma|f16c|asimd|sve|bf16|i8mm)")
"""How the names of instruction sets begin by which numerical libraries choose their kernels."""


def environment() -> dict[str, Any]:
    """The environment lock: Python's version, and `name==version` of every installed distribution."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:  # left-overs of a broken removal have none
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return {"python": platform.python_version(), "packages": [f"{name}=={found[name]}" for name in sorted(found)]}


def machine() -> dict[str, Any]:
    """This machine, by what moves the last bits of a result. What cannot be found out is empty."""
    import torch

    cpu, instructions = _processor()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "libc": "-".join(platform.libc_ver()),
        "cpu": cpu,
        "instructions": instructions,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "gpus": _gpus(),
    }


def _processor() -> tuple[str, list[str]]:
    """The processor's name and its instruction sets for numbers; of several processors the first speaks for all."""
    text = CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.is_file() else ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    flags = facts.get("flags") or facts.get("Features") or ""  # x86, ARM
    return facts.get("model name") or platform.processor(), sorted(filter(_INSTRUCTIONS.match, flags.split()))


def _gpus() -> list[str]:
    """NVIDIA's GPUs with their driver. Asking torch would start CUDA in a process that may not need it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = (line.rpartition(", ") for line in done.stdout.splitlines())
    return [f"{name} (driver {driver})" for name, _, driver in lines if name]  # or it says that there are none


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs between two environments or two machines, one line each: `torch: recorded 2.1, here 2.2`."""
    lines = []
    for name in dict.fromkeys([*recorded, *found]):
        before, after = recorded.get(name), found.get(name)
        if before == after:
            continue
        if name == "packages":
            lines += differences(_versions(before), _versions(after))
        elif name == "instructions":
            lines += _sets(before or [], after or [])
        else:
            lines.append(f"{name}: recorded {_said(before)}, here {_said(after)}")
    return lines


def _versions(packages: list[str] | None) -> dict[str, str]:
    return dict(package.split("==", 1) for package in packages or [])


def _sets(before: list[str], after: list[str]) -> list[str]:
    missing, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    parts = [f"{' '.join(names)} {where}" for names, where in ((missing, "only recorded"), (new, "only here")) if names]
    return [f"instruction sets: {'; '.join(parts)}"]


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) and value else str(value or "none")
