# SPDX-License-Identifier: Apache-2.0
"""Each mesh trains as one process, sends and holds what formulas say; one process trains right.

    python -m pytest -q              all tests
    python test_vit3d.py             the proof as a table (with 16 or 32: on so many processes)
    python test_vit3d.py mine.py     the proof for a model of your own

To see what is true, read the first test, in section 1, and TABLE, in section 2.

How a test runs on many processes, in order:
1. When this file is imported, the body of each test under `@on_meshes(...)` is put into BODIES.
2. pytest is one process. Its first test that needs, say, 4 processes starts this file on 4 more,
   the ranks, by train.py's own launcher: `python test_vit3d.py run NAMES`.
3. Each rank runs the bodies of NAMES, one after the other. For each it writes a line to its file:
   what the body returned, or the traceback of its failure.
4. pytest reads these files. A test fails if its body failed on any rank.
The ranks start once for all tests of 4 processes.

To see a test fail, change one of these lines of vit3d.py:

    MultiheadAttention      alpha=self.head_size**-0.5 -> alpha=1.0   logits_loss_and_gradient
    Dropout.forward         [B] * len(x.sbp) -> list(x.sbp)           a_mesh_trains
    set_pipeline_stage_id   return at once                            a_mesh_trains, blocks_lie
    Linear                  "row": S(1) -> "row": B                   a_mesh_trains

After the last one all losses are right, but each process stores the whole weight, and the bytes
that are sent and held are others.
"""

import contextlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on the CPU, whatever the machine has
os.environ.pop("PYTHONUNBUFFERED", None)  # it hides output that a process loses at its end
CLEAN = dict(os.environ)  # for commands: without what vit3d and the engine set below

import vit3d  # before all that imports the engine: it prepares it

import flowvision.data
import numpy as np
import pytest
from flowvision.data import Mixup
from flowvision.models import vision_transformer
from oneflow.framework import session_context
from PIL import Image
from safetensors.numpy import save_file

import train
from vit3d import (
    MODELS, B, Dropout, Layer, Linear, MultiheadAttention, P, PatchEmbedding, S,
    TransformerLayer, UsageError, VisionTransformer, batch_to_global, dist, distribute, draw_mesh,
    flow, full_array, load_timm_state_dict, load_weights, nn,
    of_all_ranks, require_equal_copies, to_timm_state_dict, why_not_cuda,
)  # fmt: skip

# flowvision's create_transform gives its own Resize an argument that Resize warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Argument interpolation should be")
HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("VIT3D_TEST_FOLDER", "."))  # what pytest's process and ranks share

# 1. A first test, and how it runs on two processes ------------------------------------------------

BODIES = {2: {}, 4: {}, 8: {}, 16: {}, 32: {}}  # number of processes -> name -> body
SLOW = ((2, 2, 2), "everything", "graph", 2)  # in section 12 alone, as larger meshes are


def case_id(mesh, *more):
    """((2, 1, 1), "zero", "graph", 2) -> "2x1x1-zero-graph-2"."""
    return "-".join(["x".join(map(str, mesh)), *map(str, more)])


def on_meshes(*cases):
    """Run the body of the test below, body(mesh, *more), on the processes of each case's mesh."""

    def decorate(body):
        for case in cases:
            BODIES[math.prod(case[0])][f"{body.__name__}[{case_id(*case)}]"] = body, case
        small = [case for case in cases if math.prod(case[0]) <= 8 and case != SLOW]
        ids = [case_id(*case) for case in small]

        @pytest.mark.parametrize("mesh", [mesh for mesh, *_ in small], ids=ids)
        def test(launched, request, mesh):
            launched(math.prod(mesh), request.node.name)

        return test

    return decorate


@on_meshes(((1, 2, 1),))
def test_linear_by_columns_and_by_rows_is_the_product_that_numpy_computes(mesh):
    # Two processes run this body, each of them all of it. They differ in `dist.rank`, 0 or 1.
    dist.setup(*mesh)  # data 1 x tensor 2 x pipeline 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 6)).astype("f4")
    weight = rng.standard_normal((8, 6)).astype("f4")
    columns = Linear(6, 8, bias=False, parallel="col")
    load_weights(columns, {"weight": weight})
    y = columns(batch_to_global(x, 0))
    assert y.sbp == (S(1),)  # each process has half of the product's columns
    half = np.split(x @ weight.T, 2, axis=1)[dist.rank]
    np.testing.assert_allclose(y.to_local().numpy(), half, atol=1e-5)
    rows = Linear(6, 8, bias=False, parallel="row")
    load_weights(rows, {"weight": weight})
    y = rows(batch_to_global(x, 0))
    assert y.sbp == (B,)  # each process has the whole product
    np.testing.assert_allclose(y.to_local().numpy(), x @ weight.T, atol=1e-5)


def run_bodies(names):
    """Run bodies, on a rank. Write a line for each: what it returned, or how it failed."""
    path = FOLDER / f"{dist.world_size}-{dist.rank}"
    log = os.open(path.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, sys.stdout.fileno())  # what the engine prints goes there, too
    os.dup2(log, sys.stderr.fileno())
    with open(path.with_suffix(".jsonl"), "w", buffering=1) as file:
        for name in names:
            # Where one rank fails, the others may wait for it for ever: the alarm ends them.
            signal.alarm(600 if dist.world_size > 8 else 200)
            error = value = None
            try:
                body, case = BODIES[dist.world_size][name]
                value = body(*case)
            except BaseException:
                error = traceback.format_exc(limit=-3)
            print(json.dumps([name, error, value]), file=file)


def start_ranks(n, names):
    """Run bodies on n processes -> {name: [(error, value) of each rank]}."""
    os.environ["GLOG_log_dir"] = str(FOLDER / f"log-{n}")  # where rank 0 writes plans
    train.launch(n, [sys.executable, __file__, "run", *names])
    results, logs = {name: [] for name in names}, ""
    for rank in range(n):
        lines = (FOLDER / f"{n}-{rank}.jsonl").read_text().splitlines()
        for name, error, value in map(json.loads, lines):
            results[name].append((error, value))
        logs += (FOLDER / f"{n}-{rank}.log").read_text()[-3000:]
    for name, ranks in results.items():
        if len(ranks) < n:
            ranks.append((f"{n - len(ranks)} ranks did not come to its end: {logs}", None))
    return results


@pytest.fixture(scope="session")
def launched(tmp_path_factory, request):
    """launched(n, name) fails if the body failed on a rank. Its first call runs all bodies of n."""
    collected, results = {item.name for item in request.session.items}, {}
    set_folder(tmp_path_factory.mktemp("ranks"))
    ids = {name.partition("[")[2] for name in collected}  # "2x1x1-zero-graph-2]"
    make_references([case for case in CASES if f"{case_id(*case)}]" in ids])
    make_own_references()

    def check(n, name):
        if n not in results:
            results[n] = start_ranks(n, [body for body in BODIES[n] if body in collected])
        for rank, (error, _) in enumerate(results[n][name]):
            assert not error, f"rank {rank}: {error}"

    return check


# 2. Every mesh trains as one process does ---------------------------------------------------------

ON = {  # what is on: the flags of train.py
    "plain": "",
    "dropout": "--drop-rate 0.5",
    "zero": "--drop-rate 0.5 --shard-params",
    "sequence": "--drop-rate 0.5 --sequence-parallel",
    "checkpoint": "--drop-rate 0.5 --activation-checkpoint",
    "all": "--drop-rate 0.5 --shard-params --sequence-parallel --activation-checkpoint",
    "own": "--steps 4",  # section 10
    "everything": "--drop-rate 0.1 --attn-drop-rate 0.1 --drop-path-rate 0.1"
    " --shard-params --sequence-parallel --activation-checkpoint"
    " --mixup 0.8 --cutmix 1.0 --label-smoothing 0.1 --random-erasing 0.25 --steps 5",
}
TABLE = [
    # what is on   mode   micro-batches  meshes: data x tensor x pipeline
    # in exact arithmetic, on each mesh up to 2x2x2
    ("dropout",    "graph", 2, "2x1x1 1x2x1 1x1x2"),
    ("dropout",    "graph", 1, "1x4x1"),
    ("zero",       "graph", 2, "2x1x1 2x1x2"),
    ("sequence",   "graph", 2, "1x2x1"),
    ("sequence",   "graph", 8, "2x2x1"),  # micro-batches of one image for each replica
    ("checkpoint", "graph", 4, "1x2x2"),
    ("all",        "graph", 8, "2x2x2"),  # micro-batches of one image here, too
    ("all",        "graph", 2, "4x2x2 2x4x2 2x2x4 4x4x2"),  # in section 12 alone
    ("plain",      "eager", 4, "2x1x1 1x2x1 1x1x2 4x1x1 1x4x1 2x2x2"),
    ("all",        "eager", 2, "2x1x1 1x2x1 1x1x2 2x2x1 2x1x2 1x2x2 2x2x2 1x1x4 1x4x2 2x1x4"),
    # with the real functions, AdamW, clipping, Mixup and so on
    ("everything", "graph", 2, "2x1x1 2x2x2"),
    ("everything", "eager", 2, "2x1x1 1x2x1 1x1x2 2x2x2"),
]  # fmt: skip
CASES = [  # of the tests: ((2, 1, 1), "plain", "graph", 2), and so on
    (tuple(map(int, mesh.split("x"))), on, mode, micro_batches)
    for on, mode, micro_batches, meshes in TABLE
    for mesh in meshes.split()
]
TINY = "--img-size 16 --patch-size 4 --embed-dim 32 --depth 2 --num-heads 4".split()


class Recorder:
    """In front of a trainer class: another eps, and its losses. It is found as `Trainer.last`."""

    validations, stop_after = [], None

    def __init__(self, model, args, steps):
        super().__init__(model, args, steps)
        # In exact arithmetic the gradient of a key's bias is 0, so rounding is all there is of it.
        # Adam divides it by its own size: with the usual eps, 1e-8, rounding becomes whole steps.
        # These differ from mesh to mesh, though no loss does. A larger eps keeps them small.
        for group in self.optimizer.param_groups:
            group["eps"] = 1e-4
        self.losses, Trainer.last = [], self

    def step(self, *batch):
        if len(self.losses) == Trainer.stop_after:
            raise KeyboardInterrupt
        loss, lr = super().step(*batch)
        self.losses.append(loss)
        return loss, lr


class Trainer(Recorder, train.Trainer):
    """train.py's own."""


def run_main(
    *flags, stop_after=None, model=VisionTransformer, trainer=Trainer, data_set=None,
    score=train.score_classes,
):
    """Run train.py's `main` here, with the Trainer above; return that trainer.

    `stop_after`: the step after which this process is interrupted, before it would do the next.
    """

    def evaluate(*arguments):
        means = evaluate_of_train(*arguments)
        Trainer.validations.append(list(means.values()))  # loss, top-1, top-5, images
        return means

    evaluate_of_train, Trainer.validations = train.evaluate, []
    Trainer.stop_after = stop_after
    args = train.parse_arguments(list(map(str, flags)))
    with mock.patch.object(train, "evaluate", evaluate):
        train.main(args, model, trainer, data_set, score)
    return Trainer.last


def refuses(message, *flags, **own):
    """`main` must refuse these flags or classes of one's own with this message."""
    with pytest.raises(UsageError, match=message):
        run_main(*flags, **own)


