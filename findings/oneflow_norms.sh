#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, two processes: three norms that are not PyTorch's.
#
# 1. The 2-norm of a tensor that the processes share. Expected: norm of (3, 4), one entry on each
#    process, is 5. Seen: 7, the sum of the parts' norms. keepdim=True gives 5. Cause:
#    oneflow/user/ops/sqrt_square_sum_op.cpp, GetSbp: S(i) is P.
# 2. x.norm(1) and x.norm(inf) of a matrix. Expected, as in PyTorch: the norm of its entries as one
#    vector, 10 and 4 for [[1, 2], [3, 4]]. Seen: 6 and 7, the matrix norms (the largest sum of a
#    column, of a row).
# 3. eps in nn.functional.normalize. Expected, as in PyTorch: x is divided by max(norm, eps). Seen:
#    by sqrt(max(norm^2, eps)), so the default of 1e-12 acts below a norm of 1e-6: a vector of norm
#    1e-7 comes out with norm 0.1.
# Write instead: (x * x).sum().sqrt(); x.abs().sum() and x.abs().max(); x / norm.clamp(min=eps).
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


x = share([3, 4], S(0))
norms = [whole(x.norm()), whole(flow.linalg.norm(x)), whole((x * x).sum().sqrt())]
tell("2-norm of (3, 4) by norm, by linalg.norm, by squares:", norms, whole(x.norm(keepdim=True)))
assert norms == [7, 7, 5] and whole(x.norm(keepdim=True)) == [5]

matrix = flow.tensor([[1.0, 2.0], [3.0, 4.0]])  # a local tensor: no process knows of the other
of_matrix = [matrix.norm(1).item(), matrix.norm(float("inf")).item()]
of_vector = [matrix.flatten().norm(1).item(), matrix.flatten().norm(float("inf")).item()]
tell("1-norm and largest entry of a matrix:", of_matrix, "of the same as a vector:", of_vector)
assert of_matrix == [6, 7] and of_vector == [10, 4]

for size in (1e-5, 1e-7):
    small = flow.nn.functional.normalize(flow.tensor([[size, 0.0]]), dim=1)[0, 0].item()
    tell(f"a vector of norm {size}, normalized, has norm {small:.6f}")
    assert abs(small - {1e-5: 1, 1e-7: 0.1}[size]) < 1e-4
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m oneflow.distributed.launch \
    --nproc_per_node 2 --master_port "$port" program.py
