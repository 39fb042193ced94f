#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes: three ways to a global tensor that says B, "all hold the same",
# while each process holds something else. No error tells it, and a later move to B does nothing.
#
# 1. The running statistics of batch norm, whose batch is split over the processes. Expected: those
#    of the batch, or an error, since they are B. Seen: each process normalizes by its own rows and
#    keeps its own statistics, as PyTorch's BatchNorm does under DDP, but under the name of B.
# 2. flow.randperm with sbp B, when the processes have drawn a different number of times before.
#    Expected: flow.rand with sbp B is the same on all processes then, and so is randperm. Seen: two
#    different permutations. With S(0) the parts are no permutation together.
# 3. A local tensor that is changed after to_global(sbp=B), such as a buffer that is filled again
#    for each batch. Expected: the global tensor stays, or changes on all processes. Seen: it
#    changes on the first process, whose part is the local tensor's own memory, and not on the
#    second, which was sent a copy.
# Write instead: another norm, or statistics of your own by mean(0), which is right; a permutation
# from numpy and one seed; to_global of a clone.
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


def tell(*words, **how):
    if rank == 0:
        print(*words, **how, flush=True)


from oneflow import nn

norm = nn.BatchNorm1d(1, momentum=1.0).to_global(placement=two, sbp=B)
x = flow.tensor([[1.0 + 10 * rank], [3.0 + 10 * rank]]).to_global(placement=two, sbp=S(0))
norm(x)
mean, true_mean = norm.running_mean, x.mean(0).to_global(sbp=B)
assert mean.sbp == true_mean.sbp == (B,)
tell("batch norm:", mean.sbp)
held = mean.to_local().item(), true_mean.to_local().item()
print(f"rank {rank}: running mean {held[0]}, mean(0) {held[1]}\n", end="", flush=True)
assert held == ([2, 12][rank], 7)

if rank == 1:
    flow.rand(1)  # this rank has drawn once more
gathered = {}
for name, draw in (("rand", flow.rand), ("randperm", flow.randperm)):
    local = draw(16, placement=two, sbp=B).to_local().numpy().astype(np.float32)
    both = flow.tensor(local[None]).to_global(placement=two, sbp=S(0)).numpy()  # (2, 16)
    gathered[name] = both.tolist()
    tell(f"{name} as B:", *both[:, :8].astype(str).tolist(), sep="\n    ")
assert gathered["rand"][0] == gathered["rand"][1]
assert gathered["randperm"][0] != gathered["randperm"][1]
split = flow.randperm(16, placement=two, sbp=S(0)).numpy()
tell("randperm as S(0):", split.tolist())
assert len(set(split.tolist())) < 16

local = flow.tensor([1.0, 2.0])
shared = local.to_global(placement=two, sbp=B)
local[0] = 50.0
held = shared.to_local().numpy().tolist()
print(f"after a change of the local tensor rank {rank} holds {held}\n", end="", flush=True)
assert held == [[50, 2], [1, 2]][rank]
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