def flags_of(mesh, on, mode, micro_batches):
    """The flags that a mesh, with what is on, needs for 16 images a step."""
    flags = [*TINY, "--num-classes", 16, "--steps", 2, "--lr", 0.005, "--weight-decay", 0.5]
    flags += ["--clip-grad", 0.1]  # gradients are longer than that
    for name, size in zip(("data", "tensor", "pipeline"), mesh):
        flags += [f"--{name}-parallel", size]
    flags += ["--accumulation-steps", micro_batches]
    flags += ["--micro-batch-size", 16 // mesh[0] // micro_batches]
    flags += ON[on].split()  # of a flag that is given twice, the last counts
    return flags + ["--eager"] * (mode == "eager")


def train_steps(mesh, on, mode, micro_batches, depth, *more, **own):
    """Train by train.py, on 16 images a step -> {"losses": ..., "validation": ..., weights}."""
    flags = [*flags_of(mesh, on, mode, micro_batches), "--depth", depth, "--workers", 1]
    flags += [] if "data_set" in own else ["--data", FOLDER / "images"]
    trainer = run_main(*flags, *more, **own)
    weights = {name: full_array(weight) for name, weight in trainer.model.named_parameters()}
    validation = np.array(Trainer.validations)
    return {"losses": np.array(trainer.losses), "validation": validation, **weights}


# Exact arithmetic: where all numbers are whole multiples of a power of two and have less than 24
# bits, a sum is the same in any order. So a mesh has the bits of one process, and no tolerance
# hides a mistake. Three functions that a process computes alone are replaced. Moves, shares, masks
# and sums stay.


def whole(x, dim=None):
    """x rounded to -1, 0 or 1, with the gradient of x, in place of GELU and softmax."""
    return x + (x.clamp(-1, 1).round() - x).detach()


class WholeImages(train.SyntheticImages):
    """16 images whose pixels are -1, 0 or 1."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.targets = self.targets[:16]

    def __getitem__(self, key):
        key, image, target = super().__getitem__(key)
        return key, image.clip(-1, 1).round(), target


class Exact(VisionTransformer):
    """Its weights are -1, 0 and 1, few of them not 0. Its loss is the mean of -1 logit of an image.

    `outputs` has what the layers gave in eager training, in their order. (A graph calls no hooks.)
    """

    def __init__(self, **options):
        super().__init__(**{**options, "loss_func": nn.NLLLoss()})
        rng, arrays, self.outputs = np.random.default_rng(0), {}, {}
        for name, weight in self.named_parameters():
            share = 0.5 if weight.numel() < 4096 else 1 / weight.shape[1]
            signs = rng.integers(-1, 2, weight.shape).astype("f4")
            arrays[name] = signs * (rng.random(weight.shape) < share)
        load_weights(self, arrays)
        for name, part in self.named_modules():
            if isinstance(part, Dropout):
                part.p = options["drop_rate"]  # also of stochastic depth
            if isinstance(part, Layer) and part is not self:
                part.register_forward_hook(lambda part, _, y, name=name: self.keep(part, name, y))

    def keep(self, part, name, y):
        if part.training:
            self.outputs[f"output {len(self.outputs)}, of {name},"] = y.detach()


@mock.patch.multiple(flow, gelu=whole, softmax=whole)
@mock.patch.object(vit3d, "layer_norm", lambda x, weight, bias, eps: whole(x) * weight + bias)
def exact_step(*case):
    """Train one step by train.py -> {what it computes: a global tensor}, in its order."""
    flags = "--embed-dim", 64, "--clip-grad", 0, "--steps", 1
    train_steps(*case, *flags, model=Exact, data_set=WholeImages)
    model, state = Trainer.last.model, train.get_optimizer_state(Trainer.last)
    all_ranks = flow.placement("cpu", list(range(dist.world_size)))
    loss = flow.tensor(Trainer.last.losses).to_global(placement=all_ranks, sbp=B)
    # "plain" is held against another number of micro-batches, which has other outputs.
    got = {} if case[1] == "plain" else model.outputs
    got["the loss"], weights = loss, dict(model.named_parameters())
    kinds = ("m", "v") if Trainer.last.graph else ("exp_avg", "exp_avg_sq")  # Adam's states
    for kind, name in itertools.product(kinds, reversed(weights)):  # as the backward pass goes
        got[f"{kind} of {name}"] = state[f"optimizer/model.{name}-{kind}"]
    return {**got, **weights}


def holds(tensor, array):
    """Does this process hold its part of this array, to the bit, as the tensor's sbp says?"""
    ranks = np.array(tensor.placement.ranks)
    for axis, i in enumerate(np.argwhere(ranks == dist.rank).flatten()):
        for split in range(array.ndim):
            if tensor.sbp[axis] == S(split):
                array = np.array_split(array, ranks.shape[axis], split)[i]
    return dist.rank not in ranks or np.array_equal(tensor.to_local().numpy(), array)


def check_each_bit(got, want):
    """Each process compares what it holds. All of them name what differs first, and where."""
    assert [*got] == [*want]
    same = [holds(tensor, want[name]) for name, tensor in got.items()]
    firsts = of_all_ranks([[*same, False].index(False)])  # len(got) if all are the same
    first, rank = min(zip(firsts[:, 0].tolist(), range(dist.world_size)))
    place = f"rank {rank}, (replica, tensor rank, stage) = {dist.get_coordinates(rank)}"
    assert first == len(got), f"{[*got, 0][first]} differs on {place}"


def make_folder(root, per_class):
    """Three classes of small images that differ by colour, in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for split, count in per_class.items():
        for label, i in itertools.product(range(3), range(count)):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (20, 24, 3))
            pixels[..., label] += 100
            Image.fromarray(pixels.astype("u1")).save(folder / f"{i}.png")


def set_folder(folder):
    """Set the folder where this process and its ranks find images, references and results."""
    global FOLDER
    FOLDER = folder
    os.environ["VIT3D_TEST_FOLDER"] = str(folder)
    make_folder(folder / "images", dict(train=16, val=2))
    image = folder / "images/train/class0/0.png"
    image.rename(image.with_suffix(".JPEG"))  # as one of ImageNet's


def reference_of(mesh, on, mode, micro_batches):
    """What one process runs, for a mesh to be held against: on, mode, micro-batches, depth."""
    # Eager mode draws other masks than a graph, and others for each number of micro-batches. Its
    # AdamW rounds otherwise than a graph's, too.
    parts = 1 if mode == "graph" or on == "plain" else micro_batches
    if on == "everything":
        return on, mode, parts, max(2, mesh[2])  # stochastic depth begins at the second block
    return "plain" if on == "plain" else "dropout", mode, parts, mesh[2]  # a block for each stage


def make_references(cases):
    """Train on one process what these cases are held against, and save it."""
    for reference in sorted({reference_of(*case) for case in cases}):
        if reference[0] == "everything":
            arrays = train_steps((1, 1, 1), *reference)
        else:
            arrays = {k: full_array(t) for k, t in exact_step((1, 1, 1), *reference).items()}
        np.savez(FOLDER / f"{reference}.npz", **arrays)


def new_model(depth):
    flow.manual_seed(0)
    return VisionTransformer(16, 4, 3, 32, depth, 4, num_classes=10)


def differences(got, want):
    """The largest difference for each name; none may be large."""
    assert {*got} == {*want}
    largest = {name: float(abs(got[name] - want[name]).max()) for name in got}
    too_large = {name: value for name, value in largest.items() if not value < 1e-5}
    assert not too_large, too_large
    return largest


@on_meshes(*CASES)
def test_a_mesh_trains_as_one_process_and_has_the_bytes_of_the_formulas(mesh, on, mode, parts):
    """Returns what section 12 prints: how equal it is and, on rank 0 for a graph, the bytes."""
    reference = reference_of(mesh, on, mode, parts)
    want, depth = np.load(FOLDER / f"{reference}.npz"), reference[-1]
    with the_plan() as (plan, weights, others):
        step = train_steps if on == "everything" else exact_step
        got = step(mesh, on, mode, parts, depth)
    if on == "everything":
        largest, c = differences(got, want), 32
        equal = f"loss {largest.pop('losses'):.1e}, weights {max(largest.values()):.1e}"
    else:
        check_each_bit(got, want)
        equal, c = "equal to the bit", 64
    moved = None
    if dist.rank == 0 and mode == "graph":
        given = " ".join(map(str, flags_of(mesh, on, mode, parts)))
        flags = [f"--{flag}" in given for flag in ("shard", "sequence", "activation")]
        moved = bytes_by_axis(plan)
        formula = bytes_by_formula(mesh, parts, depth, c, *flags)
        assert moved == formula, (moved, formula)
        sizes = dict(img_size=16, patch_size=4, embed_dim=c, depth=depth, num_classes=16)
        stages = weights_by_formula(mesh, flags[0], **sizes)
        stage_ids = [dist.get_coordinates(rank)[2] for rank in range(dist.world_size)]
        formula = [12 * sum(stages[stage_id]) for stage_id in stage_ids]
        assert weights == formula, (weights, formula)
        moved.update(weights=max(weights), others=max(others))
        # Stage ids put buffers between stages, for micro-batches that overlap.
        buffers = any("Pipeline-Buffer" in operator for operator, *_ in plan)
        assert buffers == (mesh[2] > 1 and parts > 1)
        # The formulas leave out scalars, such as the norm of the gradients: they are few.
        scalars = sum(4 * times for *_, times, elements in plan if elements == 1)
        assert scalars < 500 * dist.world_size, scalars
    return equal, moved


@pytest.mark.parametrize("on, unit", [("dropout", 2**-4), ("plain", 2**-12)])
def test_exact_arithmetic_is_exact_and_no_gradient_is_0(on, unit):
    for name, tensor in exact_step((1, 1, 1), on, "eager", 1, 4).items():
        if name.startswith(("output", "the loss", "exp_avg of")):
            # Adam's first state is the gradient times this, which rounds it by less than 1e-7.
            tenth = 1 - np.float32(0.9) if "exp_avg" in name else 1
            count = full_array(tensor).astype(float) / tenth / unit
            assert (abs(count - count.round()) <= 1e-7 * abs(count)).all(), name
            assert 0 < abs(count).max() < 2**22, name


# 3. Every mesh moves and holds what the formulas say ----------------------------------------------

# The engine's plan has a text for each rank. In it an operator copy_comm_net_N is a message that
# this rank receives. It says from which operator and rank, how often in a step, and of what shape.
MESSAGE = re.compile(
    r"name : copy_comm_net_.*\n  consume : copy_in : <- \[ (\S+) \] \( actor_id: \d+ , rank: (\d+),"
    r".*time_shape: \((.*?)\), shape: \((.*?)\)"
)
# An operator with the name of a weight, or with -m or -v behind it, holds it or a state of Adam.
VARIABLE = re.compile(r"name : model\.\S+ thrd .*\n.*\n  produce : __out .*, shape: \((.*?)\)")
# Another text, for all ranks, lists every buffer: rank, bytes and, for such a one, its variable.
BUFFER = re.compile(r"  mem_block {\n.*?machine_id: (\d+)\n.*?mem_size: (\d+)\n(.*?)\n  }", re.S)


def product(shape):
    return math.prod(map(int, re.findall(r"\d+", shape)))


@contextlib.contextmanager
def the_plan():
    """Yield three lists, which the end of the `with` fills from the plans of the graphs in it.

    They stay as they are but on rank 0, which has the plans. The first is of messages: (operator,
    source rank, rank, times in a step, elements). A buffer between stages is listed as (operator,
    rank, rank, 0, 0). The other two have a number for each rank: bytes of weights and Adam's
    states, and of all other buffers.
    """
    session, messages = session_context.GetDefaultSession(), []
    weights, others = [0] * dist.world_size, [0] * dist.world_size
    session.TryInit()
    resource = session.resource
    resource.enable_debug_mode = True
    session.update_resource_eagerly(resource)
    yield messages, weights, others
    resource.enable_debug_mode = False
    session.update_resource_eagerly(resource)
    log = Path(os.environ["GLOG_log_dir"])
    for path in log.glob("**/*_light_plan") if dist.rank == 0 else ():
        rank = int(re.search(r"rank_(\d+)_light", path.name)[1])
        text = path.read_text()
        for operator, source, *shapes in MESSAGE.findall(text):
            messages.append((operator, int(source), rank, *map(product, shapes)))
        for operator in re.findall(r"name : (System-Pipeline-Buffer-Op_\S+)", text):
            messages.append((operator, rank, rank, 0, 0))
        weights[rank] += sum(4 * product(shape) for shape in VARIABLE.findall(text))
        path.unlink()
    for path in log.glob("**/job_*_plan") if dist.rank == 0 else ():
        for rank, size, more in BUFFER.findall(path.read_text()):
            others[int(rank)] += 0 if "variable_op_name" in more else int(size)
        path.unlink()


def bytes_by_axis(plan):
    """Bytes that all ranks receive, by the axis along which they come. Scalars are left out."""
    moved = dict.fromkeys(("data", "tensor", "data and tensor", "pipeline"), 0)
    for _, source, rank, times, elements in plan:
        pairs = zip(dist.get_coordinates(source), dist.get_coordinates(rank))
        data, tensor, pipeline = (a != b for a, b in pairs)  # along which axes do they differ?
        axes = [name for name, differs in (("data", data), ("tensor", tensor)) if differs]
        if elements > 1:
            moved["pipeline" if pipeline else " and ".join(axes)] += 4 * times * elements
    return moved


def bytes_by_formula(mesh, micro_batches, depth, c, zero, sequence, checkpoint):
    """What `bytes_by_axis` must be for 16 images a step: README, 'What a mesh sends ...'."""
    d, t, p = mesh
    m, classes = micro_batches, 16
    x = 4 * (16 // d // m) * 17 * c  # the tokens of a micro-batch of a replica
    moved = dict.fromkeys(("data", "tensor", "data and tensor", "pipeline"), 0)
    moves = 8 * depth + 2 * sequence + 4 * depth * checkpoint  # checkpointing repeats the forward
    moved["tensor"] = m * d * (t - 1) * x * moves
    moved["pipeline"] = m * d * 2 * (p - 1) * x * (1 if sequence else t)
    kinds = {  # of weights: elements in a block, elements outside the blocks
        "split": (12 * c * c, 0),
        "column bias": (7 * c, 0),
        "norms and row biases": (6 * c, 2 * c),
        "others": (0, 3 * 16 * c + c + c + 17 * c + classes * c + classes),
    }
    for kind, (in_block, outside) in kinds.items():
        copies = 1 if kind in ("split", "column bias") else t  # that a replica holds
        block, size = 4 * depth * in_block, 4 * (depth * in_block + outside)
        of_tokens = sequence and t > 1 and kind == "norms and row biases"
        if zero:  # in each micro-batch an all-gather and a reduce-scatter
            moved["data"] += m * 2 * (d - 1) * size * copies
            if checkpoint and kind != "column bias":  # that has no dimension left to split
                moved["data"] += m * (d - 1) * block * copies
            if of_tokens:  # before it an all-reduce within the replica
                moved["tensor"] += m * d * 2 * (t - 1) * size
        elif of_tokens:  # in each step one all-reduce over all ranks of the stage
            moved["data"] += 2 * (d - 1) * size
            moved["tensor"] += 2 * (t - 1) * size
            moved["data and tensor"] += 2 * (d - 1) * (t - 1) * size
        else:  # in each step one all-reduce over the replicas
            moved["data"] += 2 * (d - 1) * size * copies
    return moved


def weights_by_formula(
    mesh, shard_params=False, img_size=224, patch_size=16, in_chans=3, embed_dim=192, depth=12,
    mlp_ratio=4.0, num_classes=1000, **others,
):
    """How many elements of each weight a rank holds: a list for each stage of the pipeline.

    `mesh` is (data, tensor, pipeline), the rest are arguments of `VisionTransformer`. With Adam's
    two states an element takes 12 bytes. A formula: it looks at no model and starts no process.
    """
    d, t, p = mesh
    c = embed_dim
    inner = int(embed_dim * mlp_ratio)
    height, width = np.broadcast_to(img_size, 2).tolist()
    tokens = (height // patch_size) * (width // patch_size) + 1
    # (shape, the dimension that the tensor axis splits), in the order of the model
    norm = [((c,), None), ((c,), None)]
    attention = [((3 * c, c), 0), ((3 * c,), 0), ((c, c), 1), ((c,), None)]
    mlp = [((inner, c), 0), ((inner,), 0), ((c, inner), 1), ((c,), None)]
    block = norm + attention + norm + mlp
    embedding = [((c, in_chans, patch_size, patch_size), None), ((c,), None)]
    embedding += [((1, 1, c), None), ((1, tokens, c), None)]
    head = [((num_classes, c), None), ((num_classes,), None)]

    def elements(shape, split):
        whole = math.prod(shape) // (1 if split is None else t)
        free = [n for i, n in enumerate(shape) if i != split]  # that the replicas can share
        return whole // d if shard_params and any(n % d == 0 for n in free) else whole

    stages = [(depth + stage) // p * block for stage in range(p)]
    stages[0] = embedding + stages[0]
    stages[-1] = stages[-1] + norm + head
    return [[elements(*weight) for weight in stage] for stage in stages]


# 4. Which rank holds what -------------------------------------------------------------------------


@on_meshes(((1, 1, 4),))
def test_blocks_lie_on_the_stages_that_were_asked_for(mesh):
    dist.setup(*mesh, 8)
    assert dist.layer_stage_ids == [0, 0, 1, 1, 2, 2, 3, 3]
    dist.setup(*mesh, 6)
    assert dist.layer_stage_ids == [0, 1, 2, 2, 3, 3]
    dist.layer_stage_ids = [0, 1, 1, 1, 2, 3]
    model = new_model(6)
    holds = [block.mlp.dense_4h_to_h.bias.to_local().numel() > 0 for block in model.blocks]
    assert holds == [stage == dist.rank for stage in dist.layer_stage_ids]
    graph = train.Trainer(model, train.parse_arguments([]), 2).graph  # the stage ids make it 1F1B
    stages = [module.to(nn.graph.GraphModule).stage_id for module in graph.model.blocks]
    assert stages == dist.layer_stage_ids
    inner = graph.model.blocks[4].mlp.dense_h_to_4h.to(nn.graph.GraphModule)
    assert inner.stage_id is None  # that of its block: one of its own would cost operators
    others = {"patch_embed": 0, "pos_drop": 0, "norm": 3, "head": 3, "loss_func": 3}
    for name, stage in others.items():
        assert getattr(graph.model, name).to(nn.graph.GraphModule).stage_id == stage, name


@on_meshes(*((mesh,) for mesh in [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]))
def test_the_norm_of_all_gradients_is_numpys_and_clipping_brings_them_to_it(mesh):
    dist.setup(*mesh, 2, shard_params=mesh == (2, 2, 2), sequence_parallel=mesh[1] > 1)
    model = new_model(2)
    model.blocks[1].mlp.dense_4h_to_h.bias.requires_grad = False  # it has no gradient
    images = np.split(PIXELS[:8], mesh[0])[dist.get_coordinates()[0]]
    labels = np.arange(len(images))
    model.train()(batch_to_global(images, 0), batch_to_global(labels, -1))["losses"].backward()

    def gradients():
        arrays = [full_array(p.grad) for p in model.parameters() if p.grad is not None]
        return np.concatenate([array.flatten() for array in arrays]).astype("f8")

    before = gradients()
    norm = np.linalg.norm(before)
    assert abs(train.clip_grad_norm(model.parameters(), norm / 2) / norm - 1) < 1e-6
    np.testing.assert_allclose(gradients(), before / 2, rtol=1e-5, atol=1e-9)
    assert abs(train.clip_grad_norm(model.parameters(), norm) / norm - 0.5) < 1e-5
    np.testing.assert_allclose(gradients(), before / 2, rtol=1e-5, atol=1e-9)  # short enough


@on_meshes(((2, 2, 2),))
def test_the_picture_of_the_mesh_shows_which_ranks_are_a_replica_of_which_stage(mesh):
    dist.setup(*mesh, 4)
    assert draw_mesh(dist).splitlines() == [
        "data 2 x tensor 2 x pipeline 2, cpu (0 GPUs)",
        "stage 0: blocks [0, 1], ranks [[0, 1], [2, 3]]",
        "stage 1: blocks [2, 3], ranks [[4, 5], [6, 7]]",
    ]
    assert dist.get_coordinates() == (dist.rank // 2 % 2, dist.rank % 2, dist.rank // 4)
    assert type(dist)().ranks.shape == (8, 1, 1)  # replicas, until a mesh is laid out


# 5. Layers and models -----------------------------------------------------------------------------


def test_layers_take_libais_arguments_and_the_model_has_libais_names():
    dist.setup()
    layer = TransformerLayer(
        hidden_size=8, ffn_hidden_size=32, num_attention_heads=2, attention_dropout_prob=0.0,
        output_dropout_prob=0.0, drop_path_prob=0.0, layer_idx=0,
    )
    names = "input_layernorm self_attention.query_key_value self_attention.dense".split()
    names += "post_attention_layernorm mlp.dense_h_to_4h mlp.dense_4h_to_h".split()
    parameters = itertools.product(names, ("weight", "bias"))
    assert {*layer.state_dict()} == {".".join(parts) for parts in parameters}
    assert layer.input_layernorm.eps == 1e-5 == VisionTransformer(depth=1).norm.eps
    model = VisionTransformer(depth=1, layer_norm_eps=0.5, mlp_ratio=2)
    assert {part.eps for part in model.modules() if hasattr(part, "eps")} == {0.5}
    assert model.blocks[0].mlp.dense_h_to_4h.weight.shape == (2 * 192, 192)
    with mock.patch.object(vit3d, "set_pipeline_stage_id") as function:
        VisionTransformer.set_pipeline_stage_id(model)  # LiBai has it on the class
    function.assert_called_once_with(model)


def test_images_that_are_not_square_are_cut_into_patches_row_by_row():
    dist.setup()
    layer = PatchEmbedding((8, 16), 4, 3, 32)
    embedded = full_array(layer(batch_to_global(PIXELS[:2, :, :8], 0)))  # (2, 3, 8, 16)
    weight, bias = full_array(layer.proj.weight), full_array(layer.proj.bias)
    for patch, (row, column) in enumerate(itertools.product((0, 4), (0, 4, 8, 12))):
        pixels = PIXELS[:2, :, row : row + 4, column : column + 4]
        want = np.einsum("bchw,echw->be", pixels, weight) + bias
        np.testing.assert_allclose(embedded[:, patch], want, atol=1e-5)


def test_a_pos_embed_of_a_square_goes_into_any_other_grid_and_no_other_does():
    dist.setup()
    by_row = np.zeros((1, 17, 32), "f4")  # of 4 x 4 patches
    by_row[0, 1:] = np.arange(4).repeat(4)[:, None]
    for size, tokens, message in (
        ((8, 32), 17, "pos_embed of 17 tokens is of no square, or may be of 2 x 8"),
        ((16, 16), 0, "pos_embed of 0 tokens is of no square"),
        ((16, 16), 1, "pos_embed of 1 tokens is of no square"),  # no patch
        ((16, 16), 16, "pos_embed of 16 tokens is of no square"),  # no class token
        ((16, 16), 18, "pos_embed of 18 tokens is of no square"),  # one more, for distillation
        ((8, 24), 13, ""),  # of 2 x 6 patches, as the model's
        ((16, 16), 17, ""),
    ):
        model, old = VisionTransformer(size, 4, depth=1, embed_dim=32, num_heads=1), by_row
        if tokens != 17:
            old = np.zeros((1, tokens, 32), "f4")
        with pytest.raises(UsageError, match=message) if message else contextlib.nullcontext():
            assert vit3d.resize_pos_embed(old, model) is old
    model = VisionTransformer((32, 16), 4, depth=1, embed_dim=32, num_heads=1)
    grid = vit3d.resize_pos_embed(by_row, model)[0, 1:].reshape(8, 4, 32)
    assert (np.diff(grid[:, 0, 0]) > 0).all() and np.allclose(grid[:, 0], grid[:, 1])


def test_timm_weights_of_another_grid_and_head_load_and_misfits_are_named():
    dist.setup()
    size = dict(patch_size=4, embed_dim=8, depth=1, num_heads=2)
    small = VisionTransformer(img_size=16, num_classes=3, **size)
    large = VisionTransformer(img_size=32, num_classes=5, **size)
    state, head = to_timm_state_dict(small), full_array(large.head.weight)
    state["pos_embed"][0, 1:] = (np.arange(4.0) ** 2).repeat(4)[:, None]  # rises by row
    without_head = {name: array for name, array in state.items() if "head" not in name}
    load_timm_state_dict(large, without_head, may_be_missing=("head.",))
    assert np.array_equal(full_array(large.head.weight), head)
    grid = full_array(large.pos_embed)[0, 1:].reshape(8, 8, 8)
    assert np.allclose(grid[:, :1], grid)
    cubic = np.array([-3, 29, 111, -9]) / 128  # at 3/4 between two rows, a = -1/2
    assert np.allclose(grid[4, 0, 0], cubic @ [0, 1, 4, 9])
    assert np.array_equal(full_array(large.pos_embed)[0, 0], state["pos_embed"][0, 0])
    state["blocks.0.attn.odd"] = state.pop("norm.bias")
    message = "norm.bias is missing; .*odd is surplus"
    with pytest.raises(UsageError, match=message):
        load_timm_state_dict(small, state)


def test_cuda_is_the_choice_only_where_its_code_runs_and_each_process_has_a_gpu(monkeypatch):
    for gpus, processes, reason in (
        ([(8, 0), (9, 0)], 2, "compute capability 9.0 is not in 6.0 to 8.9"),
        ([(5, 2)], 1, "compute capability 5.2 is not in 6.0 to 8.9"),
        ([(8, 0)], 8, "1 GPUs"),
        ([(6, 0), (8, 9)], 2, ""),
    ):
        monkeypatch.setattr(flow.cuda, "is_available", lambda: True)
        monkeypatch.setattr(flow.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(flow.cuda, "get_device_capability", lambda gpu: gpus[gpu])
        assert why_not_cuda(processes) == reason
    dist.setup()
    assert dist.device_type == "cuda"


@on_meshes(((1, 1, 2),))
def test_what_does_not_fit_is_a_usage_error_on_every_rank(mesh):
    for arguments, call, message in (
        ((), lambda: dist.setup(1), "1 x 1 x 1 = 1 must be the number of processes, 2"),
        ((), lambda: dist.setup(-1, -2), "each at least 1"),
        ((), lambda: dist.setup(2, device_type="tpu"), "'tpu' must be 'cpu' or 'cuda'"),
        ((), lambda: dist.setup(2, device_type="cuda"), "'cuda' cannot run, take 'cpu': 0 GPUs"),
        ((), lambda: dist.setup(*mesh, 1), "pipeline_num_layers 1 is below the 2 stages"),
        ((*mesh, 4), lambda: Linear(4, 4, layer_idx=4), "layer_idx 4 must be one of the 4"),
        ((*mesh, 4), lambda: VisionTransformer(depth=3), "depth 3 must be the .*_layers of .*, 4"),
        ((1, 2), lambda: Linear(4, 65, parallel="col"), "2 tensor-parallel ranks do not divide 65"),
        ((1, 2), lambda: MultiheadAttention(60, 5), "2 tensor-parallel ranks do not divide 5"),
        ((2,), lambda: Linear(4, 4, parallel="diagonal"), "'data', 'col' or 'row'"),
        ((2,), lambda: MultiheadAttention(8, 3), "3 heads do not divide 8 features"),
        ((2,), lambda: Dropout(1.0), r"must lie in \[0, 1\)"),
        ((2,), lambda: VisionTransformer(img_size=30), "patches of side 16 do not divide"),
        ((2,), lambda: PatchEmbedding(8, 4)(batch_to_global(PIXELS, 0)), r"\(3, 16, 16\), .* 8"),
        ((2,), lambda: PatchEmbedding(16, 4)(batch_to_global(PIXELS[:, :1], 0)), r"\(1, 16, 16\)"),
        ((2,), lambda: PatchEmbedding(16, 4)(batch_to_global(PIXELS.astype("u1"), 0)),
         "images are oneflow.uint8: make them float32"),
    ):
        dist.setup(*arguments or (2,))
        with pytest.raises(UsageError, match=message):
            call()


# 6. One process trains as it should ---------------------------------------------------------------

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2)
PIXELS = np.random.default_rng(0).standard_normal((128, 3, 16, 16)).astype("f4")
MEAN, STD = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).reshape(2, 3, 1, 1)  # ImageNet
PAPERS = dict(  # width, depth, heads, MLP
    tiny=(192, 12, 3, 768), small=(384, 12, 6, 1536), base=(768, 12, 12, 3072),
    large=(1024, 24, 16, 4096), huge=(1280, 32, 16, 5120), giant=(1408, 40, 16, 6144),
    gigantic=(1664, 48, 16, 8192))  # fmt: skip


def small_model(mesh=(1, 1, 1), spread=0.0, **options):
    """A model with noise on all weights, as zeros hide much."""
    dist.setup(*mesh, SIZES["depth"])
    flow.manual_seed(0)
    rng = np.random.default_rng(0)
    model = VisionTransformer(num_classes=10, **{**SIZES, **options})
    weights = full_weights(model).items()
    load_weights(model, {k: w + rng.normal(0, spread, w.shape) for k, w in weights})
    return model


def full_weights(model, of=lambda name, weight: weight):
    return {name: full_array(of(name, w)).astype(float) for name, w in model.named_parameters()}


@pytest.mark.parametrize("mode", ["", "--eager"], ids=["graph", "eager"])
@pytest.mark.parametrize("clip, parts, warmup", [(1e-6, 2, 2), (0, 1, 0)])
def test_each_step_is_adamw_in_numpy_at_the_rate_of_warm_up_then_cosine(mode, clip, parts, warmup):
    """The low limit brings gradients down to Adam's eps; else eps is raised to their size."""
    flags = f"--lr 0.01 --weight-decay 0.5 --clip-grad {clip} --accumulation-steps {parts} {mode}"
    flags += "" if warmup else " --warmup-steps 0"  # else a tenth
    model, twin = (small_model(spread=0.1, depth=1) for _ in range(2))
    trainer = train.Trainer(model, train.parse_arguments(flags.split()), 20)
    eps = 1e-8 if clip else 1e-2
    for group in trainer.optimizer.param_groups:
        group["eps"] = eps
    now = full_weights(model)
    m, v = dict.fromkeys(now, 0.0), dict.fromkeys(now, 0.0)
    for i in range(1, 9):  # of 20 steps
        lr = 0.005 + 0.005 * np.cos(np.pi * (i - 1 - warmup) / (20 - warmup))
        if i <= warmup:
            lr = 0.01 * (warmup + (warmup - 1) * (i - 1)) / warmup**2
        images, labels = PIXELS[4 * i :][:4], np.arange(i, i + 4) % 10
        batch = batch_to_global(images, 0), batch_to_global(labels, -1)
        load_weights(twin, now)
        twin.zero_grad()
        loss = twin(*batch)["losses"]
        loss.backward()
        got = trainer.step(images, labels)
        assert got == (pytest.approx(full_array(loss), abs=1e-5), pytest.approx(lr))
        before, now, gradients = now, full_weights(model), full_weights(twin, lambda _, w: w.grad)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for k, g in gradients.items():
            g = g * min(1, clip / norm) if clip else g
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            move = m[k] / (1 - 0.9**i) / (np.sqrt(v[k] / (1 - 0.999**i)) + eps)
            decay = 0 if "bias" in k or "norm" in k or k in ("cls_token", "pos_embed") else 0.5
            want = before[k] - lr * (move + decay * before[k])
            np.testing.assert_allclose(now[k], want, rtol=0, atol=1e-6)
    assert not trainer.graph or trainer.graph(*batch).numel() == parts  # a loss for each part


def test_each_dropout_drops_its_share_in_its_place():
    model = small_model(spread=0.1, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.6)
    drops = {k: (part, []) for k, part in model.named_modules() if isinstance(part, Dropout)}
    masks = []
    for part, calls in drops.values():
        part.register_forward_hook(
            lambda _, x, y, calls=calls: calls.append((full_array(x[0]), full_array(y)))
        )
    model.train()(batch_to_global(PIXELS, 0))
    for name, (part, calls) in drops.items():
        rate = 0.2 if name.endswith("attention.dropout") else 0.1
        if "path" in name:  # 0, 0.3 and 0.6 in blocks 0, 1 and 2
            rate = 0.3 * int(name[7])
        assert part.p == pytest.approx(rate) and calls
        for x, y in calls:
            kept = (y != 0).any((1, 2), keepdims=True) if "path" in name else y != 0
            np.testing.assert_allclose(y, kept * x / (1 - rate), rtol=1e-5)
            masks.append((kept.shape, kept.tobytes()))
            assert abs(kept.mean() - 1 + rate) <= 4 * np.sqrt(rate * (1 - rate) / kept.size)
    path, attention, output, mlp = (calls for k, (_, calls) in drops.items() if ".1." in k)
    assert len(set(masks)) == len(masks) - 1  # block 0's two paths drop nothing
    assert np.array_equal(path[0][0], output[0][1]) and np.array_equal(path[1][0], mlp[0][1])
    np.testing.assert_allclose(attention[0][0].sum(-1), 1, rtol=1e-5)


def test_each_flag_of_the_recipe_reaches_the_first_step_and_does_nothing_at_0(tmp_path):
    make_folder(tmp_path, dict(train=4, val=1))
    common = [*TINY, "--data", tmp_path, "--micro-batch-size", 12, "--steps", 1, "--eager"]
    common += ["--lr", 0, "--warmup-steps", 0, "--workers", 1]  # all images are in each batch
    two_steps = [*common, "--no-augment", "--steps", 2]

    def first_loss(flags):
        return run_main(*common, *flags.split()).losses[0]

    plain = first_loss("--no-augment")
    for flags in ("--mixup 0 --cutmix 0 --label-smoothing 0 --drop-rate 0", "--clip-grad 0"):
        assert first_loss(f"--no-augment {flags}") == pytest.approx(plain, abs=1e-6)
    changed = [first_loss(f"--no-augment {flag} 0.5") for flag in (
        "--mixup", "--cutmix", "--label-smoothing", "--drop-rate", "--attn-drop-rate",
        "--drop-path-rate", "--layer-norm-eps",
    )]  # fmt: skip
    changed += [first_loss("--no-augment --seed 3")]  # other weights
    np.testing.assert_allclose(run_main(*two_steps).losses, plain, atol=1e-6)
    mixed = run_main(*two_steps, "--mixup", 0.5).losses  # anew in each epoch
    augmented = first_loss("--random-erasing 0")
    changed += [augmented, first_loss("--random-erasing 0.9")]
    changed += [first_loss("--rand-augment rand-m9-mstd0.5-inc1")]
    assert first_loss("") == augmented
    gaps = np.diff(sorted([plain, mixed[1], *changed]))
    assert gaps.min() > 1e-5, changed


OTHERS = np.array([(0.5, 0.4, 0.3), (0.3, 0.2, 0.1)]).reshape(2, 3, 1, 1)
FLAGS = "--mean 0.5 0.4 0.3 --std 0.3 0.2 0.1 --crop-pct 0.5 --interpolation bicubic"


@pytest.mark.parametrize("flags, size, corner, interpolation, mean, std", [
    ("", (24, 18), (4, 1), "BILINEAR", MEAN, STD),  # 18 = 16 / 0.875
    (FLAGS, (42, 32), (13, 8), "BICUBIC", *OTHERS),
], ids=["ImageNet's", "others"])  # fmt: skip
def test_folders_name_the_labels_and_images_are_resized_cropped_and_normalized(
    tmp_path, flags, size, corner, interpolation, mean, std
):
    ramp = np.concatenate(np.meshgrid(4 * np.arange(64), 5 * np.arange(48), 77), -1).astype("u1")
    for split, name in itertools.product(("train", "val"), ("bee", "wasp")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / split / name / "0.png")
    x, y = corner
    center = Image.fromarray(ramp).resize(size, Image.Resampling[interpolation])
    want = np.array(center.crop((x, y, x + 16, y + 16))).transpose(2, 0, 1) / 255
    flags = f"--random-erasing 0.99 --rand-augment rand-m9 {flags}".split()
    train_set = open_folder(tmp_path, "train", *flags)
    for images in (
        open_folder(tmp_path, "val", *flags), open_folder(tmp_path, "train", "--no-augment", *flags)
    ):
        assert [images[0, i][2] for i in (1, 0)] == [1, 0] == list(images.targets)[::-1]
        np.testing.assert_allclose(images[0, 1][1], (want - mean) / std, atol=1e-5, rtol=0)
    first, again, next_epoch = (train_set[key][1] for key in ((0, 1), (0, 1), (1, 1)))
    assert np.array_equal(first, again) and (first != next_epoch).any()


def open_folder(root, split, *flags):
    return train.FolderImages(split, 16, train.parse_arguments(["--data", str(root), *flags]))


def test_what_a_system_puts_into_folders_is_no_class_and_no_image(tmp_path, capsys):
    make_folder(tmp_path, dict(train=2, val=1))
    names = ".ipynb_checkpoints/0.png", "@eaDir/0.png", "__MACOSX/0.png", "class0/.cache/0.png",
    names += "class0/._0.png", "class0/@eaDir/0.png", "class0/__MACOSX/0.png", "class0/notes.txt",
    more = "class0/more/0.png", "class1/a.JFIF", "class1/b.gif", "class1/c.avif"
    for name in (*names, *more):  # a folder within a class is read
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "train/class0/1.png", tmp_path / "train" / name)
    (tmp_path / "train/class2/more").symlink_to(tmp_path / "train/class0/more")
    images = open_folder(tmp_path, "train")
    assert images.classes == ["class0", "class1", "class2"] and set(more) < set(images.files)
    assert images.targets == [0, 0, 0] + [1] * 5 + [2, 2, 2]
    run_main(*TINY, "--data", tmp_path, "--steps", 1, "--eager", "--micro-batch-size", 11)
    out = capsys.readouterr().out
    assert "images: 11 to train, 3 to validate; 3 classes" in out and "nothing is saved" in out
    below = tmp_path / ".cache/@x"  # names above DIR do not count
    make_folder(below, dict(val=1))
    assert len(open_folder(below, "val").files) == 3


