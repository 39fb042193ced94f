#!/usr/bin/env bash
# OneFlow 0.9.0, flowvision 0.2.1, numpy 1.23.5: two forms of regularization that do something else
# than timm's and torchvision's of the same name.
#
# 1. flowvision.data.Mixup(mode="elem"). Expected: each image is mixed with its partner, as its
#    label is. Seen: labels are mixed and images are not: flowvision/data/mixup.py, _mix_elem, adds
#    two parts of the same image. With numpy from 1.24 on, "elem" and "pair" end in an
#    AttributeError (np.bool). "batch" and "pair" mix right.
# 2. flowvision.layers.StochasticDepth(p). Expected: what is kept is divided by 1 - p, so that the
#    mean stays. Seen: it is not, and the mean is 1 - p of what it is in eval mode:
#    stochastic_depth.py calls noise.div, which is not in place, and drops the result. (DropPath,
#    beside it, scales.)
# Write instead: mode="batch"; DropPath.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q oneflow==0.9.0 flowvision==0.2.1 numpy==1.23.5 pillow==12.3.0 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
cat > program.py <<'EOF'
import numpy as np
import oneflow as flow
from flowvision.data import Mixup
from flowvision.layers import DropPath, StochasticDepth

for mode in ("batch", "pair", "elem"):
    np.random.seed(0)
    images = flow.tensor([[0.0], [1.0]]).reshape(2, 1, 1, 1)  # image i is i everywhere
    mixup = Mixup(mixup_alpha=1.0, mode=mode, label_smoothing=0.0, num_classes=2)
    mixed, labels = mixup(images, flow.tensor([0, 1]))
    images, labels = mixed.flatten().numpy().round(3), labels[:, 1].numpy().round(3)
    print(f"Mixup {mode}: images {images.tolist()}, labels {labels.tolist()}")
    assert not np.array_equal(labels, [0, 1])
    assert np.array_equal(images, [0, 1] if mode == "elem" else labels)

for layer, mean in ((StochasticDepth(0.75, "row"), 0.25), (DropPath(0.75), 1)):
    kept = layer.train()(flow.ones(20000, 1)).numpy()
    print(f"{type(layer).__name__}: values {np.unique(kept).tolist()}, mean {kept.mean():.3f}")
    assert abs(kept.mean() - mean) < 0.05
    assert np.array_equal(layer.eval()(flow.ones(4, 1)).numpy(), np.ones((4, 1)))
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
timeout 300 "$dir/venv/bin/python" program.py
