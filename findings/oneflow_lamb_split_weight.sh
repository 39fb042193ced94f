#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes, eager mode: LAMB and a weight that the processes share (S(0)),
# as tensor parallelism or ZeRO share it.
#
# Expected: the weight trains as its copy on both processes (B) does.
# Seen: it never moves. No message comes, and other weights of the same model train.
# Cause: oneflow/user/ops/model_update_ops.cpp, LambUpdateOp::GetSbp knows B alone (it needs the
# norm of the whole weight). So the engine gathers a copy, updates that, and drops it.
# Write instead: AdamW, SGD or another: their updates are elementwise, and right for each sbp.
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


from oneflow import nn


def trained(optimizer, sbp):
    weight = nn.Parameter(share(np.ones((4, 2)), sbp))
    optimizer = optimizer([weight], lr=0.1)
    for _ in range(3):
        (weight * weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return np.array(whole(weight))


for name in ("LAMB", "AdamW"):
    kind = getattr(flow.optim, name)
    copied, shared = trained(kind, B), trained(kind, S(0))
    tell(f"{name}: 1.0 after three steps is {copied[0, 0]:.4f} as B, {shared[0, 0]:.4f} as S(0)")
    assert np.abs(copied - 1).min() > 0.1
    if name == "LAMB":
        assert np.all(shared == 1)
    else:
        assert np.allclose(shared, copied)
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