def test_an_image_has_the_colours_that_a_person_sees_or_is_refused_by_name(tmp_path):
    make_folder(tmp_path, dict(val=1))
    folder = tmp_path / "val/class0"
    for mode in ("L", "P", "RGBA", "1", "LA", "CMYK"):
        ending = "tif" if mode == "CMYK" else "png"
        Image.new("RGB", (20, 24), "white").convert(mode).save(folder / f"white-{mode}.{ending}")
    for kind, ending in (("u2", "png"), ("u2", "tif"), ("i4", "tif"), ("f4", "tif")):
        Image.fromarray(np.full((8, 8), 999, kind)).save(folder / f"deep-{kind}.{ending}")
    os.mkfifo(folder / "pipe.png")
    images = open_folder(tmp_path, "val")
    white = np.broadcast_to((1 - MEAN) / STD, (3, 16, 16))
    for i, name in enumerate(images.files[1:12], 1):
        if "white" in name:
            np.testing.assert_allclose(images[0, i][1], white, atol=0.05, err_msg=name)
            continue
        reason = "it is no file" if "pipe" in name else "mode (I|I;16|F) is not of 8 bits"
        with pytest.raises(UsageError, match=f"{name} cannot be read as an image: {reason}"):
            images[0, i]


EVEN = dict(labels=[0, 1] * 8)  # what the images have as targets


@pytest.mark.parametrize("own, message", [
    (dict(targets=[1, 2] * 8), r"target \[2\] is not one of the classes 0 to 1"),
    (dict(targets=[-1, 1] * 8), r"target \[-1\] is not one of"),
    (dict(targets=[0.0, 1.0] * 8), r"targets are float64 of shape \(16,\) and must be classes"),
    (dict(targets=["0", "1"] * 8), "targets are <U1 of shape"),
    (dict(targets=np.eye(2)[[0, 1] * 8]), r"targets are float64 of shape \(16, 2\) and must be"),
    (dict(targets=np.zeros((16, 1), int)), r"targets are int64 of shape \(16, 1\) and must be"),
    (dict(targets=[], **EVEN), "no images"),
    (dict(targets=[1, 0] * 8, **EVEN), "image 0 has the target 0, and in `targets` 1"),
    (dict(targets=np.array([0, 1] * 8, "u1")), ""),  # as good as others
    (dict(pixels=PIXELS.astype(float)), r"image is float64 of shape \(3, 16, 16\) and must be"),
    (dict(pixels=PIXELS[:, 0]), r"image is float32 of shape \(16, 16\) and must be"),
    (dict(pixels=PIXELS[:, :1]), r"images to train are \(., 16, 16\), to validate \(., 16, 16\)"),
    (dict(pixels=[*PIXELS[:5], PIXELS[5, :, :8], *PIXELS[6:]]),
     r"image \(0, 5\) is \(3, 8, 16\), and another one \(3, 16, 16\)"),
])  # fmt: skip
def test_images_and_targets_that_do_not_fit_are_told(own, message):
    flags = [*TINY, "--eager", "--steps", 1, "--micro-batch-size", 16, "--workers", 1]
    for split in ("train", "val"):
        with pytest.raises(UsageError, match=message) if message else contextlib.nullcontext():
            run_main(*flags, data_set=own_images(split, **own))


def test_a_score_of_ones_own_knows_what_its_targets_are():
    flags = [*TINY, "--eager", "--steps", 1, "--micro-batch-size", 8, "--workers", 1]
    images = own_images("train val", targets=[0.5, 2.5] * 8, **EVEN)
    run_main(*flags, data_set=images, score=lambda logits, targets: dict(mean=targets))
    assert Trainer.validations == [[1.5, 16]]


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own_and_validation_other_noise():
    dist.setup()
    args = train.parse_arguments("--accumulation-steps 2 --num-classes 4".split())
    vars(args).update(images=14, batch_size=4, steps=9)
    steps = list(train.training_keys(args, 0))  # three an epoch; two samples wait
    epochs, orders = np.array(steps).reshape(3, 12, 2).transpose(2, 0, 1)
    assert np.array_equal(epochs.T, [[0, 1, 2]] * 12) and set(orders.flat) == set(range(14))
    assert [len(set(order)) for order in orders] == [12] * 3 and len(set(map(str, orders))) == 3
    assert list(train.training_keys(args, 4)) == steps[4:]  # as when resumed
    sets = [train.SyntheticImages(split, 16, args) for split in ("train", "val")]
    assert [(len(images.targets), images.targets[6]) for images in sets] == [(4096, 2), (1000, 2)]
    assert np.array_equal(*(images.patterns for images in sets))
    (_, first, label), (_, again, _), (_, other, _) = sets[0][0, 3], sets[0][9, 3], sets[1][0, 3]
    assert np.array_equal(first, again) and label == 3
    noise = first - other  # of two samples of one class: the pattern is gone, the noise is not
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 2**0.5) < 0.15


def test_the_seed_reaches_the_order_the_images_their_augmentation_and_the_mixing(tmp_path):
    dist.setup()
    make_folder(tmp_path, dict(train=4, val=1))
    for name in ("0.png", "1.png"):  # two files of one image
        Image.fromarray(np.full((24, 20, 3), 99, "u1")).save(tmp_path / "train/class0" / name)
    draws = []
    for seed in (0, 0, 1):
        flags = f"--seed {seed} --data {tmp_path} --random-erasing 0.9"
        args = train.parse_arguments(flags.split())
        made = train.SyntheticImages("train", 16, args)
        found = train.FolderImages("train", 16, args)
        vars(args).update(images=12, batch_size=4, steps=1, own_score=True)
        keys = next(train.training_keys(args, 0))
        epochs = [[((epoch, i), PIXELS[i % 2], i % 2) for i in range(4)] for epoch in (0, 1)]
        mixup = Mixup(0.8, 1.0, num_classes=10)
        (mixed, labels), (mixed_again, _) = (train.make_batch(e, None, args, mixup) for e in epochs)
        noise = made[0, 0][1] - made[0, 10][1]  # of one class
        draws.append([keys, made.patterns, noise, found[0, 0][1], mixed, labels])
        assert not np.allclose(found[0, 0][1], found[0, 1][1])
        # two times the same pair
        assert not np.allclose(mixed[:2], mixed[2:]) and not np.allclose(mixed, mixed_again)
    for first, again, other in zip(*draws):
        assert np.array_equal(first, again) and not np.allclose(first, other, atol=1e-3)


def test_the_seed_sets_the_weights_and_with_the_step_the_masks(tmp_path):
    flags = [*TINY, "--depth", 1, "--eager", "--steps", 3, "--save-every", 2, "--seed", 5]
    flags += ["--resume", "--output-dir", tmp_path]
    with mock.patch.object(flow, "manual_seed", wraps=flow.manual_seed) as manual_seed:
        with pytest.raises(KeyboardInterrupt):
            run_main(*flags, stop_after=2)
        run_main(*flags)
    assert [call.args for call in manual_seed.call_args_list] == [(5,), (5,), (5,), (5 + 2,)]


def test_each_number_of_the_recipe_reaches_what_mixes_smooths_and_erases(tmp_path):
    make_folder(tmp_path, dict(train=4, val=1))
    flags = "--mixup 0.3 --cutmix 0.6 --label-smoothing 0.2 --random-erasing 0.4"
    flags += " --rand-augment rand-m3 --steps 1 --eager --micro-batch-size 12 --num-classes 7"
    names = "Mixup", "create_transform"
    spies = {name: mock.Mock(wraps=getattr(flowvision.data, name)) for name in names}
    with mock.patch.multiple(flowvision.data, **spies):
        run_main(*TINY, "--data", tmp_path, *flags.split())
    numbers = dict(prob=1.0, label_smoothing=0.2, num_classes=7)
    assert spies["Mixup"].call_args == mock.call(0.3, 0.6, **numbers)
    of_val, of_train = (call.kwargs for call in spies["create_transform"].call_args_list)
    assert of_train["is_training"] and not of_val["is_training"]
    wanted = dict(re_prob=0.4, re_mode="pixel", auto_augment="rand-m3", color_jitter=None)
    assert wanted.items() <= of_train.items()


