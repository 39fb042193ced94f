#!/usr/bin/env bash
# OneFlow 0.9.0, CPU: three things that an nn.Graph leaves out or leaves as they were, without a
# message.
#
# 1. Buffers that forward changes. Expected: they change as in eager mode, or an error. Seen:
#    `self.count += 1`, `add_` and `self.count = self.count + 1` do nothing, call after call; copy_
#    works. Batch norm's running mean moves, while its num_batches_tracked stays 0. So a moving
#    average of one's own that works in eager mode may stand still in a graph.
# 2. A weight that has a gradient from a backward pass in eager mode, say from a first check of the
#    model. Expected: the graph trains it. Seen: it does not move, while other weights of the model
#    do. zero_grad() before the graph does not help, because it leaves zeros in place. (With
#    gradient accumulation there is an error on two time shapes.) Cause:
#    oneflow/core/autograd/autograd_engine.cpp, CopyOrAccGrad: while the graph is built, its
#    gradient is added to the one that is there.
# 3. Hooks of modules. Expected: a forward hook that returns something replaces the output. Seen: it
#    is never called, nor is a forward pre-hook. (Hooks of tensors are.) Cause:
#    python/oneflow/nn/graph/proxy.py calls forward alone.
# Write instead: copy_; weight.grad = None before the first call; a module around it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3.10}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q oneflow==0.9.0 numpy==1.26.4 \
    nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96
cat > program.py <<'EOF'
import oneflow as flow
from oneflow import nn


class Model(nn.Module):
    def __init__(self, change=lambda model: None):
        super().__init__()
        self.a, self.b = nn.Parameter(flow.zeros(1)), nn.Parameter(flow.zeros(1))
        self.register_buffer("count", flow.zeros(1))
        self.change = change

    def forward(self, x):
        self.change(self)
        return (self.a * x + self.b * x).sum() + 0 * self.count.sum()


class Graph(nn.Graph):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.add_optimizer(flow.optim.SGD(model.parameters(), lr=1.0))

    def build(self, x):
        loss = self.model(x)
        loss.backward()
        return loss


def iadd(model):
    model.count += 1


def add_(model):
    model.count.add_(1)


def assign(model):
    model.count = model.count + 1


def copy_(model):
    model.count.copy_(model.count + 1)


for change, in_graph in ((iadd, 0), (add_, 0), (assign, 0), (copy_, 3)):
    counts = []
    for wrap in (lambda model: model, Graph):
        model = Model(change)
        forward = wrap(model)
        for _ in range(3):
            forward(flow.ones(1))
        counts.append(model.count.item())
    print(f"{change.__name__}: after three calls {counts[0]} in eager mode, {counts[1]} in a graph")
    assert counts == [3, in_graph]


class ForwardGraph(nn.Graph):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def build(self, x):
        return self.module(x)


norm = nn.BatchNorm1d(1)
ForwardGraph(norm)(flow.tensor([[1.0], [3.0]]))
print("batch norm:", norm.running_mean.item(), "after", norm.num_batches_tracked.item(), "batches")
assert abs(norm.running_mean.item() - 0.2) < 1e-6 and norm.num_batches_tracked.item() == 0


def three_steps(name, before=lambda model: None):
    """a and b, which are 0 at first, after three steps whose gradient is 1 for both."""
    model = Model()
    before(model)
    graph = Graph(model)
    for _ in range(3):
        graph(flow.ones(1))
    weights = model.a.item(), model.b.item()
    print(f"{name}: a and b are {weights}")
    return weights


def check_a(model):
    (model.a * 5.0).sum().backward()


def check_a_and_zero(model):
    check_a(model)
    flow.optim.SGD(model.parameters(), lr=1.0).zero_grad()


def check_a_and_forget(model):
    check_a(model)
    model.a.grad = None


hooked = nn.Identity()
hooked.register_forward_hook(lambda module, inputs, output: output * 10)
of_module, of_graph = (forward(flow.ones(1)).item() for forward in (hooked, ForwardGraph(hooked)))
print(f"a hook that multiplies by 10: {of_module} in eager mode, {of_graph} in a graph")
assert (of_module, of_graph) == (10, 1)

assert three_steps("as it is") == (-3, -3)
assert three_steps("a has a gradient", check_a) == (0, -3)
assert three_steps("a has a gradient of zero", check_a_and_zero) == (0, -3)
assert three_steps("its gradient is None again", check_a_and_forget) == (-3, -3)
EOF
export GLOG_minloglevel=3 OMP_NUM_THREADS=1
timeout 300 "$dir/venv/bin/python" program.py
