"""What one run leaves behind: a JSON record with configuration, versions, hardware and results; files are written
atomically."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from gatework.core.errors import GateworkError


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    import optuna
    import torch

    import gatework

    return {
        "gatework": gatework.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "optuna": optuna.__version__,
    }


def hardware(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads used, device and platform."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": name,
        "platform": platform.platform(),
    }


@functools.cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def digest(content: Any) -> str:
    """A short hash of JSON-able content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that at every moment either the old or the new one is there, whole.

    Raises:
        GateworkError: where the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise GateworkError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        GateworkError: where it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GateworkError(f"there is no {what} at {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise GateworkError(f"the {what} {str(path)!r} cannot be read: {error}") from None


def say(message: str) -> None:
    """One line to the user, beside the output."""
    print(message, file=sys.stderr, flush=True)