def test_of_equal_logits_the_first_class_is_the_best_of_any_number_of_classes():
    rng = np.random.default_rng(0)
    logits, targets = rng.integers(0, 3, (200, 100)), rng.integers(0, 40, 200)
    own = logits[np.arange(200), targets][:, None]
    is_before = (logits > own) | (logits == own) & (np.arange(100) < targets[:, None])
    scores = train.score_classes(logits.astype("f4"), targets)
    assert np.array_equal(scores["top1"], is_before.sum(1) == 0) and scores["top1"].any()
    assert np.array_equal(scores["top5"], is_before.sum(1) < 5)


def test_initial_weights_have_the_distribution_of_their_kind():
    for name, w in full_weights(small_model()).items():
        if "norm" in name or (name.endswith("bias") and "patch" not in name):
            assert (w == name.endswith("weight")).all(), name
            continue
        uniform = "patch" in name  # within 48^-0.5; else normal
        w = w / ((3 * 48) ** -0.5 if uniform else 0.02)
        assert abs(w.mean()) < 4 / np.sqrt(w.size) and abs(w.std() - 1) < 4 / np.sqrt(2 * w.size)
        assert (abs(w).max() <= 3**0.5) == uniform, name


def test_sizes_are_those_of_the_papers():
    for name, size in MODELS.items():
        _, family, patch, _ = name.split("_")
        mlp = int(size["embed_dim"] * size.get("mlp_ratio", 4))
        assert (size["embed_dim"], size["depth"], size["num_heads"], mlp) == PAPERS[family], name
        assert patch == f"patch{size['patch_size']}"
    assert len(MODELS) == 11


@on_meshes(((1, 1, 2), 0, "graph"), ((1, 2, 1), 0.1, "eager"), ((2, 2, 1), 0, "eager"))
def test_logits_loss_and_gradient_are_flowvisions_with_its_weights_in_float64(mesh, smooth, mode):
    """The gradient is ten times Adam's first state after a step in two micro-batches."""
    def compute(weights):
        theirs.load_state_dict({k: flow.tensor(w) for k, w in weights.items()})
        logits = theirs(flow.tensor(PIXELS[:4].astype(float))).numpy()
        return logits, (np.log(np.exp(logits).sum(1)) - (targets * logits).sum(1)).mean()

    model = small_model(mesh, 0.05, layer_norm_eps=1e-6)
    theirs = vision_transformer.VisionTransformer(num_classes=10, **SIZES).double().eval()
    targets = np.eye(4, 10, dtype="f4") * (1 - smooth) + smooth / 10
    start = {k: w.astype(float) for k, w in to_timm_state_dict(model).items()}
    load_timm_state_dict(model, start)  # and back: the same to the bit
    assert all(np.array_equal(start[k], w) for k, w in to_timm_state_dict(model).items())
    mine = np.split(np.arange(4), mesh[0])[dist.get_coordinates()[0]]  # this replica's share
    images = batch_to_global(PIXELS[mine], 0)
    logits = full_array(model.eval()(images)["prediction_scores"])
    flags = ["--accumulation-steps", "2", "--clip-grad", "0", *["--eager"] * (mode == "eager")]
    trainer = train.Trainer(model, train.parse_arguments(flags), 2)
    loss, _ = trainer.step(PIXELS[mine], targets[mine] if smooth else mine)
    np.testing.assert_allclose(logits, compute(start)[0], atol=2e-6)
    np.testing.assert_allclose(loss, compute(start)[1], atol=2e-6)
    state, rng = train.get_optimizer_state(trainer), np.random.default_rng(1)
    kind = "m" if mode == "graph" else "exp_avg"
    gradients = full_weights(model, lambda name, _: 10 * state[f"optimizer/model.{name}-{kind}"])
    way = {name: rng.standard_normal(g.shape) for name, g in gradients.items()}
    load_weights(model, way)
    move = to_timm_state_dict(model)
    up, down = (compute({k: start[k] + h * move[k] for k in start})[1] for h in (1e-6, -1e-6))
    slope = sum((gradients[name] * way[name]).sum() for name in way)
    np.testing.assert_allclose(slope, (up - down) / 2e-6, atol=2e-5)


def test_validation_counts_each_image_once_as_numpy_does_and_nan_is_wrong():
    args = train.parse_arguments("--micro-batch-size 5 --num-classes 10".split())
    args.own_score = False
    model = small_model(spread=0.1, drop_rate=0.5)
    images, labels = train.SyntheticImages("val", 16, args), np.arange(23) % 10
    images.targets = images.targets[:23]
    pixels = batch_to_global(np.stack([images[0, i][1] for i in range(23)]), 0)
    logits = full_array(model.eval()(pixels)["prediction_scores"]).astype(float)
    w, label_logits = full_weights(model), logits[np.arange(23), labels]
    better = (logits.T > label_logits).sum(0)
    loss = np.mean(np.log(np.exp(logits).sum(1)) - label_logits)
    assert {0, 4} < set(better) and max(better) > 4
    for scale, bias, want in (
        (1, w["head.bias"], [loss, (better < 1).mean(), (better < 5).mean(), 23]),
        (0, np.ones(10), [np.log(10), 3 / 23, 13 / 23, 23]),  # right are class 0, classes 0 to 4
        (1, np.where(np.arange(10) == 3, np.nan, 0), [np.nan, 0, 0, 23]),
    ):
        load_weights(model, {**w, "head.weight": scale * w["head.weight"]})
        head = model.head.bias  # `load_weights` refuses what is not finite
        bias = distribute(flow.tensor(bias.astype("f4")), head.placement, head.sbp)
        head.data.copy_(bias)
        got = train.evaluate(model.train(), images, args, train.score_classes)
        assert list(got.values()) == pytest.approx(want, nan_ok=True) and model.training
    means = train.evaluate(model, images, args, lambda logits, targets: dict(mean_label=targets))
    assert means == dict(mean_label=labels.mean(), images=23)
    for name, of in (("mean", lambda t: [t.mean()]), ("all", lambda t: t[:, None]), ("loss", abs)):
        message = f"score must give a number for each image, not {name} of shape"
        with pytest.raises(UsageError, match=message):
            train.evaluate(model, images, args, lambda _, targets: {name: of(targets)})
    model.train().blocks[1].eval()
    train.evaluate(model, images, args, train.score_classes)
    assert model.blocks[0].training and not model.blocks[1].mlp.dropout.training


@pytest.mark.parametrize("mode", [[], ["--eager"]], ids=["graph", "eager"])
def test_a_frozen_weight_stays_and_weights_that_get_no_gradient_are_told_once(mode, capsys):
    class Partly(VisionTransformer):
        def __init__(self, **options):
            super().__init__(**options)
            self.unused = self.new_parameter(flow.ones(4, 4))
            self.head.weight.requires_grad = False

    model = run_main(*TINY, "--steps", 3, "--weight-decay", 0.5, *mode, model=Partly).model
    assert capsys.readouterr().out.count("no gradient: unused\n") == 1
    flow.manual_seed(0)
    start = full_weights(Partly(**train.model_options(Trainer.last.args)))
    moved = [name for name, weight in full_weights(model).items() if (weight != start[name]).any()]
    assert set(start) - set(moved) == {"unused", "head.weight"}


def test_a_graph_trains_weights_that_had_a_gradient_of_eager_mode():
    model, labels = small_model(depth=1).train(), np.arange(4)
    model(batch_to_global(PIXELS[:4], 0), batch_to_global(labels, -1))["losses"].backward()
    trainer = train.Trainer(model, train.parse_arguments(["--warmup-steps", "0"]), 9)
    losses = [trainer.step(PIXELS[:4], labels)[0] for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_memory_does_not_grow_with_each_new_number():
    images, kilobytes = batch_to_global(PIXELS[:1], 0), []
    for i in range(20_000):
        images * (i / 7)  # as an update with a new learning rate
        if i % 16_000 == 2000:
            full_array(images)  # waits until all is computed
            status = Path("/proc/self/status").read_text()
            kilobytes.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))
    assert kilobytes[1] - kilobytes[0] < 1000


# 7. The script ------------------------------------------------------------------------------------


