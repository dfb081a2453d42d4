"""What ``import gatework`` costs beside ``import torch``: fresh processes in turn, medians of their wall-clock times.

``import gatework`` alone loads next to nothing, so the pair that a user feels is measured too: with the parts that a model needs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from _timing import row

REPEATS = 9
SIDES = {
    "torch": "import torch",
    "gatework": "import gatework",
    "parts": "import gatework; from gatework.models import Decoder; gatework.build; gatework.profile",
}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    for code in SIDES.values():
        seconds(code)  # Fills the file cache and the byte-code.
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(REPEATS):
        for name, code in SIDES.items():
            times[name].append(seconds(code))
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, what in (("gatework", "import gatework"), ("parts", "import gatework with models and core")):
        ratio = median[name] / median["torch"]
        row(f"{what} (costs {ratio:.2f} of torch)", median[name], median["torch"], "ours", "import torch", "> 0.77", ratio < 1.3)


if __name__ == "__main__":
    main()
