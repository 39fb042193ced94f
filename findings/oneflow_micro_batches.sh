#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes: what an nn.Graph makes of set_gradient_accumulation_steps(2),
# where some labels are ignored, as padding and unlabelled patches are.
#
# 1. Expected: a batch gives one gradient, whether two replicas share it or two micro-batches do.
#    Seen: replicas give that of the mean over all labels that count. Micro-batches give the mean of
#    two means: with 3 such labels in one half and 1 in the other, that one weighs as much as 3.
#    Class weights act alike.
# 2. Expected: inputs that are no batch reach each micro-batch whole. Seen: every input of build is
#    cut along its first dimension. A table of two rows gives its row i to micro-batch i, where it
#    is broadcast without a message.
# Write instead: a sum of losses, divided by a number that is the same for all micro-batches; tables
# as buffers of the model.
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


from oneflow import nn

LABELS = np.array([0, 0, 0, -1, 1, -1, -1, -1])  # of 2 classes; -1 is ignored


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(flow.zeros(2).to_global(placement=two, sbp=B))

    def forward(self, labels, table):
        logits = self.logits * (labels * 0 + 1).float().unsqueeze(1)  # (b, 2)
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-1)
        return loss, (logits + 1) * table


class Graph(nn.Graph):
    def __init__(self, model, micro_batches):
        super().__init__()
        self.model = model
        self.add_optimizer(flow.optim.SGD(model.parameters(), lr=1.0))
        self.config.set_gradient_accumulation_steps(micro_batches)

    def build(self, labels, table):
        loss, product = self.model(labels, table)
        loss.backward()
        return product


def step_of(name, micro_batches, sbp):
    model = Model()
    labels = flow.tensor(LABELS).to_global(placement=two, sbp=B).to_global(sbp=sbp)
    table = flow.tensor([[1.0, 1.0], [10.0, 10.0]]).to_global(placement=two, sbp=B)
    if micro_batches == 1:
        table = table[:1]
    product = Graph(model, micro_batches)(labels, table).to_global(sbp=B).to_local().numpy()
    step = model.logits.to_local().numpy().tolist()
    tell(f"{name}: a step of {step}, ones times the table: {product[:, 0].tolist()}")
    return step, product[:, 0].tolist()


step, _ = step_of("whole batch", 1, B)
assert np.allclose(step, [0.25, -0.25])  # 0.5 - 3/4 for class 0
step, _ = step_of("two replicas", 1, S(0))
assert np.allclose(step, [0.25, -0.25])
step, product = step_of("two micro-batches", 2, B)
assert np.allclose(step, [0, 0], atol=1e-5)  # ((0.5 - 1) + (0.5 - 0)) / 2
assert product == [1, 1, 1, 1, 10, 10, 10, 10]
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
