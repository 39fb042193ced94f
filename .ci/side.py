# SPDX-License-Identifier: Apache-2.0
"""Time a step and an inference of 8 images, on one process or under a launcher; see the README.

python .ci/side.py vit3d MODEL 0     vit3d
python .ci/side.py libai MODEL 0     the same model in LiBai's formulation
python .ci/side.py timm MODEL N      timm's on PyTorch with N threads; several processes: DDP
"""

import os
import statistics
import sys
import time

import numpy as np

sys.path.append(".")  # for vit3d: run it from the top
kind, name, threads = sys.argv[1:]  # vit3d, libai or timm; the model; threads of PyTorch
size = int(os.environ.get("WORLD_SIZE", 1))
images = np.random.default_rng(0).standard_normal((8 // size, 3, 224, 224)).astype("f4")
labels = np.arange(8 // size)
if kind == "timm":
    import timm
    import torch

    torch.set_num_threads(int(threads))
    model = parallel = timm.create_model(name)
    if size > 1:
        torch.distributed.init_process_group("gloo")
        parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images, labels, no_grad = torch.tensor(images), torch.tensor(labels), torch.no_grad

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(parallel(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def infer():
        return model(images).numpy()
else:
    import vit3d
    from vit3d import batch_to_global, flow, nn, whole

    def patches(self, x):
        x = flow._C.conv2d(x, self.proj.weight, self.proj.bias, stride=[self.patch_size] * 2)
        return x.flatten(2).transpose(1, 2)

    def layer_norm(x, weight, bias, eps):
        x = x - x.mean(-1, keepdim=True)
        return x * flow.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight + bias

    if kind == "libai":  # what its layers are made of off CUDA
        vit3d.PatchEmbedding.forward, vit3d.layer_norm, vit3d.gelu = patches, layer_norm, flow.gelu
    vit3d.dist.setup(size)
    model = vit3d.VisionTransformer(**vit3d.MODELS[name]).train()
    optimizer = flow.optim.SGD(model.parameters(), lr=1e-3)
    images, labels, no_grad = batch_to_global(images, 0), batch_to_global(labels, -1), flow.no_grad

    class Graph(nn.Graph):
        def __init__(self):
            super().__init__()
            self.model = model
            self.add_optimizer(optimizer)

        def build(self, images, labels):
            losses = self.model(images, labels)["losses"]
            losses.backward()
            return losses

    graph = Graph()

    def step():
        return whole(graph(images, labels))

    def infer():
        return whole(model(images)["prediction_scores"])


def median(call):
    seconds = []
    for _ in range(int(os.environ.get("CALLS", 11))):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return f"{1e3 * statistics.median(seconds[3:]):.0f} ms"


train = median(step)
model.eval()
with no_grad():
    inference = median(infer)
if os.environ.get("RANK", "0") == "0":
    print(*sys.argv[1:], f"on {size}: training {train}, inference {inference}", flush=True)
