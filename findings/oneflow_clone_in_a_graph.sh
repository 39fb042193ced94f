#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes (one is alike): clone() of a global tensor in an nn.Graph.
#
# 1. Expected: `z = x.clone(); z[:, :1] = 9` changes z and leaves x, as it does in eager mode. Seen:
#    x and z are one tensor in a graph, so x changes, too, in value and in gradient. The same with
#    `x += 1` after `residual = x.clone()`.
# 2. Expected: a tensor that is an attribute of a module, neither parameter nor buffer, can be
#    cloned and filled, `z = self.zeros.clone(); z[:, :1] = x[:, :1]`, and x gets its gradient.
#    Seen: the value is right and x gets no gradient, so weights below it do not train. (With the
#    loss z.sum() it gets one.) A clone of a buffer is right.
# Write instead: x * 1, self.zeros * 1.
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


def clone(x):
    return x.clone()


def times_1(x):
    return x * 1


class Model(nn.Module):
    """The gradient of its weight w shows what of x = w counts in the loss."""

    def __init__(self, change, copy, values):
        super().__init__()
        self.change, self.copy = change, copy
        self.w = nn.Parameter(share(values, B))
        self.register_buffer("buffer", share(np.zeros((4, 2)), B))
        self.zeros = share(np.zeros((4, 2)), B)

    def forward(self, y):
        x = y * self.w
        z = self.change(self, x)
        return z.square().sum() / 2, x * 1, z


class Graph(nn.Graph):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.add_optimizer(flow.optim.SGD(model.parameters(), lr=1.0))

    def build(self, y):
        loss, x, z = self.model(y)
        loss.backward()
        return x, z


def mask(model, x):
    z = model.copy(x)
    z[:, :1] = 9
    return z


def residual(model, x):
    z = model.copy(x)
    x += 1
    return z


def into_attribute(model, x):
    z = model.copy(model.zeros)
    z[:, :1] = x[:, :1]
    return z


def into_buffer(model, x):
    z = model.copy(model.buffer)
    z[:, :1] = x[:, :1]
    return z


values = [[1, 2], [3, 4], [5, 6], [7, 8]]


def run(change, copy, in_graph, sbp):
    """-> the first rows of x and z, and of the weight's gradient"""
    model = Model(change, copy, values)
    y = share(np.ones((4, 2)), sbp)
    if in_graph:
        x, z = Graph(model)(y)
    else:
        loss, x, z = model(y)
        loss.backward()
        flow.optim.SGD(model.parameters(), lr=1.0).step()
    gradient = np.array(values) - np.array(whole(model.w))
    return whole(x)[0], whole(z)[0], gradient[0].tolist()


RIGHT = {
    mask: ([1, 2], [9, 2], [0, 2]),
    residual: ([2, 3], [1, 2], [1, 2]),
    into_attribute: ([1, 2], [1, 0], [1, 0]),
    into_buffer: ([1, 2], [1, 0], [1, 0]),
}
WRONG = {
    mask: ([9, 2], [9, 2], [0, 2]),
    residual: ([2, 3], [2, 3], [2, 3]),
    into_attribute: ([1, 2], [1, 0], [0, 0]),
}
for change, right in RIGHT.items():
    for copy in (clone, times_1):
        for in_graph in (False, True):
            for sbp in (B, S(0)):
                got = run(change, copy, in_graph, sbp)
                mode = "graph" if in_graph else "eager"
                tell(f"{change.__name__}, {copy.__name__}, {mode}, {sbp}: x, z, gradient", *got)
                expected_wrong = in_graph and copy == clone and change in WRONG
                assert got == (WRONG[change] if expected_wrong else right)
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
