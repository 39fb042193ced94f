#!/usr/bin/env bash
# PyTorch 2.13.0, CPU, four processes: random numbers on DTensors that are split over the processes.
#
# Expected: from one seed on all ranks, dropout of a split tensor gives each part a mask of its own,
# and nn.init of a split weight gives each part its own numbers, as DTensor promises and does on
# GPUs. torch.distributed.tensor.rand works.
# Seen: all ranks draw the same: the same mask for each part, and a weight whose parts are copies. A
# warning that the mesh does not support random operators is all that tells it. With other seeds on
# the ranks, the copies of a replicated tensor differ. torch.distributed.tensor.rand ends in an
# AssertionError without text.
# Cause: torch/distributed/tensor/_random.py: is_rng_supported_mesh is false for CPUs, and the
# operators then run on the local tensors as they are.
# Write instead: draw the whole tensor on each rank from one seed, then distribute_tensor it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON_OF_TORCH:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > program.py <<'EOF'
import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

mesh = init_device_mesh("cpu", (4,))
rank = dist.get_rank()


def parts(name, tensor):
    """What each rank holds."""
    gathered = [None] * 4
    local = tensor.to_local().flatten()
    dist.all_gather_object(gathered, [round(value, 2) for value in local.tolist()])
    if rank == 0:
        print(f"{name}:", *gathered)
    return gathered


def are_equal(gathered):
    return all(part == gathered[0] for part in gathered)


torch.manual_seed(0)
ones = distribute_tensor(torch.ones(32), mesh, [Shard(0)])
assert are_equal(parts("dropout of a split tensor", nn.functional.dropout(ones, 0.5)))
weight = distribute_tensor(torch.empty(8, 2), mesh, [Shard(0)])
assert are_equal(parts("init.normal_ of a split weight", nn.init.normal_(weight)))
whole = distribute_tensor(nn.init.normal_(torch.empty(8, 2)), mesh, [Shard(0)])
assert not are_equal(parts("drawn whole, then split", whole))
torch.manual_seed(rank)
copies = distribute_tensor(torch.ones(8), mesh, [Replicate()])
assert not are_equal(parts("dropout of copies, other seeds", nn.functional.dropout(copies, 0.5)))
try:
    dtensor.rand(8, device_mesh=mesh, placements=[Shard(0)])
    error = None
except AssertionError as caught:
    error = caught
if rank == 0:
    print("torch.distributed.tensor.rand:", repr(error))
assert error is not None and str(error) == ""
dist.destroy_process_group()
EOF
export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m torch.distributed.run \
    --nproc_per_node 4 --master_port "$port" program.py
