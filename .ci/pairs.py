"""Time one command in two checkouts, in turn. Prints each pair and the ratio of the medians.

python .ci/pairs.py OLD NEW 5 "" "step 1 " python train.py --data-parallel 2
    five pairs, from the start to the first line that begins with "step 1 "
python .ci/pairs.py OLD NEW 5 "step 10 " "step 30 " python train.py --eager
    from one such line to another
"""

import os
import statistics
import subprocess
import sys
import time


def seconds(folder, first, last, command):
    """From the line of output that begins with `first`, or from the start, to that of `last`."""
    start = time.perf_counter()
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )
    for line in process.stdout:
        if first and line.startswith(first):
            start = time.perf_counter()
        if line.startswith(last):
            end = time.perf_counter()
            process.kill()  # its ranks end with it
            process.wait()
            return end - start
    sys.exit(f"{folder}: no line begins with {last!r}")


if __name__ == "__main__":
    old, new, pairs, first, last, *command = sys.argv[1:]
    all_pairs = []
    for _ in range(int(pairs)):
        pair = [seconds(folder, first, last, command) for folder in (old, new)]
        all_pairs.append(pair)
        print(f"{pair[0]:.2f} {pair[1]:.2f}", flush=True)
    medians = [statistics.median(times) for times in zip(*all_pairs)]
    print(f"medians {medians[0]:.2f} {medians[1]:.2f}, ratio {medians[1] / medians[0]:.3f}")
