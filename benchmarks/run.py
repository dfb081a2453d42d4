"""Run every benchmark of this folder, one after the other, and print their ratios again as one table at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Run the benchmarks named on the command line (all by default); the exit code is 1 if one of them failed to run."""
    here = Path(__file__).parent
    wanted = sys.argv[1:]
    scripts = [p for p in sorted(here.glob("*.py")) if not p.name.startswith("_") and p.name != "run.py"]
    scripts = [p for p in scripts if not wanted or p.stem in wanted]
    failed = []
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as collected:
        for script in scripts:
            print(f"\n== {script.stem}", flush=True)
            environment = os.environ | {"GATEWORK_BENCH_JSON": collected.name}
            if subprocess.run([sys.executable, str(script)], env=environment, check=False).returncode:
                failed.append(script.stem)
        rows = [json.loads(line) for line in collected.read().splitlines()]
    print("\n== all ratios (theirs / ours; above 1: ours is faster)")
    for row in rows:
        verdict = {True: "ok", False: "NOT REACHED", None: ""}[row["ok"]]
        print(f"{row['what']:<60} {row['ratio']:7.2f}  want {row['want'] or '-':<10} {verdict}")
    for name in failed:
        print(f"{name} did not run to its end", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
