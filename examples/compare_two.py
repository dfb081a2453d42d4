"""Two variants against each other, from Python: is a gated attention better than a plain one on this text, under this budget?"""

import sys
import tempfile
from pathlib import Path

from gatework.bench import compare


def main(tokens: float = 2e5) -> None:
    with tempfile.TemporaryDirectory() as folder:
        comparison = compare(
            baseline="mixer=attention",
            variants={"gated": "mixer=gated_attention"},
            tokens=tokens,
            seeds=2,
            tune=1,
            model={"d_model": 32, "layers": 2, "heads": 2},
            out=Path(folder) / "study",
        )
        print(comparison)
        for record in comparison.records:
            print(record["key"], record["status"], record["score"])
        print(comparison.headline())


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2e5)
