#!/usr/bin/env bash
# OneFlow 0.9.0, CPU, one process, eager mode: three results that differ from PyTorch's and numpy's.
#
# 1. max of a tensor with a NaN. Expected: NaN. Seen: the largest number beside it. maximum(x, y)
#    has a NaN only from y. So a check of a largest value does not see a NaN. (sort, relu and clamp
#    keep it.)
# 2. The sum of two uint8 or int8 tensors. Expected: it wraps around, 250 + 10 is 4. Seen: it stops
#    at 255 (and at 127 and -128). With a number in place of the second tensor it wraps.
# 3. Gradients at a point where the formula of the derivative divides by zero. Expected: std of
#    equal values 0, prod beside a zero the product of the others, x**0 0. Seen: NaN for all three.
# Write instead: isnan().any() first; int32; x.var() and a clamp before the root, a product by
# slices.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q oneflow==0.9.0 numpy==1.26.4 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
cat > program.py <<'EOF'
import numpy as np
import oneflow as flow

nan = float("nan")
x, y = flow.tensor([nan, 1.0, 3.0]), flow.tensor([1.0, nan, 3.0])
print("max:", x.max().item(), y.max().item(), " maximum:", flow.maximum(x, y).numpy().tolist())
assert x.max().item() == y.max().item() == 3
assert np.array_equal(np.isnan(flow.maximum(x, y).numpy()), [False, True, False])

for dtype, a, b, limit, wrapped in ((flow.uint8, 250, 10, 255, 4), (flow.int8, 100, 50, 127, -106)):
    of_tensors = (flow.tensor([a], dtype=dtype) + flow.tensor([b], dtype=dtype)).item()
    of_number = (flow.tensor([a], dtype=dtype) + b).item()
    print(f"{dtype}: {a} + {b} is {of_tensors}, and {of_number} if {b} is a number")
    assert (of_tensors, of_number) == (limit, wrapped)


def gradient(function, values):
    x = flow.tensor(values).requires_grad_()
    function(x).sum().backward()
    return x.grad.numpy().tolist()


for name, function, values in (
    ("std of 1, 1, 1", lambda x: x.std(), [1.0, 1.0, 1.0]),
    ("prod of 0, 2, 3", lambda x: x.prod(), [0.0, 2.0, 3.0]),
    ("0 to the power of 0", lambda x: x**0.0, [0.0]),
):
    print(f"gradient of {name}: {gradient(function, values)}")
    assert np.isnan(gradient(function, values)[0])
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
timeout 300 "$dir/venv/bin/python" program.py