def train_py(*flags, before=(), **environment):
    """Run train.py to its end; its stderr without the engine's own lines."""
    command = [sys.executable, *before, "train.py", *map(str, flags)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        run = subprocess.run(
            # Files, since a pipe would stay open until the last reader of images has ended.
            command, cwd=HERE, env={**CLEAN, **environment}, stdout=out, stderr=err, text=True,
            timeout=200, start_new_session=True,  # OneFlow's launcher ends its process group
        )
        run.stdout, run.stderr = ((file.seek(0), file.read())[1] for file in (out, err))
    run.stderr = re.sub(r"libibverbs not available.*\n", "", run.stderr)
    return run


def metrics(folder):
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def test_the_default_run_learns_to_tell_held_out_images_and_ends_with_its_figures(tmp_path):
    run = train_py("--output-dir", tmp_path)
    assert run.returncode == 0 and run.stderr == ""
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines[:-1]] == list(range(1, 201))
    assert lines[0].keys() == {"step", "loss", "lr", "epoch", "images_per_s"}
    assert lines[-2]["epoch"] == round(200 / (4096 // 32), 2) == lines[-1]["epoch"]
    assert lines[0]["loss"] > 2 and lines[-1]["top1"] > 0.95 and lines[-1]["images"] == 1000
    first = r"compiling the graph.*\nstep 1  loss \d.*\nstep 10  loss .*  left \d:\d\d:\d\d\n"
    assert re.search(first, run.stdout)
    assert len(re.findall(r"^step \d+  loss", run.stdout, re.M)) == 1 + 20


MISTAKES = {
    "--mean 123.675 116.28 103.53": "--mean: 123.675 must be finite, from 0 to 1",
    "--micro-batch-size -1": "--micro-batch-size: -1 must be finite, from 1 to inf",
    "--lr nan": "--lr: nan must be finite, from 0 to inf",
    "--lr much": "--lr: invalid float value: 'much'",
    "--std 1 0 1": "--std: 0 must be finite, from 1e-06",
    "--crop-pct 87.5": "--crop-pct: 87.5 must be finite, from 0.01 to 1",
    f"--seed {2**62 + 1}": f"--seed: {2**62 + 1} must be finite, from 0 to {2**62}",
    "--mixup 0.2 --micro-batch-size 3": "--micro-batch-size must be even",
    "--data NOWHERE": r"NOWHERE/val/CLASS/\*: 0 images of the classes \[\], and two classes are ne",
    "--data HIDDEN": r"HIDDEN/val/CLASS/\*: 2 images of the classes \['b'\], and two",
    "--data DEEP": r"DEEP/val/CLASS/\*: 4 images of the classes \['images'\], and two",
    "--data ODD": "train and val have other classes: c",
    "--data FEW --num-classes 1": "--num-classes 1 is below 2",
    "--data FEW --rand-augment wild": "--rand-augment wild: Unknown AA policy",
    "--data FEW": "a batch of 32 is more than 4 images",
    "--init-from NOWHERE.pth": "NOWHERE.pth must be a whole .npz or .safetensors file: '.pth'",
    "--init-from VOID.safetensors": "VOID.safetensors must be a whole .*: .*header too small",
    "--init-from ARRAY.npz": "ARRAY.npz must be a whole",
    "--init-from OBJECTS.npz": "OBJECTS.npz must be a whole .*: Object arrays cannot be loaded",
    "--init-from OTHERS.safetensors": "weights are of another model: cls_token is missing; pos_emb",
    "--steps 0": "--steps 0 validates weights: give --init-from",
    "--steps 9 --epochs 9": "--steps and --epochs: give one of them",
    "--steps 9 --warmup-steps 9": "--warmup-steps 9 must be below 9 steps",
}


@pytest.fixture(scope="session")
def bad_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    folders = "ODD/train/a ODD/train/b ODD/train/c ODD/val/a ODD/val/b FEW/train/a FEW/train/b"
    folders += " FEW/val/a FEW/val/b BROKEN/train/a BROKEN/train/b BROKEN/val/a BROKEN/val/b"
    for folder in f"{folders} DEEP/val/images/a DEEP/val/images/b HIDDEN/val/b".split():
        (root / folder).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(root / folder / f"{i}.png")
    (root / "HIDDEN/val/a").mkdir()
    Image.new("RGB", (8, 8)).save(root / "HIDDEN/val/a/._0.png")
    (root / "BROKEN/train/a/1.png").write_text("not an image")
    (root / "VOID.safetensors").touch()
    save_file({"vit.embeddings.cls_token": PIXELS[0]}, root / "OTHERS.safetensors")
    np.save(root / "ARRAY.npy", PIXELS[0])
    (root / "ARRAY.npy").rename(root / "ARRAY.npz")
    np.savez(root / "OBJECTS.npz", weight=np.array([{}]))
    return root


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(bad_folders, flags):
    flags, message = re.sub("([A-Z]{3,})", rf"{bad_folders}/\1", flags), MISTAKES[flags]
    with pytest.raises(UsageError, match=message) as stop:
        run_main(*flags.split())
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 500


@pytest.mark.parametrize("flags, message", [
    ("--tensor-parallel 2 --num-heads 5 --embed-dim 60", "2 tensor-parallel ranks do not divide 5"),
    ("--data BROKEN --micro-batch-size 1 --data-parallel 2 --eager",
     "a/1.png cannot be read as an image"),
])  # fmt: skip
def test_a_mistake_ends_all_with_one_sentence_and_exit_code_2(bad_folders, flags, message):
    run = train_py(*re.sub("([A-Z]{3,})", rf"{bad_folders}/\1", flags).split())
    assert run.returncode == 2, run.stderr
    assert len(re.findall(f"^train.py: .*{message}", run.stderr, re.M)) == 1, run.stderr
    assert "Traceback" not in run.stderr and "UsageError" not in run.stderr
    if "--num-heads" in flags:  # all ranks meet it: what the engine says of broken ends is unheard
        assert run.stderr.count("\n") == 1, run.stderr
    assert ("parameters" in run.stdout) == ("--num-heads" not in flags)  # what was printed is there


LAUNCH = "-m", "oneflow.distributed.launch", "--nproc_per_node"


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def test_under_another_launcher_a_run_does_not_start_its_processes_again():
    before = [*LAUNCH, "2", "--master_port", free_port()]
    flags = [*TINY, "--data-parallel", "2", "--eager", "--steps", "2"]
    run = train_py(*flags, before=before, SLURM_STEP_NUM_TASKS="2", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(set(lines)) == len(lines)  # rank 0 alone prints
    words = [line.split()[0] for line in lines]
    assert words == ["data", "stage", "27,946", "images:", "step", "step", "step"]


def test_ranks_see_no_proxy_and_know_that_they_have_one_core(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("http_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    program = "import os, sys; e = os.environ; sys.exit(any('_proxy' in k.lower() for k in e)"
    program += " or e['OMP_NUM_THREADS'] != '1' or (e['RANK'], e['WORLD_SIZE']) != ('0', '1'))"
    assert train.launch(1, [sys.executable, "-c", program]) == 0


def test_ranks_have_mimalloc_unless_something_else_is_preloaded(monkeypatch, tmp_path):
    program = "import sys; sys.exit('mimalloc' not in open('/proc/self/maps').read())"
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert train.launch(1, [sys.executable, "-c", program]) == 0
    monkeypatch.setenv("LD_PRELOAD", "")
    assert train.launch(1, [sys.executable, "-c", program]) == 1
    monkeypatch.delenv("LD_PRELOAD")
    folder = tmp_path / "with a space/cmeel.prefix/lib"  # where the loader splits the name
    folder.mkdir(parents=True)
    (library,) = (path for path in map(Path, sys.path) if (path / "cmeel.prefix").exists())
    shutil.copy(library / "cmeel.prefix/lib/libmimalloc.so", folder)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "with a space")])
    program = "import os, sys; sys.exit(os.environ['LD_PRELOAD'] != '')"
    assert train.launch(1, [sys.executable, "-c", program]) == 0


@pytest.fixture
def told_by_run(monkeypatch, capsys):
    """told_by_run() calls `train.run` in this process -> what it tells before it ends with 2."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", [""])

    def run():
        with pytest.raises(SystemExit, match="2"):
            train.run()
        return capsys.readouterr().err

    yield run
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_were_started_together_need_to_know_their_ranks(told_by_run, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    before = sys.excepthook, signal.getsignal(signal.SIGINT)
    with mock.patch.dict(os.environ, RANK="0"), mock.patch.object(train, "main") as main:
        train.run()  # each task is a run of its own
    main.assert_called_once()
    assert before == (sys.excepthook, signal.getsignal(signal.SIGINT))  # as after any run
    message = f"train.py: {name} is 2, and this task was not told its rank: README has lines"
    assert told_by_run().startswith(message)


def test_a_rank_waits_for_rank_0_and_without_its_address_it_ends(monkeypatch):
    port, nowhere = free_port(), "no-such-host.invalid"
    for name, value in dict(RANK=1, WORLD_SIZE=2, MASTER_PORT=port, MASTER_ADDR=nowhere).items():
        monkeypatch.setenv(name, str(value))
    vit3d.wait_for_rank_0(seconds=0.2)  # the engine is here: it has met rank 0
    monkeypatch.delitem(sys.modules, "oneflow")
    monkeypatch.setenv("RANK", "0")
    vit3d.wait_for_rank_0(seconds=0.2)  # rank 0 waits for nobody
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", int(port)))
        vit3d.wait_for_rank_0(seconds=0.2)  # nobody listens: the engine is to wait on
        threading.Timer(0.3, server.listen).start()
        vit3d.wait_for_rank_0()
        assert server.accept()
    # When vit3d is imported it waits for 60 s. Here a clock goes a hundred times as fast.
    program = "import time; clock = time.monotonic; time.monotonic = lambda: clock() * 100"
    program += "\nstart = time.monotonic()\ntry: import vit3d"
    program += "\nfinally: print(time.monotonic() - start)"
    environment = {**os.environ, "MASTER_ADDR": nowhere}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and 60 < float(run.stdout)
    assert run.stderr.startswith("vit3d.py: MASTER_ADDR has no IPv4 address")


def test_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = train.parse_arguments(["--output-dir=~/x", "--data=~/y", "--init-from=~/z"])
    paths = [str(path) for path in (args.output_dir, args.data, args.init_from)]
    assert paths == ["/home/me/x", "/home/me/y", "/home/me/z"]


class ImagesOfOnesOwn(train.Dataset):
    """A data set that seeds the engine for each image, as a transform of its may."""

    classes, targets, labels, pixels = [0, 1], [0, 1] * 8, None, PIXELS

    def __init__(self, *arguments):
        pass

    def __getitem__(self, key):
        flow.manual_seed(key[1])
        labels = self.targets if self.labels is None else self.labels
        return key, self.pixels[key[1]], labels[key[1]]


def own_images(splits, **own):
    """The class above with other attributes in these splits."""

    class Images(ImagesOfOnesOwn):
        def __init__(self, split, *arguments):
            vars(self).update(own if split in splits else {})

    return Images


@pytest.mark.parametrize("split, label, message", [
    ("train", 7, "7.* others than in `targets`"), ("val", 0, "others than in `targets`"),
])  # fmt: skip
def test_a_target_of_any_image_that_does_not_fit_is_told(split, label, message):
    labels = [0, label] + [0, 1] * 7
    images = own_images(split, labels=labels)
    flags = [*TINY, "--eager", "--steps", 1, "--micro-batch-size", 16, "--workers", 1]
    refuses(message, *flags, data_set=images)


def test_all_data_sets_but_the_synthetic_one_are_read_in_other_processes():
    args = train.parse_arguments(["--workers", "1"])
    args.own_score = True
    keys = [[(0, i) for i in range(16)]]
    flow.manual_seed(5)
    want = flow.rand(3).numpy()
    for method in ("spawn", "fork"):
        multiprocessing.set_start_method(method, force=True)
        flow.manual_seed(5)
        ((images, _),) = train.load_batches(ImagesOfOnesOwn(), keys, args)
        assert np.array_equal(images, PIXELS[:16]) and np.array_equal(flow.rand(3).numpy(), want)


@on_meshes(((1, 4, 1),))
def test_sequence_parallelism_needs_a_token_for_each_rank(mesh):
    dist.setup(*mesh, sequence_parallel=True)
    with pytest.raises(UsageError, match="sequence_parallel: 2 tokens are fewer than 4 ranks"):
        VisionTransformer(16, 16, 3, 32, 1, 4)


README = (HERE / "README.md").read_text()
TWO, YOURS, OWN_FILE, PREDICT = re.findall(r"```python\n(.*?)```", README, re.S)  # its programs


def run_program(folder, program, *arguments, processes=1, code=0):
    """Run a program beside a copy of vit3d.py, as README says -> its output and its errors."""
    (folder / "yours.py").write_text(program)
    shutil.copy(HERE / "vit3d.py", folder)
    launch = [*LAUNCH, str(processes), "--master_port", free_port()] if processes > 1 else []
    command = [sys.executable, *launch, "yours.py", *map(str, arguments)]
    environment = {**CLEAN, "OMP_NUM_THREADS": "1"}  # or the launcher prints that it sets it
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == code, run.stderr[-3000:]
    return run.stdout, run.stderr


def test_the_first_program_of_the_readme_prints_what_it_shows(tmp_path):
    shown = re.findall(r"```text\n(.*?)```", README, re.S)[0].splitlines()
    out, _ = run_program(tmp_path, TWO, processes=2)
    assert set(shown) <= set(out.splitlines())


def test_the_whole_program_of_the_readme_prints_the_same_on_two_processes_and_on_one(tmp_path):
    of_two, _ = run_program(tmp_path, YOURS.replace("(2, 2, 2", "(2, 1, 1"), processes=2)
    of_one, _ = run_program(tmp_path, YOURS.replace("(2, 2, 2", "(1, 1, 1"))
    losses = of_two.splitlines()[-3:]
    assert of_one.splitlines() == losses and len({float(loss) for loss in losses}) == 3


def test_the_readmes_program_for_a_trained_model_names_the_classes_of_images(tmp_path):
    make_folder(tmp_path, dict(train=8, val=1))
    flags = "--micro-batch-size 24 --steps 9 --lr 0.01 --eager --mean 0.3 0.3 0.3 --std 0.2 0.2 0.2"
    flags += " --num-classes 5"
    run_main(*TINY, *flags.split(), "--data", tmp_path, "--output-dir", tmp_path / "out")
    assert Trainer.validations[0][1] == 1
    paths = sorted(tmp_path.glob("val/*/*.png"))
    lines = [f"{path} {path.parent.name}" for path in paths]
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 999, "u2")).save(deep)
    out, error = run_program(tmp_path, PREDICT, *paths, deep, code=1)
    assert out.splitlines() == lines and len(lines) == 3
    assert error.endswith(f"{deep} is not of 8 bits\n")


# 8. Ends and checkpoints --------------------------------------------------------------------------


def all_end(pids, seconds=10):
    """Whether the processes end in this time, which the kernel needs to take one down."""

    def is_alive(pid):
        status = Path(f"/proc/{pid}/status")
        return status.exists() and "State:\tZ" not in status.read_text()

    deadline = time.time() + seconds
    while any(map(is_alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    return not any(map(is_alive, pids))


def start(folder, *flags):
    """Start train.py and wait for five lines of metrics.jsonl; return it and its children."""
    command = [sys.executable, "train.py", "--output-dir", folder, *flags]
    log, lines = open(folder.with_suffix(".log"), "a"), folder / "metrics.jsonl"
    run = subprocess.Popen(list(map(str, command)), cwd=HERE, env=CLEAN, stdout=log, stderr=log)
    deadline = time.time() + 60
    while not lines.exists() or len(lines.read_text().splitlines()) < 5:
        time.sleep(0.02)
        assert run.poll() is None and time.time() < deadline, Path(log.name).read_text()
    return run, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()


def test_with_one_process_the_end_is_pythons_own(tmp_path):
    program = """if True:
        import atexit, train
        atexit.register(print, "at exit")
        file = open("own.csv", "w")
        file.write("a row")
        train.run()
    """
    shutil.copy(HERE / "train.py", tmp_path)
    flags = "--eager --warmup-steps 0 --steps 9 --clip-grad 0 --lr 1e30".split()
    out, error = run_program(tmp_path, program, *TINY, *flags, code=2)
    assert out.endswith("\nat exit\n")
    told = "(libibverbs not.*\n)*train.py: loss (nan|inf) at step .: lower --lr\n"
    assert re.fullmatch(told, error), error
    assert (tmp_path / "own.csv").read_text() == "a row"


def test_several_processes_need_a_program_in_a_file_and_run_the_main_thread(
    told_by_run, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["", "--data-parallel", "2"])
    monkeypatch.delattr(sys.modules["__main__"], "__file__")  # as at a prompt and in Jupyter
    message = "train.py: several processes run one program: put yours into a file\n"
    assert told_by_run() == message
    told = []
    thread = threading.Thread(target=lambda: told.append(told_by_run()))
    thread.start()
    thread.join()
    assert told == ["train.py: signals end a run, so call it in the main thread\n"]


def test_a_line_is_printed_for_a_twentieth_of_the_steps_but_for_each_100_at_least(tmp_path, capsys):
    dist.setup()
    trainer = train.argparse.Namespace(grad_norm=None, no_gradient=[])
    for steps, printed in ((60, [1, 3, 6, 9]), (9000, [1, 100, 200])):
        log = new_log(tmp_path / str(steps))
        log.args.steps = steps
        for step in range(1, printed[-1] + 1):
            log.add_step(step, 0.5, 0.1, 1, trainer)
        log.file.close()
        lines = re.findall(r"^step (\d+)", capsys.readouterr().out, re.M)
        assert list(map(int, lines)) == printed


def test_the_end_of_the_data_is_no_end_of_a_run():
    class Short(list):
        def __getitem__(self, i):
            return super().__getitem__(i) if i < 10 else next(iter(()))  # raises StopIteration

    flags = [*TINY, "--eager", "--steps", 4, "--micro-batch-size", 4, "--workers", 1]
    for split in ("train", "val"):
        with pytest.raises(StopIteration):
            run_main(*flags, data_set=own_images(split, pixels=Short(PIXELS)))


class Scaled(VisionTransformer):
    """Its logits are multiplied by a weight without dimensions, as in CLIP."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Module()
        self.scale.weight = self.head.new_parameter(flow.tensor(1.5))

    def forward_head(self, x):
        return VisionTransformer.forward_head(self, x) * self.head.gather(self.scale.weight)


class Plateau(Trainer):
    """A schedule that goes by losses."""

    def __init__(self, model, args, steps):
        super().__init__(model, args, steps)
        self.scheduler = train.lr_scheduler.ReduceLROnPlateau(self.optimizer)
        self.scheduler.step = lambda step=self.scheduler.step: step(1.0)


def test_a_schedule_that_goes_by_losses_begins_anew(tmp_path, capsys):
    for _ in range(2):
        run_main(
            *TINY, "--eager", "--steps", 1, "--resume", "--output-dir", tmp_path, trainer=Plateau
        )
    assert "ReduceLROnPlateau begins anew" in capsys.readouterr().out


def new_log(folder, *flags):
    args = train.parse_arguments(["--output-dir", str(folder), "--steps", "9", *flags])
    vars(args).update(images=64, val_images=0, batch_size=32)
    return train.Log(nn.Module(), args, 0)


def test_a_run_in_the_background_goes_on_at_ctrl_c_and_has_its_folder_until_it_ends(
    tmp_path, capsys
):
    dist.setup()
    make_folder(tmp_path / "images", dict(train=2, val=1))
    flags = [*TINY, "--data", tmp_path / "images", "--micro-batch-size", 2, "--eager"]
    folder = tmp_path / "out"
    # A shell starts what stands before `&` in a script so: Ctrl-C is for what runs in front.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    run, readers = start(folder, *flags, "--workers", 1, "--steps", 9999)
    signal.signal(signal.SIGINT, handler)
    for pid in (run.pid, int(readers[0])):
        os.kill(pid, signal.SIGINT)
    with pytest.raises(UsageError, match=f"another run writes to --output-dir {folder}"):
        new_log(folder)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=1)
    run.kill()
    run.wait()
    assert all_end(readers)
    with mock.patch.object(train.fcntl, "lockf", side_effect=OSError("No locks available")):
        new_log(folder, "--resume").file.close()
    assert f"{folder} knows no locks" in capsys.readouterr().out


def test_records_go_on_where_the_file_is_moved_edited_or_removed_and_numpys_are_numbers(tmp_path):
    dist.setup()
    log, path = new_log(tmp_path), tmp_path / "metrics.jsonl"
    log.add(dict(step=1, loss=0.5))
    path.rename(tmp_path / "old")
    log.add(dict(step=2, loss=np.float32(0.5), images=np.int64(3)))
    record = dict(step=2, loss=0.5, images=3, epoch=1.0)
    assert metrics(tmp_path) == [record]
    subprocess.run(["sed", "-i", "s/0.5/0.25/", path], check=True)
    log.add(dict(step=3, loss=0.5))
    assert metrics(tmp_path) == [{**record, "loss": 0.25}, dict(step=3, loss=0.5, epoch=1.5)]
    shutil.rmtree(tmp_path)
    log.add(dict(step=4, loss=0.5))
    assert metrics(tmp_path) == [dict(step=4, loss=0.5, epoch=2.0)]


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    make_folder(tmp_path / "images", dict(train=16, val=2))
    flags = [*TINY, "--depth", 1, "--data", tmp_path / "images", "--workers", 1]
    flags += ["--steps", 20, "--save-every", 2, "--eval-every", 10]
    flags += ["--data-parallel", 2, "--shard-params", "--micro-batch-size", 4, "--eager"]
    run = train_py(*flags, "--output-dir", tmp_path / "full", HTTP_PROXY="http://127.0.0.1:9")
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "killed"
    run, children = start(folder, *flags)
    os.kill(int(children[0]), signal.SIGKILL)  # rank 0; its readers live on for a while
    assert run.wait(timeout=30) in (128 + signal.SIGKILL, 128 + signal.SIGABRT)
    assert all_end(children)
    assert "train.py: a process ended by SIG" in (tmp_path / "killed.log").read_text()
    run = train_py(*flags, "--output-dir", folder, "--resume")
    assert run.returncode == 0, run.stderr
    full, killed = (dict(np.load(tmp_path / k / "checkpoint.npz")) for k in ("full", "killed"))
    assert full.keys() == killed.keys() and len(full) > 3 * 20
    assert all(np.array_equal(full[name], killed[name]) for name in full if name != "run/record")
    for a, b in zip(metrics(tmp_path / "full"), metrics(folder), strict=True):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}


@on_meshes(((2, 1, 1),))
def test_a_graph_that_was_cut_off_ends_with_the_same_bits(mesh):
    flags = [*TINY, "--depth", 1, "--data-parallel", 2, "--shard-params", "--steps", 4]
    flags += ["--save-every", 2, "--resume", "--output-dir"]
    want = full_weights(run_main(*flags, FOLDER / "whole", model=Scaled).model)
    assert want["scale.weight"] != 1.5
    with pytest.raises(KeyboardInterrupt):
        run_main(*flags, FOLDER / "cut", model=Scaled, stop_after=3)
    got = full_weights(run_main(*flags, FOLDER / "cut", model=Scaled).model)
    assert all(np.array_equal(got[name], want[name]) for name in want)


@on_meshes(((1, 1, 2),))
def test_a_pipeline_that_ended_goes_on_as_a_tensor_axis_and_is_validated_as_either(mesh):
    flags = [*TINY, "--steps", 4]
    saved = ["--save-every", 2, "--output-dir", FOLDER / "pipeline"]
    pipeline = "--pipeline-parallel 2 --accumulation-steps 2 --micro-batch-size 16".split()
    tensor = ["--tensor-parallel", 2]
    with pytest.raises(KeyboardInterrupt):
        run_main(*flags, *saved, *pipeline, stop_after=3)
    losses, validation = run_main(*flags, *saved, *tensor, "--resume").losses, Trainer.validations
    at_once = run_main(*flags, *tensor, "--eager").losses
    np.testing.assert_allclose(losses, at_once[2:], atol=1e-5)  # of steps 3 and 4
    checkpoint = FOLDER / "pipeline/checkpoint.npz"
    run_main(*TINY, *pipeline, "--steps", 0, "--init-from", checkpoint)
    np.testing.assert_allclose(Trainer.validations, validation, atol=1e-5)


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_signal_to_the_command_ends_all_processes(tmp_path, name):
    run, children = start(tmp_path / "out", *TINY, "--data-parallel", 2, "--steps", 9999, "--eager")
    run.send_signal(getattr(signal, name))
    assert run.wait(timeout=30) == -getattr(signal, name)
    assert len(children) == 2 and all_end(children)
    assert "Traceback" not in (tmp_path / "out.log").read_text()


@pytest.mark.parametrize("command, told", [
    ("{} > /dev/full", []),  # nor does one that takes nothing
    ("ulimit -f 200; {}", ["[Errno 27] File too large"]),  # the checkpoint
    ("{} >&-", []),  # a closed output does not stop a run
])  # fmt: skip
def test_what_the_system_refuses_is_told_in_one_sentence(tmp_path, command, told):
    train_py = f"{sys.executable} {HERE}/train.py {' '.join(TINY)} --eager --steps 5"
    command = command.format(f"{train_py} --output-dir out")
    run = subprocess.run(
        command, shell=True, cwd=tmp_path, env=CLEAN, capture_output=True, text=True
    )
    assert run.returncode == len(told) and "Traceback" not in run.stderr
    assert re.findall("^train.py: (.*)$", run.stderr, re.M) == told, run.stderr
    assert told or len(metrics(tmp_path / "out")) == 6


@pytest.mark.parametrize("epoch, saved_at, flags", [
    (64, [100, 104], ""), (102, [102, 104], ""), (102, [70, 104], "--save-every 70"),
])  # fmt: skip
def test_it_is_saved_after_each_epoch_of_at_least_100_steps_and_at_the_end(
    tmp_path, epoch, saved_at, flags
):
    pixels = np.resize(PIXELS, (2 * epoch, 3, 16, 16))
    images = own_images("train val", targets=[0, 1] * epoch, pixels=pixels)
    flags = [*TINY, *flags.split(), "--eager", "--steps", 104, "--micro-batch-size", 2]
    with mock.patch.object(train, "save_checkpoint") as save:
        with mock.patch.object(train.Trainer, "step", return_value=(1.0, 0.1)):
            run_main(*flags, "--output-dir", tmp_path, data_set=images)
    assert [call.args[1] for call in save.call_args_list] == saved_at


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_one_before(tmp_path):
    done = []

    def fsync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert len(np.load(tmp_path / done[-1])) > 20  # all of it is written
        assert (tmp_path / "checkpoint.npz").read_text() == "the one before"

    def replace(path, target):  # the one before is there until the new one takes its name
        assert Path(target).read_text() == "the one before"
        done.append(f"{path.name} replaces {target.name}")
        os.replace(path, target)

    (tmp_path / "unfinished.npz").write_text("left by a kill")
    (tmp_path / "checkpoint.npz").write_text("the one before")
    args = train.parse_arguments(["--eager", "--output-dir", str(tmp_path)])
    trainer = train.Trainer(small_model(), args, 9)
    with mock.patch.object(os, "fsync", fsync), mock.patch.object(Path, "replace", replace):
        train.save_checkpoint(trainer, 1)
    assert done == ["unfinished.npz", "unfinished.npz replaces checkpoint.npz"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]
    before = (tmp_path / "checkpoint.npz").read_bytes()
    trainer.model.head.bias.data.copy_(trainer.model.head.bias * math.inf)  # 0 * inf is nan
    with pytest.raises(UsageError, match="head.bias is not finite and is not saved"):
        train.save_checkpoint(trainer, 2)
    assert (tmp_path / "checkpoint.npz").read_bytes() == before


def test_what_comes_after_the_checkpoint_is_cut_from_metrics_and_no_more(tmp_path):
    flags = [*TINY, "--eager", "--steps", 4, "--save-every", 2, "--eval-every", 2]
    flags += ["--output-dir", tmp_path]
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_main(*flags, stop_after=3)
    lines = path.read_bytes().splitlines(keepends=True)
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 2, 3]
    note = b"a note, \xff\r\n"  # of a person: it stays, as do all lines before those that go
    for before, after in (
        ([note, *lines], [note, *lines[:2]]),
        ([lines[0], note, *lines[2:]], [lines[0], note]),  # the step's own line is gone
        ([*lines[:2], b'{"step": 2, "lo'], lines[:2]),
        ([lines[0], b'{"step": 2, "loss": 1'], lines[:1]),
    ):
        path.write_bytes(b"".join(before))
        with pytest.raises(KeyboardInterrupt):
            run_main(*flags, "--resume", stop_after=0)
        got = path.read_bytes().splitlines(keepends=True)
        assert got[:-1] == after and json.loads(got[-1])["images"] == 1000  # of step 2, once more
    (tmp_path / "checkpoint.npz").unlink()
    refuses("metrics.jsonl exists: --resume, or take another --output-dir", *flags)
    run_main(*flags, "--resume", "--steps", 1)
    assert [record["step"] for record in metrics(tmp_path)] == [1, 1]  # anew


def test_epochs_and_model_say_how_long_and_what_is_trained(tmp_path):
    make_folder(tmp_path / "images", dict(train=2, val=1))
    flags = "--model vit_tiny_patch16_224 --epochs 2 --micro-batch-size 3 --eager --workers 1"
    flags = [*flags.split(), "--data", tmp_path / "images", "--output-dir", tmp_path]
    trainer = run_main(*flags)
    assert trainer.model.pos_embed.shape == (1, 197, 192) and len(trainer.model.blocks) == 12
    assert [record["epoch"] for record in metrics(tmp_path)] == [0.5, 1, 1.5, 2, 2]


