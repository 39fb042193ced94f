#!/usr/bin/env bash
# OneFlow 0.9.0 and PyTorch 2.13.0, CPU, four processes: 5, 6 and 7 rows that are split over them.
#
# Expected: S(0) and Shard(0) are two names of one thing, so local parts can go from one to the
# other, as they can where the processes divide the rows.
# Seen: OneFlow gives the first processes one row more each (2, 1, 1, 1). DTensor gives all the
# same number, rounded up, until nothing is left (2, 2, 1, 0). 7 rows lie alike.
# Causes: oneflow/core/common/balanced_splitter.h; torch.chunk, which DTensor's Shard follows.
# Write instead: rows that the processes divide, or the whole tensor between the two.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/oneflow"
"$dir/oneflow/bin/pip" install -q oneflow==0.9.0 numpy==1.26.4 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
"${PYTHON_OF_TORCH:-python3}" -m venv "$dir/torch"
"$dir/torch/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > of_oneflow.py <<'EOF'
import oneflow as flow

mesh = flow.placement("cpu", [0, 1, 2, 3])
for rows in (5, 6, 7):
    whole = flow.zeros(rows, placement=mesh, sbp=flow.sbp.broadcast)
    mine = whole.to_global(sbp=flow.sbp.split(0)).to_local().shape[0]
    sizes = flow.tensor([mine]).to_global(placement=mesh, sbp=flow.sbp.split(0)).numpy().tolist()
    if flow.env.get_rank() == 0:
        print(f"OneFlow: {rows} rows as {sizes}", flush=True)
    assert sizes == {5: [2, 1, 1, 1], 6: [2, 2, 1, 1], 7: [2, 2, 2, 1]}[rows]
EOF
cat > of_torch.py <<'EOF'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

mesh = init_device_mesh("cpu", (4,))
for rows in (5, 6, 7):
    mine = len(distribute_tensor(torch.zeros(rows), mesh, [Shard(0)]).to_local())
    sizes = [None] * 4
    dist.all_gather_object(sizes, mine)
    if dist.get_rank() == 0:
        print(f"DTensor: {rows} rows as {sizes}", flush=True)
    assert sizes == {5: [2, 2, 1, 0], 6: [2, 2, 2, 0], 7: [2, 2, 2, 1]}[rows]
dist.destroy_process_group()
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
for name in oneflow torch; do
    module=$name.distributed.launch
    [ $name = torch ] && module=torch.distributed.run
    timeout 300 "$dir/$name/bin/python" -m $module --nproc_per_node 4 \
        --master_port "$("$dir/$name/bin/python" -c "$free")" of_$name.py
done
