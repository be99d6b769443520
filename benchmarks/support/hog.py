"""Takes memory beside a worker: argv[1] bytes within argv[2] seconds, held until stdin closes."""

from __future__ import annotations

import sys
import time

STEPS = 40


def main() -> None:
    """Touch a step at a time: pages exist when they are written to."""
    size_bytes, ramp_s = int(sys.argv[1]), float(sys.argv[2])
    held = []
    for _ in range(STEPS):
        held.append(b"x" * (size_bytes // STEPS))
        time.sleep(ramp_s / STEPS)
    sys.stdin.read()


if __name__ == "__main__":
    main()
