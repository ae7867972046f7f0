"""Wall time and peak memory of `altsight demo` in a fresh folder: `python -m bench.demo`."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time


def main() -> None:
    """Run the demo and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "altsight", "demo", "--out", f"{folder}/demo"], check=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"from `altsight demo` to the report: {seconds:.0f} s; largest process: {peak:.2f} GB resident")


if __name__ == "__main__":
    main()
