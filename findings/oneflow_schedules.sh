#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes (one is alike): a warm-up and then a cosine, by two schedulers
# in a row.
#
# Expected, as in PyTorch: SequentialLR(optimizer, [warmup, cosine], [4]) starts the cosine at its
# own step 0 after 4 steps, so the rate is at its peak there.
# Seen: the cosine starts at its step 4, in eager mode and in an nn.Graph: with 8 steps it falls to
# half of the peak at once, is 0 at step 8, and rises again. WarmUpLR over CosineDecayLR is alike:
# it warms up to where the cosine is by then, half of the peak.
# Cause: interval_rescaling and warmup_prefix are False by default.
# Write instead: SequentialLR(optimizer, [warmup, cosine], [4], interval_rescaling=True);
# WarmUpLR(cosine, warmup_prefix=True).
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
from oneflow import nn

# An exception ends its process at once: the engine's own end would wait for the other process.
sys.excepthook = lambda *error: (traceback.print_exception(*error), os._exit(1))
B, S = flow.sbp.broadcast, flow.sbp.split
rank, two = flow.env.get_rank(), flow.placement("cpu", [0, 1])


def tell(*words):
    if rank == 0:
        print(*words, flush=True)


def share(values, sbp):
    whole = flow.tensor(np.array(values, np.float32)).to_global(placement=two, sbp=B)
    return whole.to_global(sbp=sbp)


def whole(tensor):
    return tensor.to_global(sbp=B).to_local().numpy().tolist()


from oneflow.optim.lr_scheduler import CosineAnnealingLR, CosineDecayLR
from oneflow.optim.lr_scheduler import LinearLR, SequentialLR, WarmUpLR


class Model(nn.Module):
    """The gradient of its weight is 1, so the weight's steps are the rates."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(share([0, 0], B))

    def forward(self, x):
        return (self.w * x).mean(0).sum()


class Graph(nn.Graph):
    def __init__(self, model, optimizer, scheduler):
        super().__init__()
        self.model = model
        self.add_optimizer(optimizer, lr_sch=scheduler)

    def build(self, x):
        loss = self.model(x)
        loss.backward()
        return loss


def in_a_row(optimizer, **how):
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 8)], [4], **how)


def over_cosine(optimizer, **how):
    return WarmUpLR(CosineDecayLR(optimizer, 8), 0.1, 4, "linear", **how)


def rates(make, in_graph, **how):
    model, x = Model(), share(np.ones((2, 2)), S(0))
    optimizer = flow.optim.SGD(model.parameters(), lr=1.0)
    scheduler = make(optimizer, **how)
    graph = Graph(model, optimizer, scheduler)
    weights = [0.0]
    for _ in range(10):
        if in_graph:
            graph(x)
        else:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        weights.append(-whole(model.w)[0])
    return np.diff(weights).round(2).tolist()


right = [0.1, 0.33, 0.55, 0.78, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31]
sequential = [0.1, 0.33, 0.55, 0.78, 0.5, 0.31, 0.15, 0.04, 0.0, 0.04]
overlapping = [0.1, 0.2, 0.3, 0.4, 0.5, 0.31, 0.15, 0.04, 0.0, 0.0]
cases = (in_a_row, {}, sequential), (in_a_row, dict(interval_rescaling=True), right), \
    (over_cosine, {}, overlapping), (over_cosine, dict(warmup_prefix=True), right)
for make, how, expected in cases:
    for in_graph in (False, True):
        got = rates(make, in_graph, **how)
        tell(f"{make.__name__}, {how}, {'graph' if in_graph else 'eager'}:", *got)
        assert np.allclose(got, expected, atol=0.011)
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
