"""Time one command in two checkouts, in turn. Prints each pair and the ratios of the medians.

python .ci/pairs.py OLD NEW 5 "" "step 1 " python train.py --data-parallel 2
    five pairs, from the start to the first line that begins with "step 1 "
python .ci/pairs.py OLD NEW 5 "step 10 " "step 30 " python train.py --eager --steps 200
    from one such line to another

It gives seconds on the clock, and those of the processors, which other programs disturb less.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def now(pid):
    """Seconds on the clock, and those that a process and its children have computed for."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            if pid in (int(path.parent.name), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK")


def measure(folder, first, last, command):
    """From the line of output that begins with `first`, or from the start, to that of `last`."""
    before = time.perf_counter(), 0.0
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )
    for line in process.stdout:
        if first and line.startswith(first):
            before = now(process.pid)
        if line.startswith(last):
            after = now(process.pid)
            process.kill()  # its ranks end with it
            process.wait()
            return [b - a for a, b in zip(before, after)]
    sys.exit(f"{folder}: no line begins with {last!r}")


if __name__ == "__main__":
    old, new, pairs, first, last, *command = sys.argv[1:]
    all_pairs = []
    for _ in range(int(pairs)):
        pair = [measure(folder, first, last, command) for folder in (old, new)]
        all_pairs.append(pair)
        (old_clock, old_cpu), (new_clock, new_cpu) = pair
        print(f"clock {old_clock:.2f} {new_clock:.2f}  processors {old_cpu:.2f} {new_cpu:.2f}")
    for i, name in enumerate(("clock", "processors")):
        medians = [statistics.median(pair[side][i] for pair in all_pairs) for side in (0, 1)]
        ratio = medians[1] / medians[0]
        print(f"{name}: medians {medians[0]:.2f} {medians[1]:.2f}, ratio {ratio:.3f}")
