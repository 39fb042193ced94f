#!/usr/bin/env bash
# PyTorch 2.13.0 and Pillow 12.3.0: bicubic enlargement, as position embeddings of a ViT get it.
#
# Expected: F.interpolate(mode="bicubic", antialias=True) changes reductions alone, as antialias
# does in the bilinear mode. Enlargements have nothing to smooth.
# Seen: an enlargement of 4 x 4 to 7 x 7 differs by 0.1 where values are of size 1, because
# antialias also takes another kernel: a = -0.5 in place of a = -0.75. Pillow's BICUBIC is the
# former to 1e-6. So weights that were interpolated without antialias (DeiT's and MAE's scripts) and
# with it (timm) differ.
# Write instead: antialias=True, or Pillow on float planes (mode F), where timm's numbers are
# wanted.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON_OF_TORCH:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 pillow==12.3.0
cat > program.py <<'EOF'
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

grid = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
impulse = np.zeros((9, 9), np.float32)
impulse[4, 4] = 1


def enlarged(plane, size, mode, antialias):
    tensor = torch.tensor(plane)[None, None]
    return interpolate(tensor, size=(size, size), mode=mode, antialias=antialias)[0, 0].numpy()


def difference(a, b):
    return float(np.abs(a - b).max())


plain, smooth = (enlarged(grid, 7, "bicubic", antialias) for antialias in (False, True))
pillow = np.asarray(Image.fromarray(grid).resize((7, 7), Image.BICUBIC))
print(f"bicubic, with and without antialias: {difference(smooth, plain):.3f}")
print(f"bicubic, Pillow and with antialias: {difference(smooth, pillow):.1e}")
assert difference(smooth, plain) > 0.05 and difference(smooth, pillow) < 1e-5
plain, smooth = (enlarged(grid, 7, "bilinear", antialias) for antialias in (False, True))
print(f"bilinear, with and without antialias: {difference(smooth, plain):.1e}")
assert difference(smooth, plain) < 1e-5
for antialias, a in ((False, -0.75), (True, -0.5)):
    # A point that lies 1.25 pixels from the impulse has the kernel's value there.
    kernel = enlarged(impulse, 18, "bicubic", antialias)[8]
    weights = kernel / kernel.sum() * 2  # along one axis, two samples a pixel
    value = a * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4)
    print(f"antialias {antialias}: kernel at 1.25 is {weights[6]:.4f}, for a = {a}: {value:.4f}")
    assert abs(weights[6] - value) < 1e-3
EOF
timeout 300 "$dir/venv/bin/python" program.py
