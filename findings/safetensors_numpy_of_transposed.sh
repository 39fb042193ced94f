#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.2.6: safetensors.numpy.save of an array that is not in C order, such as
# a transposed weight.
#
# Expected: what 0.7.0 does (the array comes back as it was), or the error that safetensors.torch
# raises for such a tensor.
# Seen: the shape is kept and the numbers come back in memory order. No message.
# Write instead: np.ascontiguousarray(array) for each array before it is saved.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
cat > program.py <<'EOF'
import numpy as np
import safetensors
from safetensors.numpy import load, save

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
arrays = {"transposed": weight.T, "Fortran": np.asfortranarray(weight), "rows": weight[1:]}
is_right = {name: np.array_equal(load(save({name: a}))[name], a) for name, a in arrays.items()}
old = safetensors.__version__ == "0.7.0"
print(f"safetensors {safetensors.__version__}: right are {is_right}")
print("    transposed comes back as", load(save({"w": weight.T}))["w"].tolist())
assert is_right == {"transposed": old, "Fortran": old, "rows": True}
copy = np.ascontiguousarray(weight.T)
assert np.array_equal(load(save({"w": copy}))["w"], weight.T)
EOF
for version in 0.7.0 0.8.0; do
    "$dir/venv/bin/pip" install -q numpy==2.2.6 safetensors==$version
    timeout 300 "$dir/venv/bin/python" program.py
done
