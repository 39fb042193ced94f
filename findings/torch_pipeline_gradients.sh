#!/usr/bin/env bash
# PyTorch 2.13.0, CPU, four processes: gradients that a pipeline schedule scales wrongly, without a
# message. One stage is enough to show it, and AdamW hides most of it from the loss curve.
#
# 1. Its own 3D parallelism as one would put it together: tensor parallel layers (DTensor),
#    DistributedDataParallel around them, a schedule around that. Expected: the gradient of the mean
#    loss, however many micro-batches there are. Seen: m times that for m micro-batches. With
#    DTensors or DDP alone it is right. Cause: after the first forward pass DDP leaves the DTensors
#    in the modules as plain attributes, so module.parameters() no longer has them, and scale_grads
#    in torch/distributed/pipelining/stage.py divides what module.parameters() has.
# 2. Rows that the micro-batches do not divide. Expected: the gradient of the mean over all rows, or
#    an error. Seen: 10 rows in 4 micro-batches are 3, 3, 2 and 2, and each mean counts alike, so a
#    row of the last ones counts 1.5 times.
# Write instead: scale_grads=False in the schedule, a loss divided by m, and an optimizer over the
# list of parameters that was taken before the first step; rows that m divides.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON_OF_TORCH:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > program.py <<'EOF'
import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
rank = dist.get_rank()
alone = [dist.new_group([i]) for i in range(4)][rank]  # a pipeline of one stage


def gradient(is_ddp, is_split, micro_batches):
    """The largest entry of the gradient of the first weight, and how many parameters are left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    if is_split:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    if is_ddp:
        model = nn.parallel.DistributedDataParallel(model, device_mesh=mesh["data"])
    weight = next(model.parameters())
    stage = PipelineStage(model, 0, 1, torch.device("cpu"), group=alone)
    schedule = Schedule1F1B(stage, micro_batches, loss_fn=nn.MSELoss())
    x = torch.arange(32.0).reshape(8, 4) / 32
    schedule.step(x, target=torch.zeros(8, 4))
    grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
    return grad.abs().max(), len(list(model.parameters()))


for is_ddp, is_split in itertools.product((False, True), (False, True)):
    one, _ = gradient(is_ddp, is_split, 1)
    four, left = gradient(is_ddp, is_split, 4)
    ratio = round((four / one).item(), 3)
    if rank == 0:
        print(f"DDP {is_ddp}, DTensor {is_split}: 4 micro-batches give {ratio} times the gradient")
        print(f"    of one; module.parameters() has {left} of 2 parameters")
    wrong = is_ddp and is_split
    assert ratio == (4 if wrong else 1) and left == (0 if wrong else 2)

for rows in (8, 10):
    weight = nn.Linear(1, 1, bias=False)
    stage = PipelineStage(weight, 0, 1, torch.device("cpu"), group=alone)
    x = torch.arange(float(rows)).reshape(rows, 1)
    Schedule1F1B(stage, 4, loss_fn=lambda y, target: (y * target).mean()).step(x, target=x**0)
    scaled, true = weight.weight.grad.item(), x.mean().item()
    if rank == 0:
        print(f"{rows} rows in 4 micro-batches: a gradient of {scaled}, true {true}")
    assert (abs(scaled - true) < 1e-5) == (rows == 8)
dist.destroy_process_group()
EOF
export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
free='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
port=$("$dir/venv/bin/python" -c "$free")
timeout 300 "$dir/venv/bin/python" -m torch.distributed.run \
    --nproc_per_node 4 --master_port "$port" program.py