def test_a_checkpoint_is_used_or_refused_with_a_reason(tmp_path, capsys):
    folder, checkpoint = tmp_path / "run", tmp_path / "run/checkpoint.npz"
    flags = [*TINY, "--steps", 4, "--output-dir", folder]
    run_main(*flags, "--eager")
    validation, before = Trainer.validations, checkpoint.read_bytes()
    np.savez(tmp_path / "timm.npz", **to_timm_state_dict(Trainer.last.model))
    for source in (checkpoint, tmp_path / "timm.npz"):
        run_main(*TINY, "--steps", 0, "--init-from", source, "--output-dir", tmp_path / "of-0")
        assert Trainer.validations == validation and Trainer.last.losses == []
    for record in metrics(tmp_path / "of-0"):
        assert record == {**record, "step": 0, "top1": validation[0][1], "images": 1000}
    assert os.listdir(tmp_path / "of-0") == ["metrics.jsonl"]
    assert "compiling" not in capsys.readouterr().out
    for more, message in (
        ("--eager", "checkpoint.npz exists: --resume .*, or take another --output-dir"),
        ("--eager --resume --micro-batch-size 8", "batch_size was 32 and must not be 8"),
        ("--eager --resume --steps 5", "steps was 4 and must not be 5"),
        ("--eager --resume --num-heads 2", "num_heads was 4 and must not be 2"),
        ("--resume", "eager was True and must not be False"),
    ):
        refuses(message, *flags, *more.split())
    for more, message in (
        ("--embed-dim 16", r"is \(.*\) and must be \("),
        ("--num-heads 2", "num_heads was 4 and must not be 2"),
        ("--steps 0 --layer-norm-eps 1e-6", "layer_norm_eps was 1e-05 and must not be 1e-06"),
    ):
        refuses(message, *TINY, *more.split(), "--init-from", checkpoint)
    larger = run_main(*TINY, "--img-size", 32, "--steps", 1, "--lr", 0, "--init-from", checkpoint)
    want = vit3d.resize_pos_embed(np.load(checkpoint)["pos_embed"], larger.model)
    assert want.shape == (1, 65, 32) and np.array_equal(full_array(larger.model.pos_embed), want)
    capsys.readouterr()
    run_main(*flags, "--eager", "--resume", "--lr", 0.01)  # nothing is left to do
    assert Trainer.last.losses == [] and checkpoint.read_bytes() == before
    out = capsys.readouterr().out
    assert "lr was 0.001 and is 0.01\n" in out and "resume" not in out
    record = json.loads(str(np.load(checkpoint)["run/record"]))
    assert record["lr"] == 0.001 and record["mean"] == [0.485, 0.456, 0.406]
    wrong_bit = bytearray(before)
    wrong_bit[len(before) // 3] ^= 1
    for damaged in (wrong_bit, before[:-99], before[:99], b""):
        checkpoint.write_bytes(damaged)
        refuses(f"{checkpoint} must be a whole .npz", *flags, "--eager", "--resume")
        assert Trainer.last.losses == [] and checkpoint.read_bytes() == damaged


def test_renamed_classes_are_refused_and_other_numbers_of_images_are_told(tmp_path, capsys):
    make_folder(tmp_path, dict(train=4, val=1))
    checkpoint = tmp_path / "run/checkpoint.npz"
    flags = [*TINY, "--data", tmp_path, "--workers", 1, "--micro-batch-size", 4, "--eager"]
    run = [*flags, "--steps", 2, "--output-dir", tmp_path / "run"]
    validate = [*flags, "--steps", 0, "--init-from", checkpoint]
    run_main(*run)
    before, validations = full_weights(Trainer.last.model), Trainer.validations
    assert "images: 12 to train, 3 to validate; 3 classes" in capsys.readouterr().out
    for split in ("train", "val"):
        (tmp_path / split / "class0").rename(tmp_path / split / "zebra")
    refuses("its head is for other classes and .* so there is noth", *validate)
    message = r"classes was \['class0', .* and must not be \['class1', 'class2', 'zebra'\]$"
    refuses(message, *run, "--resume")
    tuned = run_main(*flags, "--steps", 1, "--lr", 0, "--init-from", checkpoint, "--num-classes", 7)
    assert "its head is for other classes and is not loaded" in capsys.readouterr().out
    for name, weight in full_weights(tuned.model).items():
        assert np.array_equal(weight, before[name]) != name.startswith("head."), name
    for split in ("train", "val"):
        (tmp_path / split / "zebra").rename(tmp_path / split / "class0")
    (tmp_path / "train/class0/0.png").unlink()
    run_main(*run, "--resume")
    assert "images was 12 and is 11" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "train")  # validation needs none
    run_main(*validate)
    assert Trainer.validations == validations


def test_weights_of_others_load_without_a_head_and_in_half_precision_or_are_told(tmp_path, capsys):
    run = [*TINY, "--steps", 1, "--lr", 0, "--eager", "--init-from"]
    weights = to_timm_state_dict(run_main(*run[:-1]).model)
    path, half = tmp_path / "a.safetensors", {k: w.astype("f2") for k, w in weights.items()}
    save_file({k: w for k, w in half.items() if "head" not in k}, path)
    capsys.readouterr()
    got = to_timm_state_dict(run_main(*run, path, "--seed", 3).model)
    out = capsys.readouterr().out
    assert "a.safetensors: its head is for other classes and is not" in out
    assert "a.safetensors: weights of timm want --layer-norm-eps 1e-6; README has" in out
    assert all(np.array_equal(got[k], half[k].astype("f4")) == ("head.w" not in k) for k in got)
    save_file({**weights, "head.weight": np.ones((12, 32)), "head.bias": np.ones(12)}, path)
    refuses("its head is for other classes", *TINY, "--steps", 0, "--init-from", path)
    for value, message in (
        (np.ones(32, "i1"), "norm.bias is int8, and weights must be floats"),
        (np.full(32, np.nan), "norm.bias is not finite and is not loaded"),
    ):
        save_file({**weights, "norm.bias": value}, path)
        refuses(message, *run, path)
    header = json.dumps({"norm.bias": dict(dtype="BF16", shape=[1], data_offsets=[0, 2])}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    refuses("a.safetensors must be a whole .npz or .safetensors file: .*bfloat16", *run, path)


def test_a_fine_tuning_that_is_started_again_goes_on_from_its_own_checkpoint(tmp_path):
    first = full_weights(run_main(*TINY, "--eager", "--steps", 1, "--output-dir", tmp_path).model)
    flags = [*TINY, "--eager", "--steps", 2, "--resume", "--init-from", tmp_path / "checkpoint.npz"]
    tuned = full_weights(run_main(*flags, "--output-dir", tmp_path / "tuned").model)
    again = full_weights(run_main(*flags, "--output-dir", tmp_path / "tuned").model)
    for name in first:
        assert np.array_equal(tuned[name], again[name]) and (tuned[name] != first[name]).any()


@on_meshes(((2, 1, 1),))
def test_ranks_that_differ_are_told_in_what(mesh):
    def differ(message, *more, **own):
        refuses(f"the ranks differ in {message}$", *flags, *more, **own)

    root = FOLDER / f"of-{dist.rank}"
    make_folder(root, dict(train=4, val=1))
    (root / "out").mkdir()
    flags = [*TINY, "--data-parallel", 2, "--micro-batch-size", 6, "--workers", 1, "--eager"]
    flags += ["--data", root, "--output-dir", root / "out", "--resume"]
    differ("steps, seed", "--seed", dist.rank, "--steps", 1 + dist.rank)
    if dist.rank:
        np.savez(root / "out/checkpoint.npz", **{"run/record": json.dumps(dict(step=2))})
    differ("the step of the checkpoint")
    if not dist.rank:
        np.savez(root / "out/checkpoint.npz", **{"run/record": json.dumps(dict(step=4))})
    differ("the step of the checkpoint")
    (root / "out/checkpoint.npz").unlink()
    (root / "val/class0/0.png").rename(root / f"val/class0/{dist.rank}.png")
    differ("files")
    for split in ("train", "val"):
        (root / split / "class1").rename(root / split / f"named-{dist.rank}")
    differ("classes, files")
    rolled = own_images("train val", targets=np.roll([0, 1] * 8, dist.rank))
    differ("targets", data_set=rolled)


# 9. Rules of the engine ---------------------------------------------------------------------------

MOVES = re.findall(r"\| `(\S+)` to `(\S+)` \| (.*?) \| `(\S+)` \| `(\S+)` \| (.*?) \|", README)
MOVES.append(("S(0)", "S(1)", "all-to-all", "S(1)", "S(0)", "all-to-all"))
# What both ranks receive for (5, 7), in elements. It is cut as 3 and 2 rows or 4 and 3 columns.
SENT = {"nothing": 0, "a slice": 0, "all-gather": 35, "reduce-scatter": 35, "all-reduce": 70,
        "all-to-all": 2 * 4 + 3 * 3}  # fmt: skip
NORM = (  # in numpy, here
    lambda x, w, b: (x - x.mean(-1)[..., None]) / (x.var(-1)[..., None] + 0.1) ** 0.5 * w + b,
    lambda x, w, b: vit3d.layer_norm(x, w, b, eps=0.1),
)
FUNCTIONS = [  # shapes and sbps of inputs, the sbp of the result, in numpy, here if it differs
    ([(5, 4), S(0), (4, 3), B], S(0), lambda x, a: x @ a),  # products of Linear
    ([(5, 4), B, (4, 3), S(1)], S(1), lambda x, a: x @ a),
    ([(4, 5), S(1), (5, 3), S(0)], P, lambda x, a: x @ a),
    ([(2, 3, 4, 5), S(1), (2, 3, 5, 4), S(1)], S(1), lambda x, a: x @ a),  # some heads
    ([(2, 4, 5), S(2), (5,), S(0)], S(2), lambda x, b: x + b),
    ([(2, 4, 5), S(2)], S(2), lambda x: x * np.vectorize(math.erfc)(-x / 2**0.5) / 2, flow.gelu),
    ([(2, 3, 4, 5), S(1)], S(1), lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
     lambda x: flow.softmax(x, -1)),
    ([(3, 4, 5), S(0), (5,), B, (5,), B], S(0), *NORM),
    ([(2, 3, 5), S(1), (5,), B, (5,), B], S(1), *NORM),  # of some tokens
    ([(2, 3, 12), S(2)], S(1), lambda x: x.reshape(2, 3, 4, 3).swapaxes(1, 2)),  # into heads
    ([(2, 4, 3, 3), S(1)], S(2), lambda x: x.swapaxes(1, 2).reshape(2, 3, 12)),  # and out of them
    ([(2, 3, 4, 6), S(1)], S(1), lambda x: x[..., :2] * x[..., 2:4] - x[..., 4:],
     lambda x: (lambda q, k, v: q * k - v)(*flow.chunk(x, 3, dim=-1))),
]  # fmt: skip


def share(array, sbp):
    """An array -> a global tensor on both ranks. Where it is P their parts differ in sign."""
    placement = dist.get_layer_placement(0)
    if sbp == P:
        return flow.tensor(array * (3, -2)[dist.rank]).to_global(placement=placement, sbp=P)
    return distribute(flow.tensor(array), placement, [sbp])


class Line(nn.Module):
    """A line of Python with a weight w -> a loss of it, and y, whose gradient shows, too."""

    def __init__(self, code, w):
        super().__init__()
        self.code, self.w = code, nn.Parameter(w)

    def forward(self, y, weights):
        y = (y * 1.0).requires_grad_()
        return (eval(self.code) * weights).sum() + self.w.sum(), y


class Step(nn.Graph):
    def __init__(self, line, optimizer=None, scheduler=None):
        super().__init__()
        self.line = line
        self.add_optimizer(optimizer or sgd(list(line.parameters())), lr_sch=scheduler)

    def build(self, *inputs):
        loss, value = self.line(*inputs)
        loss.backward()
        return loss, value if value.grad is None else value.grad


@on_meshes(((1, 2, 1),))
def test_each_move_of_the_table_of_gradients_sends_what_it_says_forward_and_backward(mesh):
    dist.setup(*mesh)
    x, weights = np.random.default_rng(0).standard_normal((2, 5, 7)).astype("f4")
    assert len(MOVES) == 8
    received = []
    for old, new, forward, gradient, grad_sbp, backward in MOVES:
        assert grad_sbp == ("B" if old == "P" else old) or new == "S(0)"  # of the class token
        code = f"y.to_global(sbp={new}, grad_sbp={grad_sbp})"
        with the_plan() as (plan, *_):
            step = Step(Line(code, share(x[:1] * 0, B)))
            loss, x_grad = step(share(x, eval(old)), share(weights, eval(gradient)))
        np.testing.assert_allclose(full_array(loss), (x * weights).sum(), 1e-5, err_msg=code)
        np.testing.assert_allclose(full_array(x_grad), weights, 1e-5, err_msg=code)
        assert x_grad.sbp == (eval(grad_sbp),), code
        if dist.rank == 0:  # at the end, as no rank may stop alone
            got = sum(n for *_, n in plan if n > 1)
            received.append((old, code, got, SENT[forward] + SENT[backward]))
    assert not [row for row in received if row[2] != row[3]]


@on_meshes(((1, 2, 1),))
def test_products_and_functions_on_uneven_shares_are_numpys_forward_and_backward(mesh):
    dist.setup(*mesh)
    rng = np.random.default_rng(0)
    for i, (inputs, sbp, in_numpy, *here) in enumerate(FUNCTIONS):
        arrays = [rng.standard_normal(shape) for shape in inputs[::2]]
        tensors = [share(*pair).requires_grad_() for pair in zip(arrays, inputs[1::2])]
        y = (here[0] if here else in_numpy)(*tensors)
        want = in_numpy(*arrays)
        weights = rng.standard_normal(want.shape)
        assert y.sbp == (sbp,), i
        np.testing.assert_allclose(full_array(y), want, atol=1e-12, err_msg=i)
        (y * share(weights, B if sbp == P else sbp)).sum().backward()
        for array, tensor in zip(arrays, tensors):
            got = full_array(tensor.grad)
            for at in np.ndindex(array.shape):  # the slope between two points beside this one
                ends = []
                for move in (1e-5, -2e-5):
                    array[at] += move
                    ends.append((in_numpy(*arrays) * weights).sum())
                array[at] += 1e-5
                assert abs(got[at] - (ends[0] - ends[1]) / 2e-5) < 1e-8, i


# README's table of habits. For each row there is a program in which `{}` is its wrong form; the
# same in plain operators, whose result on one process is right; and the program of the right form,
# if it is another. A text stands in `Habit.forward`, others at the start or beside the update.
SECTION = README.partition("## Where a PyTorch habit goes wrong")[2].partition("\n## ")[0]
HABIT = r"\| `([^`]+)`[^|]*\| ([^|]+) \| [^|`]*`([^`]+)`[^|]*\| `(\w+)` \|"
HABITS = re.findall(HABIT, SECTION)  # wrong form, what comes out, right form, script
SCHEDULE = """warmup = LinearLR(optimizer, 0.1, total_iters=4)
cosine = CosineAnnealingLR(optimizer, 8)
scheduler = {}"""
RATES = "[0.1, 0.325, 0.55, 0.775, 1.0, 0.5 + 0.5 * math.cos(math.pi / 8)]"
FREEZE = """optimizer = flow.optim.Adam(model.parameters(), lr=0.1)
w.requires_grad_(False)
for _ in range(4):
    model(*inputs)[0].backward()
    optimizer.step()
{}
optimizer.zero_grad(set_to_none=True)"""
PROGRAMS = {
    "x[rows, labels]": ("value = {}", "value = (x * hot).sum(1)"),
    "part = x[:, 1:]; part += t": (
        "{}; value = x", "value = flow.cat([x[:, :1], x[:, 1:] + t], 1)"),
    "nn.Dropout(0.5)": (
        dict(start="model.first = {}; model.second = {}",
             forward="value = (self.first(one) != self.second(one)).float().sum().clamp(max=1.0)"),
        "value = one"),
    "z = x.clone(); z[:, :1] = t": (
        "{}; value = x * z", "value = x * flow.cat([x[:, :1] * 0 + t, x[:, 1:]], 1)"),
    "z = self.zeros.clone(); z[:, :1] = t": (
        "{}; value = z", "value = flow.cat([x[:, :1] * 0 + t, x[:, 1:] * 0], 1)"),
    "nn.init.zeros_(w[:2])": (
        dict(start="{}"), dict(start="w.data.mul_(share(np.float32([[0]] * 2 + [[1]] * 6), B))")),
    "z.copy_(x)": ("z = x * 0; {}; value = z", "value = x"),
    "flow.stack([a, b], -1)": (
        "value = {} * y[..., None]", "value = flow.cat([a * y, b * y], -1)"),
    "y *= w": ("{}; value = y", "value = y * w"),
    "flow.where(n > 0, n, 1.0)": ("value = {}", "value = one"),
    "SequentialLR(optimizer, [warmup, cosine], [4])": (
        dict(start=SCHEDULE, steps=6),
        dict(before=f"optimizer.param_groups[0]['lr'] = {RATES}[step]", steps=6)),
    "clip_grad_max_norm=1.0": (
        dict(start="optimizer = sgd([w], [bias], {}, clip_grad_norm_type=2.0)"),
        dict(before="w.grad.div_((w.grad.square().sum() + bias.grad.square().sum()).sqrt())"),
        dict(start="optimizer = sgd([w, bias], clip_grad_max_norm=1.0, clip_grad_norm_type=2.0)",
             before="{}")),
    "loss.backward()": (
        dict(start="loss, _ = model(*inputs); {}"), "value = x",
        dict(start="loss, _ = model(*inputs); loss.backward(); {}")),
    "buffer += x.mean(0)": (
        "{}; value = buffer", dict(forward="value = x.mean(0)", after="buffer.copy_(value)"),
        dict(forward="value = buffer + x.mean(0)", after="{}")),
    "layer.register_forward_hook(hook)": (
        dict(start="{}", forward="value = self.layer(x)"), "value = x.relu()"),
    "w.requires_grad_()": (
        dict(start=FREEZE), dict(before="w.grad.copy_(w.grad.sign() * 0.1)"),
        dict(start=FREEZE.replace("{}", "w.requires_grad_(); {}"))),
    "g.norm()": ("value = {}", "value = (g * g).mean().sqrt() * 8"),
    "flow.optim.AdamW(model.parameters(), lr=0.1)": (
        dict(start="optimizer = {}"),
        dict(before="w.grad.copy_(w.grad.sign() * 0.1 + w.detach() * 0.1 * 0.01)")),
}  # fmt: skip


def sgd(*groups, **settings):
    return flow.optim.SGD([dict(params=group, **settings) for group in groups], lr=1.0)


class Habit(nn.Module):
    def __init__(self, lines, w):
        super().__init__()
        self.lines = lines
        self.w = nn.Parameter(w)
        self.bias = nn.Parameter(w[0] * 0)
        self.register_buffer("buffer", w[0] * 0)
        self.zeros = w * 0
        self.layer = nn.Identity()

    def forward(self, y, labels):
        x = flow.matmul(y, self.w)
        numbers = flow.arange(8, placement=y.placement, sbp=B)
        names = dict(self=self, w=self.w, t=self.w[0, :1], buffer=self.buffer, labels=labels)
        names.update(x=x * 1, y=y * 1, a=x, b=x.square(), g=x.detach(), one=x * 0 + 1)
        names.update(rows=numbers.to_global(sbp=labels.sbp))
        names.update(hot=(labels[:, None] == numbers).float())
        names.update(n=-0.9 * (labels == 0).float().sum())  # -0.9 on a replica, -1.8 on the other
        exec(self.lines, globals(), names)
        value = names["value"].float()
        bias = (self.bias - self.bias.detach()).sum()  # 0, with a gradient
        return x.square().mean() + value.square().mean() + bias, value


def run_habit(program, code, sbps, mode):
    """-> the last loss, and this rank's weight and buffer after it"""
    parts = dict(forward="value = x", start="", before="", after="", steps=1)
    parts.update(program if isinstance(program, dict) else dict(forward=program))
    parts = {name: str(part).replace("{}", code) for name, part in parts.items()}
    y, w = np.random.default_rng(0).standard_normal((2, 8, 8)).astype("f4")
    inputs = share(y, sbps[0]), share(np.array([0, 1, 2, 3, 0, 0, 4, 5]), sbps[1])
    model = Habit(parts["forward"], share(w, B))
    names = {**vars(flow.optim.lr_scheduler), **vars(vit3d), **globals()}
    names.update(model=model, w=model.w, bias=model.bias, buffer=model.buffer, layer=model.layer)
    names.update(inputs=inputs, hook=lambda layer, inputs, y: y.relu(), Hook=nn.ReLU)
    names.update(optimizer=sgd(list(model.parameters())), scheduler=None)
    exec(parts["start"], names)
    optimizer = names["optimizer"]
    scheduler = names["scheduler"]
    graph = Step(model, optimizer, scheduler) if mode == "graph" else None
    for names["step"] in range(int(parts["steps"])):
        loss, names["value"] = (graph or model)(*inputs)
        if not graph:
            loss.backward()
            exec(parts["before"], names)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
        exec(parts["after"], names)
    return full_array(loss), model.w.to_local().numpy(), model.buffer.to_local().numpy()


def check_habits(mesh):
    dist.setup(*mesh)
    for wrong, seen, right, _ in HABITS:
        sbps = (S(1), B) if wrong == "y *= w" else (S(0), S(0))  # of columns, or of images
        of_wrong, plain, *of_right = PROGRAMS[wrong]
        want = run_habit(plain, "", (B, B), "eager")

        def is_right(program, code, mode):
            got = run_habit(program, code, sbps, mode)
            return all(np.allclose(*pair, 1e-5, 1e-5) for pair in zip(got, want))

        for mode in ("eager", "graph"):
            assert is_right(of_right[0] if of_right else of_wrong, right, mode), f"{right}, {mode}"
        if mesh == (1, 1, 1) and "two " in seen:
            continue
        for mode in re.findall("eager|graph", seen) or ("eager", "graph"):
            if f"{mode}: an error" in seen:
                with pytest.raises(Exception):
                    run_habit(of_wrong, wrong, sbps, mode)
            else:
                assert not is_right(of_wrong, wrong, mode), f"{wrong}, {mode}, is right"


def test_habits_go_wrong_and_their_cures_are_right_on_one_process():
    assert [wrong for wrong, *_ in HABITS] == list(PROGRAMS)
    assert len(HABITS) == SECTION.count("\n|") - 2  # without the head
    assert all((HERE / "findings" / f"{script}.sh").exists() for *_, script in HABITS)
    check_habits((1, 1, 1))


@on_meshes(((2, 1, 1),))
def test_habits_go_wrong_and_their_cures_are_right_on_two_processes(mesh):
    check_habits(mesh)


class Swishes(nn.Module):
    """Without clipping an update comes too early here, but not where layers have a layer_idx."""

    no_weight_decay = set  # of names: none

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Linear(64, 64, layer_idx=None) for _ in range(6)))
        load_weights(self, {name: 3 * weight for name, weight in full_weights(self).items()})

    def forward(self, x, labels):
        for block in self.blocks:
            y = block(x)
            x = x + y * flow.sigmoid(y)
        return {"losses": nn.functional.cross_entropy(x, labels)}


