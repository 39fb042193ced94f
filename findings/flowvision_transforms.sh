#!/usr/bin/env bash
# OneFlow 0.9.0, flowvision 0.2.1: transforms that torchvision has under the same names.
#
# 1. Grayscale and RandomGrayscale of a Pillow image. Expected: a grey image. Seen: None, so the
#    next transform of the chain fails, one time in ten with the usual probability of 0.1: the
#    function rgb_to_grayscale in flowvision/transforms/functional.py lacks a return for Pillow
#    images.
# 2. adjust_hue of a float tensor by a negative factor. Expected: what it gives for the Pillow
#    image, and the inverse of the positive factor. Seen: colours far away, since OneFlow's x % 1.0
#    has the sign of x (as C's fmod, not as Python's), and a hue below 0 is none.
# Write instead: image.convert("L").convert("RGB"); ColorJitter on Pillow images, before ToTensor.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q oneflow==0.9.0 flowvision==0.2.1 numpy==1.26.4 pillow==12.3.0 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
cat > program.py <<'EOF'
import numpy as np
import oneflow as flow
from flowvision import transforms
from flowvision.transforms import functional
from PIL import Image

image = Image.fromarray(np.array([[[200, 60, 40], [40, 200, 60]]], np.uint8))
for name, transform in (
    ("Grayscale(3)", transforms.Grayscale(3)),
    ("RandomGrayscale(1.0)", transforms.RandomGrayscale(1.0)),
):
    print(f"{name}: {transform(image)}")
    assert transform(image) is None

tensor = transforms.ToTensor()(image)
print("-0.3 % 1.0 is", (flow.tensor([-0.3]) % 1.0).item())
assert abs((flow.tensor([-0.3]) % 1.0).item() + 0.3) < 1e-6
for factor, is_right in ((0.25, True), (-0.25, False)):
    by_pillow = np.asarray(functional.adjust_hue(image, factor))
    by_tensor = (functional.adjust_hue(tensor, factor).numpy() * 255).round().astype(int)
    by_tensor = by_tensor.transpose(1, 2, 0)
    print(f"adjust_hue by {factor}: Pillow {by_pillow.tolist()}, tensor {by_tensor.tolist()}")
    assert (np.abs(by_pillow - by_tensor).max() < 12) == is_right
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
timeout 300 "$dir/venv/bin/python" program.py
