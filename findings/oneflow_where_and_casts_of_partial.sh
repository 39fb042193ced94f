#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes: what happens to a sum over a dimension that the processes
# share. Such a sum is P: each process has a summand of it.
#
# Expected: where(n > 0, n, 1.0) of n = 0 is 1, and casts of a sum are casts of the sum.
# Seen: where gives 2 (the world size), since each process takes 1.0 as its summand. int() of 0.6 +
# 0.6 is 0, since each summand is cut. bool() of 0.5 - 0.5 is true, since each summand is.
# Comparisons (n > 0) are right: the engine adds up the summands first.
# Cause: oneflow/user/ops/where_op.cpp and cast_op.cpp: their GetSbp takes P for the input and for
# the output.
# Write instead: n.to_global(sbp=flow.sbp.broadcast) before it, or n.clamp(min=1.0).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q oneflow==0.9.0 numpy==1.26.4 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
cat > program.py <<'EOF'
import os
import sys
import traceback

import numpy as np
import oneflow as flow

# An exception ends its process at once: the engine's own end would wait for the other process.
sys.excepthook = lambda *error: (traceback.print_exception(*error), os._exit(1))
B, P, S = flow.sbp.broadcast, flow.sbp.partial_sum, flow.sbp.split
rank, two = flow.env.get_rank(), flow.placement("cpu", [0, 1])


def tell(*words):
    if rank == 0:
        print(*words, flush=True)

def share(values, sbp):
    whole = flow.tensor(np.array(values, np.float32)).to_global(placement=two, sbp=B)
    return whole.to_global(sbp=sbp)


def whole(tensor):
    return tensor.to_global(sbp=B).to_local().numpy().tolist()


def total(first, second):
    n = share([first, second], S(0)).sum()
    assert n.sbp == (P,)
    return n


cases = (
    ("where(n > 0, n, 1.0) of 0 + 0", total(0, 0), lambda n: flow.where(n > 0, n, 1.0), 2, 1),
    ("int() of 0.6 + 0.6", total(0.6, 0.6), lambda n: n.int(), 0, 1),
    ("long() of 0.6 + 0.6", total(0.6, 0.6), lambda n: n.long(), 0, 1),
    ("bool() of 0.5 - 0.5", total(0.5, -0.5), lambda n: n.bool().int() > 0, True, False),
    ("n > 0 of 0.5 - 0.5", total(0.5, -0.5), lambda n: n > 0, False, False),
)
for name, n, change, wrong, right in cases:
    of_partial, of_whole = whole(change(n)), whole(change(n.to_global(sbp=B)))
    tell(f"{name}: {of_partial}, after a move to B: {of_whole}")
    assert (of_partial, of_whole) == (wrong, right)
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