def test_without_clipping_too_an_update_waits_until_the_last_backward_pass_ends():
    dist.setup()
    x = np.random.default_rng(0).standard_normal((32, 64)).astype("f4")
    weights = []
    for mode in ("--accumulation-steps=4", "--eager"):
        flow.manual_seed(0)
        args = train.parse_arguments(["--clip-grad=0", "--lr=0.01", mode])
        trainer = Trainer(Swishes(), args, 100)
        for _ in range(5):
            trainer.step(x, np.arange(32))
        weights.append(full_weights(trainer.model))
    differences(*weights)


# 10. A model of your own --------------------------------------------------------------------------

# What people change, as classes to copy. Layers and models need `vit3d.py` alone. For a trainer
# write `from train import Trainer`: here it is the one of section 2. `train.run` trains them.


class RMSNorm(Layer):
    """x / sqrt(mean of x^2 + eps) * weight over the last axis, (..., c) -> the same, hidden sbp.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
    """

    def __init__(self, hidden_size, eps=1e-6, *, layer_idx):
        super().__init__(layer_idx)
        self.eps = eps
        self.weight = self.new_parameter(flow.ones(hidden_size))

    def forward(self, x):
        scale = flow.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)  # (..., c) -> (..., 1)
        # The product spreads the scale over c. On a CPU x * scale would take ten times as long.
        return x * flow.matmul(scale, self.gather(self.weight).reshape(1, -1))


class SwiGLU(nn.Module):
    """An MLP with a gate, (b, n, c) -> (b, n, c) in the hidden sbp (Shazeer, arXiv:2002.05202)."""

    def __init__(self, hidden_size, ffn_hidden_size, *, layer_idx):
        super().__init__()
        c, inner = hidden_size, ffn_hidden_size
        self.gate = Linear(c, inner, parallel="col", layer_idx=layer_idx)
        self.value = Linear(c, inner, parallel="col", layer_idx=layer_idx)
        self.dense = Linear(inner, c, parallel="row", layer_idx=layer_idx)

    def forward(self, x):
        # Both factors are split alike, so the product needs no move.
        x = flow.silu(self.gate(x)) * self.value(x)  # (b, n, c) -> (b, n, inner) [S(0), S(2)]
        return self.dense(x)  # [S(0), S(2)] -> hidden


class GroupedQueryAttention(Layer):
    """Self-attention whose k and v have fewer heads than q, (b, n, c) -> (b, n, c).

    Source: Ainslie et al., 2023, arXiv:2305.13245.
    """

    def __init__(self, hidden_size, num_heads, num_kv_heads, *, layer_idx):
        super().__init__(layer_idx)
        c = hidden_size
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size = c // num_heads
        self.query = Linear(c, c, parallel="col", layer_idx=layer_idx)
        # Each tensor-parallel rank has some kv heads. If they are too few, each has all of them.
        parallel = "data" if num_kv_heads % dist.tensor_parallel_size else "col"
        features = 2 * num_kv_heads * self.head_size
        self.key_value = Linear(c, features, parallel=parallel, layer_idx=layer_idx)
        self.dense = Linear(c, c, parallel="row", layer_idx=layer_idx)

    def forward(self, x):
        (b, n, _), size = x.shape, self.head_size
        # (b, n, c) [S(0), S(2)] -> (b, heads, n, size) [S(0), S(1)]
        query = self.query(x).reshape(b, n, self.num_heads, size).permute(0, 2, 1, 3)
        # k and v lie side by side within each kv head, so a slice of the features is whole heads.
        # (b, n, features) [S(0), S(2)] or [S(0), B] -> (b, kv_heads, n, 2 size) [S(0), S(1)] or B
        kv = self.key_value(x).reshape(b, n, self.num_kv_heads, 2 * size).permute(0, 2, 1, 3)
        # Each kv head serves a group of neighbouring queries: (b, kv_heads, group, n, 2 size), then
        # (b, heads, n, 2 size). (`repeat_interleave` takes no global tensors.)
        group = self.num_heads // self.num_kv_heads
        kv = kv.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)
        # [S(0), B] -> [S(0), S(1)]: each rank keeps the heads of its queries. [S(0), S(1)] stays.
        # Without this line the engine makes the move itself, and aborts in the backward pass.
        kv = kv.to_global(sbp=query.sbp, grad_sbp=kv.sbp)
        key, value = flow.chunk(kv, 2, dim=-1)
        scores = flow.matmul(query, key, transpose_b=True, alpha=size**-0.5)
        context = flow.matmul(flow.softmax(scores, dim=-1), value)
        # (b, heads, n, size) [S(0), S(1)] -> (b, n, c) [S(0), S(2)] -> hidden
        return self.dense(context.permute(0, 2, 1, 3).flatten(2))


