#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes: two gradients that are wrong where the loss is right.
#
# 1. A table t that both processes hold (B), indexed by labels that they share (S(0)), as labels are
#    on replicas. Expected: the gradient of t[labels].sum() counts how often each row is read. Seen:
#    each process counts its own labels alone and calls the result B, "a copy of the whole". No
#    later move repairs that, since B to B is nothing, so the copies of a weight drift apart.
#    gather_nd is alike, gather is right. Cause: oneflow/user/ops/nd_index_slice_ops.cpp,
#    ScatterNdLikeOp::GetSbp: indices S(0) give B, where a sum of parts is P.
# 2. stack along a new last dimension, as rotary position embeddings do it, of tensors of two or
#    more dimensions that are shared by rows. Expected: the slices of the incoming gradient. Seen,
#    in eager mode: the right numbers at wrong places. Cause: not found; the rules are in
#    oneflow/user/ops/stack_op.cpp, StackGradOp::GetSbp. Each process has the numbers of a column,
#    as if the operator had been run on columns.
# Write instead: gather, index_select, nn.functional.embedding or cross_entropy; cat of unsqueeze.
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


labels = flow.tensor([[0, 1], [1, 3]][rank]).to_global(placement=two, sbp=S(0))  # 0, 1, 1, 3


def counted(read):
    table = share(np.zeros(4), B).requires_grad_()
    read(table).sum().backward()
    return table.grad


for name, read in (
    ("t[labels]", lambda table: table[labels]),
    ("gather_nd", lambda table: flow.gather_nd(table, labels.unsqueeze(1))),
):
    grad = counted(read)
    local = grad.to_local().numpy().tolist()
    print(f"{name}: rank {rank} has {local} of {grad.sbp}\n", end="", flush=True)
    assert grad.sbp == (B,) and local == [[1, 1, 0, 0], [0, 1, 0, 1]][rank]
gradient = whole(counted(lambda table: flow.gather(table, 0, labels)))
tell("gather:", gradient)
assert gradient == [1, 2, 0, 1]

weights = np.arange(16).reshape(4, 2, 2)  # so the gradient of a is 0, 2, 4 ... 14


def gradient_of_a(join):
    a, b = (share(np.ones((4, 2)), S(0)).requires_grad_() for _ in range(2))
    (join(a, b) * share(weights, S(0))).sum().backward()
    return whole(a.grad)


stacked = gradient_of_a(lambda a, b: flow.stack((a, b), -1))
joined = gradient_of_a(lambda a, b: flow.cat((a.unsqueeze(-1), b.unsqueeze(-1)), -1))
tell("stack:", stacked)
tell("cat:  ", joined)
assert joined == [[0, 2], [4, 6], [8, 10], [12, 14]]
assert stacked == [[0, 4], [8, 12], [2, 6], [10, 14]]
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
