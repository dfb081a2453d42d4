"""Print how evenly the gates of a finished study use their experts, from its ``report.json``.

    gatework compare results/gates/gates/study.toml --out runs/gates
    python results/gates/balance.py runs/gates

Means over layers and seeds of what was noted in the second half of the final runs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean


def main(folder: str) -> None:
    """One row for each variant that routes."""
    records = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))["records"]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["phase"] == "final" and record["status"] == "ok":
            for path, value in record["metrics"].items():
                leaf = path.rpartition(".")[2]
                if leaf == "load":
                    found[record["variant"]]["most used"].append(max(value) * len(value))
                    found[record["variant"]]["least used"].append(min(value) * len(value))
                elif not isinstance(value, list):
                    found[record["variant"]][leaf].append(value)
    columns = ["most used", "least used", "max_violation", "dead", "entropy", "chosen", "two_experts"]
    print("| variant | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for variant, numbers in found.items():
        cells = [f"{mean(numbers[column]):.2f}" if numbers[column] else "" for column in columns]
        print(f"| {variant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1])
