#!/usr/bin/env bash
# OneFlow 0.9.0, CPU: a program that ignores Ctrl-C, and the reader processes of its DataLoader.
#
# A shell starts `COMMAND &` of a script with SIGINT ignored, so that Ctrl-C ends what runs in front
# and nothing else. Child processes inherit that. Expected: the readers of such a program ignore
# SIGINT, too, as a multiprocessing.Process does. Seen: a reader ends at SIGINT, and the program gets
# "DataLoader worker exited unexpectedly" at its next batch, so the run in the background ends.
# Cause: python/oneflow/utils/data/_utils/worker.py sets a handler of its own for SIGINT, whatever
# was there (and asks the kernel for SIGINT when the parent dies, to free shared memory).
# Write instead: DataLoader(..., worker_init_fn=f), where f ignores SIGINT and asks for SIGTERM when
# the parent dies, whose handler frees the memory, too.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q oneflow==0.9.0 numpy==1.26.4 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
cat > program.py <<'EOF'
import ctypes
import multiprocessing
import os
import signal
import time

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `COMMAND &`
import numpy as np
from oneflow.utils.data import DataLoader, Dataset

signal.signal(signal.SIGINT, signal.SIG_IGN)  # the import sets another handler


class Zeros(Dataset):
    def __len__(self):
        return 999

    def __getitem__(self, index):
        return np.zeros(3, np.float32)


def leave_to_the_run(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def is_alive_after_sigint(process):
    os.kill(process.pid, signal.SIGINT)
    process.join(3)
    return process.is_alive()


plain = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
plain.start()
print("a plain child process lives on:", is_alive_after_sigint(plain))
assert plain.is_alive()
plain.kill()
for function, lives in ((leave_to_the_run, True), (None, False)):
    batches = iter(DataLoader(Zeros(), batch_size=2, num_workers=1, worker_init_fn=function))
    next(batches)
    (reader,) = batches._workers
    print("a reader lives on:", is_alive_after_sigint(reader))
    assert reader.is_alive() == lives
    try:
        for _ in range(9):
            next(batches)
        error = None
    except RuntimeError as problem:
        error = str(problem)
    print("the next batches:", error)
    assert (error is None) == lives
os._exit(0)
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
timeout 300 "$dir/venv/bin/python" program.py
