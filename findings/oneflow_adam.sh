#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes (one is alike): Adam and AdamW.
#
# 1. A weight that is frozen at first and then trained by the same optimizer, eager mode. Expected,
#    as in PyTorch: its bias correction counts its own steps, so its first step is one learning rate
#    long. Seen: the correction counts the optimizer's steps. Unfrozen after 10 steps, the weight's
#    first three steps are 0.48, 0.65 and 0.75 rates long, after 1,000 steps 2.52, 3.38 and 3.94.
#    Cause: python/oneflow/nn/optimizer/adam.py and adamw.py: one `step` for all parameters.
# 2. The weight decay of AdamW(parameters). Expected, as in PyTorch: 0.01. Seen: 0, in eager mode
#    and in an nn.Graph.
# Write instead: a new optimizer when weights are unfrozen; weight_decay=0.01.
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


class Model(nn.Module):
    """All gradients are 1, so a step of Adam is one learning rate long."""

    def __init__(self):
        super().__init__()
        self.late = nn.Parameter(share([[1, 1], [1, 1]], B))
        self.early = nn.Parameter(share([[1, 1], [1, 1]], B))

    def forward(self, x):
        return ((self.late + self.early) * x[:, None]).mean(0).sum()


class Graph(nn.Graph):
    def __init__(self, model, optimizer):
        super().__init__()
        self.model = model
        self.add_optimizer(optimizer)

    def build(self, x):
        loss = self.model(x)
        loss.backward()
        return loss


def step(model, optimizer, x):
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


x = share(np.ones((2, 2)), S(0))


def late_steps(kind, frozen_for, new_optimizer):
    """The first three steps of the late weight, in learning rates."""
    model = Model()
    model.late.requires_grad_(False)
    optimizer = kind(model.parameters(), lr=0.001)
    for _ in range(frozen_for):
        step(model, optimizer, x)
    model.late.requires_grad_(True)
    if new_optimizer:
        optimizer = kind(model.parameters(), lr=0.001)
    seen = [whole(model.late)[0][0]]
    for _ in range(3):
        step(model, optimizer, x)
        seen.append(whole(model.late)[0][0])
    return (-np.diff(seen) / 0.001).round(2).tolist()


for kind in (flow.optim.Adam, flow.optim.AdamW):
    for frozen_for, wrong in ((10, [0.48, 0.65, 0.75]), (1000, [2.52, 3.38, 3.94])):
        same, new = late_steps(kind, frozen_for, False), late_steps(kind, frozen_for, True)
        tell(f"{kind.__name__}, unfrozen after {frozen_for}: {same}, a new optimizer: {new}")
        assert np.allclose(same, wrong, atol=0.02) and np.allclose(new, 1, atol=0.02)

for how, expected in (({}, 0.9), (dict(weight_decay=0.01), 0.9 - 0.001)):
    for in_graph in (False, True):
        model = Model()
        optimizer = flow.optim.AdamW(model.parameters(), lr=0.1, **how)
        if in_graph:
            Graph(model, optimizer)(x)
        else:
            step(model, optimizer, x)
        got = whole(model.late)[0][0]
        tell(f"AdamW, {how}, {'graph' if in_graph else 'eager'}: 1.0 becomes {got:.4f}")
        assert abs(got - expected) < 1e-5
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
