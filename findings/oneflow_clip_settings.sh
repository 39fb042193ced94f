#!/usr/bin/env bash
# OneFlow 0.9.0, CPU: `clip_grad_max_norm` and `clip_grad_norm_type` in the parameter groups of an
# optimizer.
#
# Expected: the optimizer clips, by one norm over all of its parameters.
# Seen: in eager mode step() clips nothing. Only a call of optimizer.clip_grad() before it does. In
# an nn.Graph each group is clipped by a norm of its own: two groups of norms 50 and 130 come out
# with norm 1 each, so 1.41 together, and their direction has changed.
# Cause: python/oneflow/optim/optimizer.py, clip_grad, which no step() calls; in a graph each group
# becomes an optimizer_conf with a clip_conf of its own.
# Write instead: in eager mode nn.utils.clip_grad_norm_; in a graph all weights in one group.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q oneflow==0.9.0 numpy==1.26.4 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
cat > program.py <<'EOF'
import numpy as np
import oneflow as flow
from oneflow import nn

CLIP = dict(clip_grad_max_norm=1.0, clip_grad_norm_type=2.0)
WHERE = dict(placement=flow.placement("cpu", [0]), sbp=flow.sbp.broadcast)  # global tensors
GRADIENTS = flow.tensor([30.0, 40.0], **WHERE), flow.tensor([50.0, 120.0], **WHERE)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(flow.zeros(2, **WHERE))
        self.b = nn.Parameter(flow.zeros(2, **WHERE))

    def forward(self, to_a, to_b):
        return (self.a * to_a).sum() + (self.b * to_b).sum()


class Graph(nn.Graph):
    def __init__(self, model, optimizer):
        super().__init__()
        self.model = model
        self.add_optimizer(optimizer)

    def build(self, *gradients):
        loss = self.model(*gradients)
        loss.backward()
        return loss


def step_of(mode, groups):
    """The norms of the steps of a and b at a learning rate of 1, and of both together."""
    model = Model()
    params = [[model.a, model.b]] if groups == 1 else [[model.a], [model.b]]
    optimizer = flow.optim.SGD([dict(params=part, **CLIP) for part in params], lr=1.0)
    if mode == "graph":
        Graph(model, optimizer)(*GRADIENTS)
    else:
        model(*GRADIENTS).backward()
        if mode == "eager, clip_grad()":
            optimizer.clip_grad()
        optimizer.step()
    steps = model.a.numpy(), model.b.numpy(), np.concatenate([model.a.numpy(), model.b.numpy()])
    norms = [round(float(np.linalg.norm(step)), 2) for step in steps]
    print(f"{mode}, {groups} group(s): norms of the steps of a, b, both: {norms}")
    return norms


assert step_of("eager", 1) == [50, 130, 139.28]
assert step_of("eager, clip_grad()", 1) == [0.36, 0.93, 1]
assert step_of("graph", 1) == [0.36, 0.93, 1]
assert step_of("graph", 2) == [1, 1, 1.41]
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
timeout 300 "$dir/venv/bin/python" program.py