def sin_cos_positions(height, width, c):
    """Fixed positions of the patches, (1, height width, c): a quarter of c for each function."""
    rates = 1e4 ** -(np.arange(c // 4) / (c // 4))
    rows_and_columns = np.divmod(np.arange(height * width), width)
    angles = [np.outer(at, rates) for at in rows_and_columns]
    table = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(table, 1)[None].astype(np.float32)


class Modern(VisionTransformer):
    """All of the above, registers in place of the class token, and an average of the patches.

    `num_kv_heads` has a number for each block. Source of registers: Darcet et al., 2023,
    arXiv:2309.16588.
    """

    def __init__(self, embed_dim, num_heads, num_kv_heads=(2, 1), num_registers=2, **options):
        super().__init__(embed_dim=embed_dim, num_heads=num_heads, **options)
        c = embed_dim
        # A block keeps its stage, its residual sums and its DropPath. These parts have no Dropout.
        for i, block in enumerate(self.blocks):
            kv_heads = num_kv_heads[i]
            block.input_layernorm = RMSNorm(c, layer_idx=i)
            block.self_attention = GroupedQueryAttention(c, num_heads, kv_heads, layer_idx=i)
            block.post_attention_layernorm = RMSNorm(c, layer_idx=i)
            block.mlp = SwiGLU(c, 3 * c, layer_idx=i)
        self.norm = RMSNorm(c, layer_idx=-1)
        del self.cls_token, self.pos_embed
        registers = nn.init.normal_(flow.empty(1, num_registers, c), std=0.02)
        self.registers = self.new_parameter(registers)
        table = flow.tensor(sin_cos_positions(*self.patch_embed.grid, c))
        # A buffer lies on the stage that uses it, here the first. Checkpoints do not hold it.
        placement, sbp = dist.get_layer_placement(0), dist.get_nd_sbp([B, B])
        self.register_buffer("positions", distribute(table, placement, sbp))

    def no_weight_decay(self):
        return {"registers"}

    def forward_features(self, x):
        x = self.patch_embed(x) + self.positions
        registers = self.gather(self.registers).expand(x.shape[0], -1, -1)
        # [B, B] -> [S(0), B]: a slice, as of the class token in VisionTransformer
        registers = registers.to_global(sbp=x.sbp, grad_sbp=x.sbp)
        x = flow.cat((registers, x), dim=1)  # (b, patches, c) -> (b, tokens, c)
        x = x.to_global(sbp=dist.get_hidden_sbp(), grad_sbp=x.sbp)  # [S(0), B] -> hidden
        return self.blocks(self.pos_drop(x))

    def forward_head(self, x):
        x = self.norm(x)
        # hidden -> [S(0), B]: each rank averages all patches of its replica's images
        x = x.to_global(sbp=dist.get_nd_sbp([S(0), B]), grad_sbp=x.sbp)
        patches = x[:, self.registers.shape[1] :]
        return self.head(patches.mean(1))  # (b, patches, c) -> (b, c) -> (b, num_classes)


class DistillationLoss(nn.Module):
    """Half the cross entropy of the labels, half that of a teacher's probabilities -> scalar."""

    def forward(self, logits, teacher_like, labels, teacher_logits):
        probabilities = flow.softmax(teacher_logits, dim=-1)
        soft = -(probabilities * flow.log_softmax(teacher_like, dim=-1)).sum(-1).mean()
        return (nn.functional.cross_entropy(logits, labels) + soft) / 2


class Distilled(VisionTransformer):
    """A second head learns what a teacher says (DeiT, Touvron et al., 2020, arXiv:2012.12877)."""

    def __init__(self, embed_dim, num_classes, **options):
        options["loss_func"] = DistillationLoss()
        super().__init__(embed_dim=embed_dim, num_classes=num_classes, **options)
        self.head_of_teacher = Linear(embed_dim, num_classes, layer_idx=-1)

    def forward_head(self, x):
        x = self.norm(x)
        x = x.to_global(sbp=dist.get_nd_sbp([S(0), B]), grad_sbp=x.sbp)  # hidden -> [S(0), B]
        return self.head(x[:, 0]), self.head_of_teacher(x[:, 0])

    def forward(self, images, labels=None, teacher_logits=None):
        """Images on the first stage, labels and teacher_logits on the last, all [S(0), B]."""
        logits, teacher_like = self.forward_head(self.forward_features(images))
        if labels is not None and self.training:
            return {"losses": self.loss_func(logits, teacher_like, labels, teacher_logits)}
        return {"prediction_scores": (logits + teacher_like) / 2}


class WithTeacher(Trainer):
    """Each rank asks the teacher about the images of its replica, as numpy arrays."""

    def step(self, images, labels):
        return super().step(images, labels, self.teacher(images))

    def teacher(self, images):  # a model of yours; this one looks at 16 pixels
        return images[:, 0, :4, :4].reshape(-1, 16)


class LoraLinear(Linear):
    """W x + B A x with small A and B. Source: LoRA, Hu et al., 2021, arXiv:2106.09685."""

    def __init__(self, in_features, out_features, parallel, rank=4, *, layer_idx):
        super().__init__(in_features, out_features, parallel=parallel, layer_idx=layer_idx)
        # A is split as the inputs of W are, B as its outputs.
        a, b = ("data", "col") if parallel == "col" else ("row", "data")
        self.lora_a = Linear(in_features, rank, bias=False, parallel=a, layer_idx=layer_idx)
        self.lora_b = Linear(rank, out_features, bias=False, parallel=b, layer_idx=layer_idx)
        self.lora_b.weight.data.zero_()  # at first the layer computes what it did without them

    def forward(self, x):
        # Not super().forward: in a graph `self` is a stand-in, of another class.
        return Linear.forward(self, x) + self.lora_b(self.lora_a(x))


class Adapted(VisionTransformer):
    """Frozen but for adapters in each MLP and the head."""

    def __init__(self, **options):
        super().__init__(**options)
        for i, block in enumerate(self.blocks):
            c, inner = block.mlp.dense_4h_to_h.weight.shape
            block.mlp.dense_h_to_4h = LoraLinear(c, inner, "col", layer_idx=i)
            block.mlp.dense_4h_to_h = LoraLinear(inner, c, "row", layer_idx=i)
        for name, p in self.named_parameters():
            p.requires_grad = "lora_" in name or name.startswith("head.")


class WithAverage(Trainer):
    """Keeps an average of each weight over the steps (EMA), on the same mesh as the weight."""

    averages = None

    def step(self, *batch):
        if self.averages is None:  # at the first step, when weights from a file are there
            self.averages = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        result = super().step(*batch)
        for name, p in self.model.named_parameters():
            average = self.averages[name]
            average.copy_(0.9 * average + 0.1 * p.detach())
        return result


OWN = {
    # kind: model, trainer, and how much the tensor axis sends, in all-reduces of (b, n, c)
    # 6 a block: forward one for each "row", backward one for each "col". Where k and v are "data",
    # their gradients are gathered instead, which sends as much.
    "modern": (Modern, Trainer, 12),
    "distilled": (Distilled, WithTeacher, 8),  # 4 a block, as VisionTransformer
    # 2 fewer, as nothing learns before the first block's MLP. Adapters have 4 of 32 features and
    # add 4 / 8.
    "adapted": (Adapted, WithAverage, 6.5),
}


def train_own(mesh, kind, mode, micro_batches):
    model, trainer, _ = OWN[kind]
    got = train_steps(mesh, "own", mode, micro_batches, 2, model=model, trainer=trainer)
    averages = getattr(Trainer.last, "averages", {})
    return {**got, **{f"average of {name}": full_array(a) for name, a in averages.items()}}


def make_own_references():
    for kind in OWN:
        np.savez(FOLDER / f"{kind}.npz", **train_own((1, 1, 1), kind, "eager", 1))
    (FOLDER / "mine.py").write_text(
        "import test_vit3d, train\ntrain.run(test_vit3d.with_line(test_vit3d.STACK))"
    )
    os.environ["VIT3D_MINE"] = json.dumps([str(FOLDER / "mine.py")])
    np.savez(FOLDER / "mine-eager.npz", **train_mine((1, 1, 1), "eager", 1))


@on_meshes(
    ((2, 1, 1), "modern"), ((1, 2, 1), "modern"), ((1, 1, 2), "modern"),
    ((1, 1, 2), "distilled"), ((1, 2, 1), "distilled"), ((1, 2, 1), "adapted"),
)
def test_a_model_of_your_own_trains_as_on_one_process(mesh, kind):
    with the_plan() as (plan, *_):
        got = train_own(mesh, kind, "graph", 2)
    differences(got, np.load(FOLDER / f"{kind}.npz"))
    if mesh == (1, 2, 1) and dist.rank == 0:  # a wrong "col" or "row" may only send more
        tokens = 18 if kind == "modern" else 17
        all_reduce = 2 * 4 * 16 * tokens * 32  # bytes, for 16 images and 32 features
        assert bytes_by_axis(plan)["tensor"] == OWN[kind][2] * all_reduce


class Sign(flow.optim.SGD):
    """An optimizer that the engine does not know: its steps have the size of the rate."""

    def step(self):
        for p in self.param_groups[0].parameters:
            p.data.copy_(p - self.param_groups[0]["lr"] * p.grad.sign())


def with_optimizer(kind, groups=1, **options):
    """A trainer class with another optimizer, of which each group has a part of the weights."""

    class Own(Trainer):
        def __init__(self, model, args, steps):
            super().__init__(model, args, steps)
            clip = dict(clip_grad_max_norm=args.clip_grad, clip_grad_norm_type=2.0)  # of a graph
            weights = list(model.parameters())
            parts = [dict(params=weights[i::groups], **clip) for i in range(groups)]
            self.optimizer = kind(parts, lr=args.lr, **options)
            self.scheduler = train.lr_scheduler.CosineDecayLR(self.optimizer, steps)

    return Own


def test_a_trainers_own_optimizer_is_that_of_its_graph_or_is_refused(tmp_path):
    flags = [*TINY, "--steps", 4, "--weight-decay", 99, "--output-dir", tmp_path, "--save-every", 2]
    message = "a graph takes SGD, Adagrad, Adam, AdamW or RMSprop, with one group and its clip_grad"
    sgd = flow.optim.SGD
    for refused in (
        with_optimizer(Sign), with_optimizer(flow.optim.Adadelta), with_optimizer(sgd, 2),
        with_optimizer(lambda groups, lr: sgd([dict(params=groups[0]["params"])], lr=lr)),
    ):
        refuses(message, *flags, trainer=refused)
    for kind in (flow.optim.SGD, flow.optim.AdamW):  # which decays all weights here, in both modes
        own = with_optimizer(kind, **dict(weight_decay=0.5) if kind == flow.optim.AdamW else {})
        losses = [run_main(*flags[:-4], *mode, trainer=own).losses for mode in ([], ["--eager"])]
        np.testing.assert_allclose(*losses, atol=1e-5)
    run_main(*flags, "--eager", trainer=with_optimizer(Sign))
    refuses("optimizer was Sign and must not be AdamW", *flags, "--eager", "--resume")


MINE = """
import numpy as np
from train import Dataset, SyntheticImages, Trainer, VisionTransformer, run

class Mine(VisionTransformer):
    def no_weight_decay(self):
        print("the model is mine")
        return {"pos_embed"}

class MyTrainer(Trainer):
    def step(self, *batch):
        loss, lr = super().step(*batch)
        print("so is the trainer")
        return loss, lr

class MyImages(Dataset):
    def __init__(self, split, img_size, args):
        self.classes = ["dark", "light"]
        self.targets = [0, 1] * 8
        self.img_size = img_size

    def __getitem__(self, key):
        target = self.targets[key[1]]
        return key, np.full((3, self.img_size, self.img_size), target, np.float32), target

def my_score(logits, targets):
    return {"mean_target": targets}

if __name__ == "__main__":
    run(model=Mine, trainer=MyTrainer, data_set=MyImages, score=my_score)
"""


def test_run_trains_classes_of_your_own_from_a_file_of_your_own(tmp_path):
    (tmp_path / "short.py").write_text(OWN_FILE)
    assert read_own(tmp_path / "short.py")["model"].__name__ == "Mine"
    shutil.copy(HERE / "train.py", tmp_path)
    flags = [*TINY, "--data-parallel", 2, "--eager", "--steps", 1, "--micro-batch-size", 4]
    out, _ = run_program(tmp_path, MINE, *flags, "--workers", 1, "--output-dir", "out")
    assert out.count("so is the trainer") == 2 <= out.count("the model is mine")
    assert metrics(tmp_path / "out")[1] == dict(step=1, mean_target=0.5, images=16, epoch=0.5)


def test_an_average_moves_by_a_tenth_of_each_step():
    trainer = WithAverage(small_model(spread=0.1), train.parse_arguments(["--eager"]), 9)
    before = full_weights(trainer.model)
    trainer.step(PIXELS[:4], np.arange(4))
    for name, after in full_weights(trainer.model).items():
        average = full_array(trainer.averages[name])
        np.testing.assert_allclose(average, 0.9 * before[name] + 0.1 * after, rtol=0, atol=1e-6)


def test_weights_without_adapters_load_and_only_adapters_and_the_head_learn():
    plain, adapted = small_model(spread=0.1), Adapted(**SIZES, num_classes=10)
    weights = full_weights(plain)
    with pytest.raises(UsageError, match="lora_a.weight is missing"):
        load_weights(adapted, weights)
    load_weights(adapted, weights, may_be_missing=("lora_",))
    images = batch_to_global(PIXELS[:4], 0)
    logits = [full_array(model.eval()(images)["prediction_scores"]) for model in (plain, adapted)]
    np.testing.assert_allclose(*logits, atol=1e-6)
    train.Trainer(adapted, train.parse_arguments(["--eager"]), 9).step(PIXELS[:4], np.arange(4))
    for name, weight in full_weights(adapted).items():
        if name in weights and not name.startswith("head."):
            assert np.array_equal(weight, weights[name]), name
    noisy = {name: weight + 1 for name, weight in full_weights(adapted).items()}
    load_weights(adapted, noisy, may_be_missing=("lora_",))  # what is there is loaded
    for name, weight in full_weights(adapted).items():
        np.testing.assert_allclose(weight, noisy[name], atol=1e-6)


class IndexedLoss(nn.Module):
    """A cross entropy as one writes it in PyTorch. The gradient of indexing is wrong on shares."""

    def forward(self, logits, labels):
        rows = flow.arange(len(labels), placement=labels.placement, sbp=labels.sbp)
        return -flow.log_softmax(logits, dim=-1)[rows, labels].mean()


class Indexed(VisionTransformer):
    def __init__(self, **options):
        super().__init__(**{**options, "loss_func": IndexedLoss()})


def test_copies_are_compared_after_step_1_and_before_each_save_and_validation(tmp_path):
    done, any_one = mock.Mock(), mock.ANY
    flags = [*TINY, "--eager", "--steps", 6, "--save-every", 3, "--eval-every", 4]
    spies = dict(require_equal_copies=done.compare, save_checkpoint=done.save)
    with mock.patch.multiple(train, **spies):
        run_main(*flags, "--output-dir", tmp_path)
    compare = mock.call.compare(any_one)
    assert done.mock_calls == [
        compare, compare, mock.call.save(any_one, 3), compare, compare, mock.call.save(any_one, 6)
    ]
    assert len(Trainer.validations) == 2  # of steps 4 and 6


@on_meshes(((2, 1, 1),))
def test_copies_that_differ_end_a_run_before_it_saves(mesh):
    folder = FOLDER / "copies"
    flags = [*TINY, "--data-parallel", 2, "--eager", "--steps", 1, "--output-dir", folder]
    message = "the copies of .* on ranks .0, 1. differ by .*: README, 'Where a PyTorch habit"
    refuses(message, *flags, model=Indexed)
    assert not (folder / "checkpoint.npz").exists()
    model = new_model(1)
    require_equal_copies(model)
    on_mesh = dict(placement=dist.get_layer_placement(0), sbp=[B])
    model.norm_of_batch = nn.BatchNorm1d(3).to_global(**on_mesh)
    model.norm_of_batch.train()(batch_to_global(PIXELS[4 * dist.rank :][:4, :, 0, 0], 0))
    with pytest.raises(UsageError, match="the copies of norm_of_batch.running_mean"):
        require_equal_copies(model)
    del model.norm_of_batch
    flow.manual_seed(dist.rank)
    model.order = nn.Parameter(flow.randperm(9, **on_mesh).to(flow.float32))
    with pytest.raises(UsageError, match="the copies of order"):
        require_equal_copies(model)
    model.register_buffer("local", flow.arange(4) + dist.rank)  # of each rank: it has no copies
    model.order = nn.Parameter(distribute(flow.ones(9), **on_mesh))
    own_copy = model.order.detach().to_local()  # the same memory
    own_copy.mul_(1 + 1e-6 * dist.rank)
    require_equal_copies(model)  # machines of two kinds may round apart
    own_copy.mul_(1 + 1e-3 * dist.rank)
    with pytest.raises(UsageError, match="the copies of order .* differ by 1.0e-03"):
        require_equal_copies(model)


# 11. The proof for a model of your own: python test_vit3d.py mine.py ------------------------------

IN_README = "README, 'Where a PyTorch habit goes wrong'"  # what a row about a mistake ends with


class Probe(Recorder):
    """In front of a trainer class: it keeps what the model was given last."""

    def to_mesh(self, *batch):
        self.inputs = super().to_mesh(*batch)
        return self.inputs


def read_own(path):
    """What a file of yours gives to `train.run` -> arguments for `run_main`."""
    sys.path.insert(0, str(Path(path).parent))  # as for a program
    with mock.patch.object(train, "run", autospec=True) as run:
        runpy.run_path(str(path), run_name="__main__")
    own = inspect.signature(train.run).bind(*run.call_args.args, **run.call_args.kwargs).arguments
    return {**own, "trainer": type("Own", (Probe, own.get("trainer", train.Trainer)), {})}


def train_mine(mesh, mode, micro_batches):
    path, *flags = json.loads(os.environ["VIT3D_MINE"])
    return train_steps(mesh, "own", mode, micro_batches, 2, *flags, **read_own(path))


def compare(got, want):
    """-> largest difference of losses, of weights, and the name of what differs first, or None"""
    gaps = {name: float(abs(got[name] - want[name]).max()) for name in got}
    del gaps["validation"]
    loss = gaps.pop("losses")
    differing = [name for name, gap in {**gaps, "losses": loss}.items() if not gap < 1e-5]
    return loss, max(gaps.values()), next(iter(differing), None)


def compare_mine(mesh, mode):
    """The end of a row: train in two micro-batches and compare with one process."""
    want = np.load(FOLDER / f"mine-{mode}.npz")
    loss, weight, first = compare(train_mine(mesh, mode, 2), want)
    verdict = f"DIFFERS, first in {first}: {IN_README}" if first else "as one process"
    return f"{loss:<9.1e}{weight:<9.1e}{verdict}"


OWN_MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]
for mesh, mode in itertools.product(OWN_MESHES, ("eager", "graph")):
    BODIES[math.prod(mesh)][f"{case_id(mesh):<7}{mode:<7}"] = compare_mine, (mesh, mode)

# Three rows look at the last run of one process. They see what is wrong alike on all meshes.


def loss_of(seed=0):
    flow.manual_seed(seed)  # of dropout's masks
    return Trainer.last.model(*Trainer.last.inputs)["losses"]


def gradients():
    """{name: array} of the weights that require a gradient; zeros for one that gets none"""
    model = Trainer.last.model
    loss_of().backward()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    arrays = {k: full_array(p * 0 if p.grad is None else p.grad) for k, p in weights.items()}
    model.zero_grad(set_to_none=True)
    return arrays


def slopes(dtype, step):
    """{name: (slope of the loss in a random direction, what the gradient says, their gap)}

    The gap is in lengths of the gradient, or in hundredths of the length of all gradients.
    """
    last = Trainer.last
    last.model.to(dtype)
    last.inputs = [x.to(dtype) if x.is_floating_point() else x for x in last.inputs]
    arrays = gradients()
    shortest = 0.01 * math.hypot(*map(np.linalg.norm, arrays.values()))
    rng = np.random.default_rng(0)
    found = {}
    for name, gradient in arrays.items():
        weight = dict(last.model.named_parameters())[name].data
        direction = rng.standard_normal(weight.shape)
        move = distribute(flow.tensor(step * direction).to(dtype), weight.placement, weight.sbp)
        ends = []
        for times in (1, -2):
            weight.add_(times * move)
            ends.append(float(full_array(loss_of())))
        weight.add_(move)
        slope = (ends[0] - ends[1]) / (2 * step)
        own = (gradient * direction).sum()
        found[name] = slope, own, abs(slope - own) / max(np.linalg.norm(gradient), shortest)
    return found


def row_of_graph(graph, eager):
    """Is a graph eager mode? (Only the first loss: later ones add up how two AdamW round.)"""
    loss, weight, first = compare(*(dict(run, losses=run["losses"][:1]) for run in (graph, eager)))
    gaps = f"loss {loss:.1e}, weights {weight:.1e}"
    if not first:
        return f"a graph is eager mode: {gaps}"
    if loss_of(0) == loss_of(0) != loss_of(1):
        return "a graph is not compared: it draws other masks than eager mode, so set rates to 0"
    return f"a graph is NOT eager mode: {gaps}, first in {first}: {IN_README}"


def row_of_presence():
    """Has each weight that requires a gradient one that is not 0? (At first some may be 0.)"""
    without = [name for name, gradient in gradients().items() if not gradient.any()]
    if without:
        return f"weights get NO gradient: {', '.join(without):.300}: {IN_README}"
    return "each weight that requires a gradient gets one"


def row_of_slopes():
    """Is the gradient that of the loss?"""
    if loss_of() != loss_of():
        return "the gradient is not compared: one seed gives two losses, as with nn.Dropout"
    bound = 1e-4
    note = ""
    try:
        found, other = (slopes(flow.float64, step) for step in (1e-6, 2e-6))
        # What is computed in float32 on the way jumps: then the step matters.
        is_smooth = all(abs(found[name][2] - other[name][2]) < bound for name in found)
    except Exception:  # such as a product with a constant in float32
        is_smooth = False
    if not is_smooth:
        bound = 0.1
        note = " (to 0.1, as a part of the model takes no float64)"
        found = slopes(flow.float32, 3e-3)
    for name, (slope, own, gap) in found.items():
        if not gap < bound:
            numbers = f"slope {slope:.5g}, and its gradient gives {own:.5g}{note}"
            return f"the gradient is NOT that of the loss: {name} has {numbers}: {IN_README}"
    largest = max(gap for *_, gap in found.values())
    return f"the gradient is that of the loss: {largest:.1e}{note}"


def print_proof_of_mine(path, flags, processes):
    """Three rows of one process, then one for each mesh and mode. -> were all of them right?"""
    os.environ["VIT3D_MINE"] = json.dumps([str(Path(path).resolve()), *flags])
    one = (1, 1, 1)
    rows = []  # of each row: is it right?

    def tell(text, is_right=True):
        print(text, file=sys.__stdout__, flush=True)
        rows.append(is_right)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        set_folder(Path(folder))
        runs = {mode: train_mine(one, mode, 1) for mode in ("graph", "eager")}
        for text in (row_of_graph(**runs), row_of_presence(), row_of_slopes()):
            tell(text, IN_README not in text)
        tell("mesh   mode   loss     weight   (largest differences from one process)")
        for mode, arrays in runs.items():
            np.savez(FOLDER / f"mine-{mode}.npz", **arrays)
            text = compare_mine(one, mode)
            tell(f"1x1x1  {mode:<7}{text}", IN_README not in text)
        for n in processes:
            names = [name for name, (body, _) in BODIES[n].items() if body is compare_mine]
            for name, ranks in start_ranks(n, names).items():
                errors = [error.strip() for error, _ in ranks if error]
                text = errors[0].splitlines()[-1] if errors else ranks[0][1]
                if errors and "did not come to its end" in errors[0]:
                    text = errors[0].partition(":")[0]  # this case, or one before it, hung
                tell(name + text, not errors and IN_README not in text)
    return all(rows)


class WithLine(VisionTransformer):
    """With a line between the last block and the head."""

    line = "x = x + w"

    def __init__(self, embed_dim, **options):
        super().__init__(embed_dim=embed_dim, **options)
        self.shift = self.new_parameter(flow.zeros(1, 1, embed_dim))

    def forward_head(self, x):
        names = dict(flow=flow, x=x, w=self.gather(self.shift))
        exec(self.line, names)
        return VisionTransformer.forward_head(self, names["x"])


CLONE = "y = x.clone(); y[:, 0] = 0; x = x + w + 0.5 * y"
STACK = """
y = (x + w).reshape(len(x), -1, 4, 8).transpose(1, 2)
x = flow.stack([y[..., :4], 2 * y[..., 4:]], -1).flatten(3).transpose(1, 2).flatten(2)"""
LINES = {  # what the rows of one process say
    STACK: "gets one, .* is that of the loss: [^(]*",  # it is wrong on shares alone
    "y = x[:, :1]; y += w": "NO gradient: shift: .* is that of the loss: [^(]*",
    "x = x + w.detach()": "NO gradient: shift: .* NOT that of the loss: shift has slope .*",
    "x = x + w + 0.5 * x.detach()": "gets one, .* NOT that of the loss: cls_token has [^(]*",
    "x = flow.where(x > 0, x, x.float()) + w": "gets one, .* is that of the loss: .* no float64.",
    "x = x + w + x.detach().float()": "gets one, .* NOT that .* cls_token has .* no float64.: .*",
}


def with_line(line):
    return type("Mine", (WithLine,), {"line": line})


def probe(model, *flags, trainer=Trainer):
    """Train on one process as the proof does -> the rows of one process but that of a graph."""
    own = dict(model=model, trainer=type("Own", (Probe, trainer), {}), data_set=WholeImages)
    train_steps((1, 1, 1), "own", "eager", 1, 2, *flags, **own)
    return f"{row_of_presence()}, {row_of_slopes()}"


def test_weights_with_a_wrong_gradient_or_none_are_named_and_right_models_are_not():
    for line, rows in LINES.items():
        assert re.fullmatch(f".* {rows}", probe(with_line(line))), line
    right = "each weight .* gets one, the gradient is that of the loss: .*e-0[789]"
    assert re.fullmatch(right, probe(Indexed))  # it is wrong on replicas alone
    for model, trainer, _ in OWN.values():
        assert re.fullmatch(right, probe(model, trainer=trainer)), model
    assert re.fullmatch(right, probe(VisionTransformer, "--drop-rate", 0.5))
    run = dict(losses=np.zeros(1), validation=np.zeros(1), head=np.zeros(1))
    assert "set rates to 0" in row_of_graph(dict(run, head=np.ones(1)), run)


def test_a_proof_is_wrong_if_one_of_its_rows_is(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", FOLDER)  # all is undone at the end
    monkeypatch.setenv("VIT3D_TEST_FOLDER", "")
    monkeypatch.setenv("VIT3D_MINE", "")
    path = tmp_path / "mine.py"
    path.write_text(f"import test_vit3d, train\ntrain.run(test_vit3d.with_line({CLONE!r}))")
    assert not print_proof_of_mine(path, [], [])
    rows = capfd.readouterr().out
    wrong = re.findall("a graph is NOT eager mode: loss .*e-.*, first in cls_token", rows)
    assert rows.count("as one process\n") == 2
    assert len(wrong) == rows.count(IN_README) == 1


@on_meshes(((2, 1, 1),))
def test_the_row_of_a_mesh_names_what_is_wrong_on_shares(mesh):
    assert IN_README in compare_mine(mesh, "eager")


# 12. The proof as a table -------------------------------------------------------------------------


def print_proof(processes):
    """A row for each case: how equal it is to one process, bytes by plan and by formula."""
    for on in ("all", "everything"):
        print(f"{on}:", ON[on], "(--activation-checkpoint: graph alone)")
    print("bytes: sent along data, tensor, pipeline; held; of other buffers")
    with tempfile.TemporaryDirectory() as folder:
        names = {n: [name for name in BODIES[n] if "a_mesh_trains" in name] for n in processes}
        with contextlib.redirect_stdout(io.StringIO()):
            set_folder(Path(folder))
            make_references([BODIES[n][name][1] for n in processes for name in names[n]])
        for n in processes:
            for name, ranks in start_ranks(n, names[n]).items():
                mesh, on, mode, parts = name.partition("[")[2].strip("]").split("-")
                errors = [error for error, _ in ranks if error]
                if errors:
                    sys.exit(f"{name}: NOT AS ONE PROCESS OR AS THE FORMULAS\n{errors[0]}")
                equal, moved = ranks[0][1]
                text = f"{mesh:<7}{on:<11}{mode:<6}{parts:<2}{equal}"
                if moved:
                    sizes = (f"{moved[axis]:,}" for axis in ("data", "tensor", "pipeline"))
                    text += f"; {' '.join(sizes)}; {moved['weights']:,}; {moved['others']:,}"
                print(text, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run_bodies(sys.argv[2:])
    elif sys.argv[1:2] and sys.argv[1].endswith(".py"):
        own_file, *more = sys.argv[1:]  # a number of processes, then flags of train.py
        own_processes = [int(more.pop(0))] if more and more[0].isdigit() else [2, 8]
        sys.exit(0 if print_proof_of_mine(own_file, more, own_processes) else 1)
    else:
        print_proof([int(sys.argv[1])] if sys.argv[1:] else [2, 4, 8])
