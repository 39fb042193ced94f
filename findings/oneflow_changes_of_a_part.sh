#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes (one is alike): a part of a global tensor that is changed in
# place.
#
# Expected, as in PyTorch and for local tensors: a slice, a row, a view or a transpose is a view, so
# the whole changes. So it is with `part = x[:, 1:]; part += 1`, with `weight.data[0].zero_()`, with
# `nn.init.zeros_(weight[:2])` for a part of a fused weight, with `for row in weight.data`.
# Seen: the whole stays as it was, without a message, in eager mode and in an nn.Graph. A global
# tensor has no views: each of these is a new tensor.
# Write instead: one assignment to an item of the whole, `x[:, 1:] += 1` or `weight.data[:2] = 0`.
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


def add(x):
    part = x[:, 1:]
    part += 1


def fill(x):
    nn.init.zeros_(x[:2])


def row(x):
    x[0].mul_(0)


def rows(x):
    for one in x:
        one.mul_(0)


def view(x):
    x.view(-1).mul_(0)


def transpose(x):
    x.transpose(0, 1).mul_(0)


def item_add(x):
    x[:, 1:] += 1


def item_fill(x):
    x[:2] = 0


class Graph(nn.Graph):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def build(self, x):
        x = x * 1
        self.change(x)
        return x


values = [[1, 2], [3, 4], [5, 6], [7, 8]]
changed = {item_add: [[1, 3], [3, 5], [5, 7], [7, 9]], item_fill: [[0, 0], [0, 0], [5, 6], [7, 8]]}
for change in (add, fill, row, rows, view, transpose, item_add, item_fill):
    for sbp in (B, S(0)):
        x = share(values, sbp)
        change(x)
        in_eager_mode = whole(x)
        in_graph = whole(Graph(change)(share(values, sbp)))
        tell(f"{change.__name__}, {sbp}: {in_eager_mode}, in a graph {in_graph}")
        assert in_eager_mode == in_graph == changed.get(change, values)

local = flow.tensor(values)
row(local)
tell("row, a local tensor:", local.tolist())
assert local.tolist() == [[0, 0], *values[1:]]
weight = nn.Parameter(share(values, B))
weight.data[0].zero_()
fill(weight.data)
assert whole(weight) == values
weight.data[:2] = 0
tell("weight.data[:2] = 0:", whole(weight))
assert whole(weight) == changed[item_fill]
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
