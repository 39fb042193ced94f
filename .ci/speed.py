"""Time ViT-Ti/16 at 224 x 224, 8 images: a training step with SGD, and inference.

python .ci/speed.py vit3d       in the environment of requirements.txt
python .ci/speed.py timm 1      on 1 thread, in one with timm and torch
"""

import statistics
import sys
import time

SIZE = "vit_tiny_patch16_224"


def median_ms(call):
    """The median of six calls in milliseconds, and the time of the one before them in seconds."""
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return f"{1e3 * statistics.median(seconds[1:]):.0f} ms, first {seconds[0]:.1f} s"


def of_timm(threads):
    import timm
    import torch
    torch.set_num_threads(threads)
    model = timm.create_model(SIZE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(8, 3, 224, 224), torch.arange(8)

    def step():
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    yield median_ms(step)
    model.eval()
    with torch.no_grad():
        yield median_ms(lambda: model(images))


def of_vit3d():
    sys.path.insert(0, ".")
    import numpy as np
    from vit3d import MODELS, VisionTransformer, batch_to_global, flow, full_array, nn
    model = VisionTransformer(**MODELS[SIZE]).train()
    optimizer = flow.optim.SGD(model.parameters(), lr=0.01)
    images = batch_to_global(np.random.randn(8, 3, 224, 224).astype(np.float32), 0)
    labels = batch_to_global(np.arange(8), -1)

    class Step(nn.Graph):
        def __init__(self):
            super().__init__()
            self.model = model
            self.add_optimizer(optimizer)

        def build(self, images, labels):
            losses = self.model(images, labels)["losses"]
            losses.backward()
            return losses

    class Inference(nn.Graph):
        def __init__(self):
            super().__init__()
            self.model = model

        def build(self, images):
            return self.model(images)["prediction_scores"]

    graph = Step()
    yield median_ms(lambda: full_array(graph(images, labels)))
    model.eval()
    graph = Inference()
    yield median_ms(lambda: full_array(graph(images)))


if __name__ == "__main__":
    results = of_timm(int(sys.argv[2])) if sys.argv[1] == "timm" else of_vit3d()
    print(*sys.argv[1:], "step:", next(results), "inference:", next(results))
