# SPDX-License-Identifier: Apache-2.0
"""Each mesh trains as one process does, and one process as it should.

    python -m pytest -q       all tests
    python test_vit3d.py      the proof alone: how far each mesh is from one process, as a table

A test under `@in_processes(4)` or `@on_meshes(...)` runs its body on every rank of a launch, and
asserts there. All bodies of one number of processes share one launch.
"""

import ctypes.util
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on the CPU, whatever the machine has
os.environ["GLOG_minloglevel"] = "3"  # the engine's warnings of GPUs that are not there
# Where the system has jemalloc, the processes that are started compile graphs in 0.6 of the time.
os.environ.setdefault("LD_PRELOAD", ctypes.util.find_library("jemalloc") or "")

import numpy as np
import pytest
from flowvision.models import vision_transformer
from PIL import Image

import train
from vit3d import (
    MODELS, B, Dropout, DropPath, LayerNorm, Linear, MultiheadAttention, PatchEmbedding, S,
    TransformerLayer, VisionTransformer, batch_to_global, dist, flow, load_timm_state_dict,
    load_weights, nn, to_timm_state_dict, whole, why_not_cuda,
)  # fmt: skip

# flowvision's own create_transform passes what its Resize warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Argument interpolation should be")
HERE = Path(__file__).parent
TINY = "--img-size 16 --patch-size 4 --embed-dim 32 --depth 2 --num-heads 2".split()

# 1. Tests that run on many processes --------------------------------------------------------------

BODIES = {2: {}, 4: {}, 8: {}}  # number of processes -> name -> what each of them runs


def name_of(mesh):
    return "x".join(map(str, mesh))


def in_processes(n):
    """The test's body runs on each of n processes."""

    def decorate(body):
        BODIES[n][body.__name__] = body

        def test(launched):
            launched(n, body.__name__)

        test.__name__ = body.__name__
        return test

    return decorate


def on_meshes(cases):
    """The test's body, body(mesh, *more), runs on the processes of each mesh."""

    def decorate(body):
        names = {}
        for case in cases:
            names[case] = "-".join([body.__name__, name_of(case[0]), *map(str, case[1:])])
            BODIES[np.prod(case[0])][names[case]] = functools.partial(body, *case)

        @pytest.mark.parametrize("case", cases, ids=lambda case: names[case].split("-", 1)[1])
        def test(launched, case):
            launched(np.prod(case[0]), names[case])

        test.__name__ = body.__name__
        return test

    return decorate


def run_bodies(names, folder):
    """On a rank: run the bodies; hand back, line by line, what each returned or how it failed."""
    place = Path(folder) / f"{dist.world_size}-{dist.rank}"
    os.dup2(os.open(place.with_suffix(".log"), os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    with open(place.with_suffix(".jsonl"), "w", buffering=1) as file:
        for name in names:
            signal.alarm(200)  # ranks that wait for one another are ended
            failed = value = None
            try:
                value = BODIES[dist.world_size][name]()
            except BaseException:
                failed = traceback.format_exc(limit=-3)
            print(json.dumps([name, failed, value]), file=file)


def start_ranks(n, folder, names):
    """Run bodies on n processes -> {name: [(failed, value) of each rank]}."""
    args = train.parse_arguments(["--data-parallel", str(n)])
    command = [sys.executable, __file__, str(folder), *names]
    train.launch(args, command)
    seen, logs = {name: [] for name in names}, ""
    for rank in range(n):
        lines = (folder / f"{n}-{rank}.jsonl").read_text().splitlines()
        for name, failed, value in map(json.loads, lines):
            seen[name].append((failed, value))
        logs += (folder / f"{n}-{rank}.log").read_text()[-3000:]
    for name, ranks in seen.items():
        if len(ranks) < n:
            ranks.append((f"{n - len(ranks)} ranks did not come to its end: {logs}", None))
    return seen


@pytest.fixture(scope="session")
def launched(tmp_path_factory, request):
    """launched(n, name): fail as the body failed on a rank; a launch runs what is collected."""
    folder, seen = tmp_path_factory.mktemp("ranks"), {}
    asked = {item.name for item in request.session.items}
    make_references(folder, REFERENCES + OF_EVERYTHING)

    def check(n, name):
        if n not in seen:
            names = [
                each for each in BODIES[n]
                if each in asked or f"{each.split('-')[0]}[{each.split('-', 1)[-1]}]" in asked
            ]  # fmt: skip
            seen[n] = start_ranks(n, folder, names)
        for rank, (failed, _) in enumerate(seen[n][name]):
            assert not failed, f"rank {rank}: {failed}"

    return check


# 2. Every mesh trains as one process does ---------------------------------------------------------

MESHES = [m for m in itertools.product((1, 2, 4), repeat=3) if np.prod(m) in (2, 4, 8)]
SMALL = [mesh for mesh in MESHES if max(mesh) == 2]
MODES = "graph", "eager"
ON = {
    "nothing": [],
    "dropout": "--drop-rate 0.1 --attn-drop-rate 0.1 --drop-path-rate 0.1".split(),
    "zero": ["--shard-params"],
    "sequence": ["--sequence-parallel"],
    "checkpoint": ["--activation-checkpoint"],
    "197 tokens": "--sequence-parallel --img-size 224 --patch-size 16".split(),
}
ON["everything"] = ON["dropout"] + ON["zero"] + ON["sequence"] + ON["checkpoint"]
ON["everything"] += "--mixup 0.8 --cutmix 1.0 --label-smoothing 0.1 --random-erasing 0.25".split()
REFERENCES = [("nothing", depth, mode) for depth in (1, 2, 4) for mode in MODES]
REFERENCES += [(on, 2, "graph") for on in ("dropout", "197 tokens")]
# In eager mode all masks are drawn from one stream: their order follows the micro-batches.
OF_EVERYTHING = [("everything", 2, "graph")] + [("everything", 2, f"eager-{m}") for m in (1, 2, 4)]


def make_folder(root, per_class=dict(train=16, val=5)):
    """Three classes of small images that differ by colour, in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for split, count in per_class.items():
        for label, i in itertools.product(range(3), range(count)):
            place = root / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (20, 24, 3))
            pixels[..., label] += 100
            Image.fromarray(pixels.astype("u1")).save(place / f"{i}.png")


STEPS = {"everything": 10}  # else 2


def train_steps(on, depth, mode, mesh=(1, 1, 1), micro_batches=1):
    """Train on 16 images a step by train.py's own parts.

    Returns the losses, the whole weights and the trainer.
    """
    flags = [*TINY, "--lr", 0.005, "--weight-decay", 0.5]
    flags += [*ON[on], "--accumulation-steps", micro_batches]
    if on == "everything":
        flags += ["--data", FOLDER / "images", "--workers", "1"]
    if mode == "eager":
        flags = [*(flag for flag in flags if flag != "--activation-checkpoint"), "--eager"]
    args = train.parse_arguments(list(map(str, flags)))
    sizes = dict(img_size=args.img_size, patch_size=args.patch_size, embed_dim=32)
    sizes.update(depth=depth, num_heads=4)
    dist.setup(
        *mesh, depth, shard_params=args.shard_params, sequence_parallel=args.sequence_parallel
    )
    images, _ = train.data_sets(args, args.img_size)
    model, mixup = train.build_model(args, sizes, images.num_classes)
    trainer = train.Trainer(model, args, steps=10)
    for group in trainer.optimizer.param_groups:
        # Adam divides by the size of the gradient. That of a key's bias is zero but for rounding,
        # which eps 1e-8 would let become whole steps, different on each mesh.
        group["eps"] = 1e-5
    flow.manual_seed(1)
    keys = train.training_keys(len(images), 16, args, 0, STEPS.get(on, 2))
    losses = [trainer.step(*batch)[0] for batch in train.load(images, keys, args, mixup)]
    weights = {name: whole(weight) for name, weight in model.named_parameters()}
    return np.array(losses), weights, trainer


FOLDER = Path(os.environ.get("VIT3D_TEST_FOLDER", "."))  # where the ranks find the references


def make_references(folder, references):
    """What one process computes, which each mesh is held against."""
    global FOLDER
    FOLDER = folder
    os.environ["VIT3D_TEST_FOLDER"] = str(folder)
    make_folder(folder / "images")
    for on, depth, mode in references:
        mode, _, micro_batches = mode.partition("-")
        losses, weights, _ = train_steps(on, depth, mode, micro_batches=int(micro_batches or 1))
        np.savez(folder / f"{on}-{depth}-{mode}{micro_batches}.npz", losses=losses, **weights)
    for depth in (1, 2, 4):
        dist.setup()
        weights = {name: whole(weight) for name, weight in new_model(depth).named_parameters()}
        np.savez(folder / f"new-{depth}.npz", **weights)


def new_model(depth):
    flow.manual_seed(0)
    return VisionTransformer(16, 4, 3, 32, depth, 4, num_classes=10)


def check_against_one_process(mesh, on, depth, mode, micro_batches=1):
    """Assert that this mesh trains as one process; return the largest differences."""
    alike = {"zero": "nothing", "sequence": "nothing", "checkpoint": "nothing"}.get(on, on)
    drawn = str(micro_batches) if on == "everything" and mode == "eager" else ""
    want = np.load(FOLDER / f"{alike}-{depth}-{mode}{drawn}.npz")
    losses, weights, _ = train_steps(on, depth, mode, mesh, micro_batches)
    of_loss = abs(losses - want["losses"]).max()
    of_weight = {name: abs(weight - want[name]).max() for name, weight in weights.items()}
    assert {"losses", *weights} == {*want}
    assert of_loss < 1e-5, f"losses {losses}, of one process {want['losses']}"
    assert max(of_weight.values()) < 1e-5, {k: v for k, v in of_weight.items() if v >= 1e-5}
    return float(of_loss), float(max(of_weight.values()))


EVERYTHING = [(mesh, "graph", m) for mesh in SMALL for m in (1, 2, 4)]
EVERYTHING += [(mesh, "eager", m) for mesh in SMALL for m in (1, 2, 4) if np.prod(mesh) == 2]
EVERYTHING += [(mesh, "eager", 2) for mesh in SMALL if np.prod(mesh) > 2]


@on_meshes(EVERYTHING)
def test_with_everything_on_ten_steps_are_those_of_one_process(mesh, mode, micro_batches):
    return check_against_one_process(mesh, "everything", 2, mode, micro_batches)


ODD = (1, 2, 1), (2, 2, 2), (2, 4, 1), (1, 4, 2)  # meshes that share 197 tokens, as graphs
PLAIN = [(mesh, mode) for mesh in MESHES for mode in MODES if max(mesh) == 4]


@on_meshes([(mesh, mode) for mesh, mode in PLAIN if mode == "eager" or mesh not in ODD])
def test_with_nothing_on_two_steps_are_those_of_one_process(mesh, mode):
    check_against_one_process(mesh, "nothing", mesh[2], mode)  # one block a stage


ALONE = [((2, 1, 1), "dropout"), ((2, 1, 1), "zero"), ((1, 1, 2), "checkpoint")]
ALONE += [((1, 2, 1), "sequence"), ((1, 2, 2), "sequence")]
ALONE += [(mesh, "197 tokens") for mesh in ODD]


@on_meshes(ALONE)
def test_each_feature_alone_gives_the_steps_of_one_process(mesh, on):
    check_against_one_process(mesh, on, 2, "graph")


@on_meshes([((2, 2, 2), "graph"), ((2, 2, 1), "eager")])
def test_micro_batches_of_one_image_give_the_steps_of_one_process(mesh, mode):
    check_against_one_process(mesh, "sequence", 2, mode, micro_batches=8)


# 3. Where what lies -------------------------------------------------------------------------------


@on_meshes([(mesh,) for mesh in MESHES])
def test_each_rank_holds_its_slice_of_the_layers_of_its_stage_and_nothing_else(mesh):
    data, tensor, stages = mesh
    dist.setup(*mesh, stages)
    model, new = new_model(stages), np.load(FOLDER / f"new-{stages}.npz")
    stage, shard = dist.rank // (data * tensor), dist.rank % tensor
    for name, weight in model.named_parameters():
        want, part = new[name], weight.to_local().numpy()  # the same to the bit
        home = stages - 1 if name.startswith(("norm", "head")) else 0
        if name.startswith("blocks"):
            home = int(name.split(".")[1])
        if home != stage:
            assert part.size == 0, name
            continue
        if any(word in name for word in ("query_key_value.", "dense_h_to_4h.")):
            want = np.split(want, tensor, 0)[shard]
        elif any(word in name for word in ("attention.dense.w", "4h_to_h.w")):
            want = np.split(want, tensor, 1)[shard]
        assert np.array_equal(part, want), name


@on_meshes([((2, 1, 1),), ((2, 2, 1),)])
def test_sharded_weights_and_moments_lie_split_over_the_replicas_too(mesh):
    plain = train_steps("nothing", mesh[2], "eager", mesh)[-1]
    sharded = train_steps("zero", mesh[2], "eager", mesh)[-1]
    there = plain.optimizer.tensors(plain.model, None)
    for name, tensor in sharded.optimizer.tensors(sharded.model, None).items():
        # The bias of a column-parallel layer has no dimension left to split.
        parts = 1 if name.endswith(("value.bias", "h_to_4h.bias")) else mesh[0]
        assert tensor.to_local().numel() * parts == there[name].to_local().numel(), name


@in_processes(4)
def test_with_sequence_parallelism_a_rank_holds_its_tokens_between_layers():
    dist.setup(2, 2, 1, sequence_parallel=True)
    model = VisionTransformer(16, 4, 3, 32, 1, 4, num_classes=10)
    images = batch_to_global(np.zeros((3, 3, 16, 16), "f4"), 0)
    hidden = model.forward_features(images)  # 17 tokens over 2 ranks
    _, _, shard = dist.get_coordinates()
    assert tuple(hidden.shape) == (6, 17, 32)
    assert tuple(hidden.to_local().shape) == (3, (9, 8)[shard], 32)


@in_processes(4)
def test_blocks_lie_on_the_stages_that_were_asked_for():
    for stage_ids, layers, want in (
        (None, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (None, 6, [0, 1, 2, 2, 3, 3]),
        ([0, 1, 1, 1, 2, 3], 6, [0, 1, 1, 1, 2, 3]),
    ):
        dist.setup(1, 1, 4, layers, stage_ids)
        model = VisionTransformer(8, 4, 3, 8, layers, 2, num_classes=3)
        assert [dist.get_layer_stage_id(i) for i in range(layers)] == want
        holds = [block.mlp.dense_4h_to_h.bias.to_local().numel() > 0 for block in model.blocks]
        assert holds == [stage == dist.rank for stage in want]
    graph = forward_graph(model)  # the stage ids make it 1F1B
    stages = [module.to(nn.graph.GraphModule).stage_id for module in graph.model.blocks]
    assert stages == want
    others = {"patch_embed": 0, "pos_drop": 0, "norm": 3, "head": 3, "loss_func": 3}
    for name, stage in others.items():
        assert getattr(graph.model, name).to(nn.graph.GraphModule).stage_id == stage, name
    inner = graph.model.blocks[4].mlp.dense_h_to_4h
    assert inner.to(nn.graph.GraphModule).stage_id == 2
    for name, stage in {"cls_token": 0, "pos_embed": 0}.items():
        assert graph.model._parameters[name].to(nn.graph.GraphTensor).stage_id == stage
    assert inner._parameters["weight"].to(nn.graph.GraphTensor).stage_id == 2
    drawn = str(dist).splitlines()
    assert drawn[1].split("  ")[-1].strip() == "stage 3: blocks 5-5" and drawn[-1].endswith("3")


KEPT = []  # the engine aborts where a graph ends while a rank still reads from another


def forward_graph(model):
    class Graph(nn.Graph):
        def __init__(self):
            super().__init__()
            self.model = model
            VisionTransformer.set_pipeline_stage_id(self.model)

        def build(self, *inputs):
            return self.model(*inputs)

    KEPT.append(Graph())
    return KEPT[-1]


@in_processes(2)
def test_processes_are_replicas_until_a_mesh_is_laid_out():
    here = type(dist)()
    assert str(here).startswith("data 2 x tensor 1 x pipeline 1 = 2 processes, cpu (no GPU here)")


@in_processes(2)
def test_a_layer_keeps_the_mesh_that_it_was_built_on():
    x = np.random.default_rng(0).standard_normal((4, 3, 6)).astype("f4")
    dist.setup(1, 2, 1)
    layer = Linear(6, 4, parallel="col")
    here = batch_to_global(x, 0)
    before = layer(here)  # its features are split
    dist.setup(2, 1, 1)
    after = layer(here)
    assert before.sbp == after.sbp == (S(2),)
    assert np.array_equal(whole(before), whole(after))


# 4. Layers and models -----------------------------------------------------------------------------


def images_and_labels(n, size, classes):
    rng = np.random.default_rng(1)
    return rng.standard_normal((n, 3, size, size)).astype("f4"), rng.integers(0, classes, n)


def share_of(array):
    """This replica's share of a batch."""
    return np.split(array, dist.data_parallel_size)[dist.get_data_parallel_rank()]


@in_processes(4)
def test_parallel_linear_computes_what_numpy_computes_forward_and_backward():
    dist.setup(2, 2, 1)
    replica, shard = dist.rank // 2, dist.rank % 2
    for parallel in ("col", "row", "data"):
        layer = Linear(6, 4, parallel=parallel)
        x = np.random.default_rng(0).standard_normal((8, 3, 6)).astype("f4")
        here = batch_to_global(share_of(x), 0).requires_grad_()
        y = layer(here)
        (y * y).sum().backward()
        w, b = whole(layer.weight), whole(layer.bias)
        want = x @ w.T + b
        part = want[replica * 4 :][:4]
        part = part[..., shard * 2 :][..., :2] if parallel == "col" else part
        np.testing.assert_allclose(y.to_local().numpy(), part, atol=1e-6)
        np.testing.assert_allclose(whole(here.grad), 2 * want @ w, atol=1e-6)
        dw = np.einsum("bno,bni->oi", 2 * want, x)
        np.testing.assert_allclose(whole(layer.weight.grad), dw, rtol=1e-5, atol=1e-6)
        db = (2 * want).sum((0, 1))
        np.testing.assert_allclose(whole(layer.bias.grad), db, rtol=1e-5, atol=1e-6)


@in_processes(4)
def test_dropout_masks_are_the_same_on_any_sbp_and_differ_by_layer_and_step():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.path = Dropout(0.5), Dropout(0.5), DropPath(0.5)

        def forward(self, x):
            return self.first(x), self.second(x), self.path(x)

    dist.setup(2, 2, 1)
    placement = dist.get_layer_placement(0)
    for make in (Drops, lambda: forward_graph(Drops())):
        masks = []
        for sbp in ([B, B], [S(0), B], [S(0), S(1)], [S(0), S(2)]):
            flow.manual_seed(3)
            drops, seen = make(), []
            for _ in range(2):
                seen += map(whole, drops(flow.ones(8, 17, 16, sbp=sbp, placement=placement)))
            masks.append(seen)
        for seen in masks:
            assert all(np.array_equal(a, b) for a, b in zip(seen, masks[0]))  # on any sbp
        assert len({mask.tobytes() for mask in seen}) == 6
        for mask in seen:
            assert set(np.unique(mask)) == {0.0, 2.0}
        for path in (seen[2], seen[5]):
            assert np.array_equal(path, np.broadcast_to(path[:, :1, :1], path.shape))
        assert all(abs(mask.mean() - 1) < 0.1 for mask in (seen[0], seen[1], seen[3], seen[4]))


class AsInTheReference(nn.Module):
    """A small model in the way of LiBai's tutorial, its own parameters and initialization too."""

    def __init__(self, width=8, depth=2, num_classes=3):
        super().__init__()
        self.patch_embed = PatchEmbedding(img_size=8, patch_size=4, in_chans=3, embed_dim=width)
        sbp = dist.get_nd_sbp([flow.sbp.broadcast, flow.sbp.broadcast])
        where = dict(sbp=sbp, placement=dist.get_layer_placement(0))
        self.cls_token = nn.Parameter(flow.zeros(1, 1, width, **where))
        positions = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(flow.zeros(1, positions, width, **where))
        self.pos_drop = nn.Dropout(p=0.0)
        self.blocks = nn.Sequential(
            *[
                TransformerLayer(
                    hidden_size=width, ffn_hidden_size=4 * width, num_attention_heads=2,
                    attention_dropout_prob=0.0, output_dropout_prob=0.0, drop_path_prob=0.0,
                    layer_idx=i,
                )
                for i in range(depth)
            ]
        )
        self.norm = LayerNorm(width, layer_idx=-1)
        self.head = Linear(width, num_classes, layer_idx=-1)
        self.loss_func = nn.CrossEntropyLoss()

    def forward(self, images, labels=None):
        x = self.patch_embed(images)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        cls_token = cls_token.to_global(sbp=x.sbp, placement=cls_token.placement)
        x = flow.cat((cls_token, x), dim=1)
        pos_embed = self.pos_embed.expand(x.shape[0], -1, -1)
        x = x + pos_embed.to_global(sbp=x.sbp, placement=pos_embed.placement)
        x = self.head(self.norm(self.blocks(self.pos_drop(x)))[:, 0])
        if labels is not None and self.training:
            return {"losses": self.loss_func(x, labels)}
        return {"prediction_scores": x}


@in_processes(4)
def test_a_model_written_as_in_the_reference_runs_and_loads_libai_names_strictly():
    scores = []
    for mesh in ((2, 2, 1), (2, 1, 2), (1, 2, 2)):
        dist.setup(*mesh, pipeline_num_layers=2)
        theirs, ours = AsInTheReference(), VisionTransformer(8, 4, 3, 8, 2, 2, num_classes=3)
        state = {}
        for name, value in ours.state_dict().items():
            array = np.random.default_rng(len(name)).standard_normal(value.shape, "f4")
            state[name] = flow.tensor(array).to_global(placement=dist.get_world_placement(), sbp=B)
        ours.load_state_dict(state, strict=True)
        theirs.load_state_dict(state, strict=True)
        images, labels = map(share_of, images_and_labels(8, 8, 3))
        batch = batch_to_global(images, 0), batch_to_global(labels, -1)
        losses = [whole(model.train()(*batch)["losses"]) for model in (ours, theirs)]
        np.testing.assert_allclose(losses[0], losses[1], atol=1e-6)
        scores.append(whole(ours.eval()(*batch)["prediction_scores"]))
        scores.append(whole(forward_graph(theirs.eval())(*batch)["prediction_scores"]))
    for each in scores:
        np.testing.assert_allclose(each, scores[0], atol=1e-5)


def logits_beside_flowvision(size):
    """Our logits must be those of flowvision's model, whose weights go in and come back."""
    flow.manual_seed(0)
    theirs = vision_transformer.VisionTransformer(**size).eval()
    rng = np.random.default_rng(0)  # not the initial values: zero biases and a zero head hide much
    state = {
        name: (value.numpy() + rng.normal(0, 0.05, value.shape)).astype("f4")
        for name, value in theirs.state_dict().items()
    }
    theirs.load_state_dict({name: flow.tensor(array) for name, array in state.items()})
    ours = VisionTransformer(**size, layer_norm_eps=1e-6).eval()
    load_timm_state_dict(ours, state)
    images, _ = images_and_labels(2, 224, 1)
    with flow.no_grad():
        want = theirs(flow.tensor(images)).numpy()
        got = whole(ours(batch_to_global(share_of(images), 0))["prediction_scores"])
    assert abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4)
    back = to_timm_state_dict(ours)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_logits_are_flowvisions_with_its_weights_which_come_back_exactly(name):
    dist.setup()
    logits_beside_flowvision(MODELS[name])


@in_processes(4)
def test_logits_on_a_mesh_are_flowvisions_with_its_weights_which_come_back_exactly():
    for mesh in ((1, 2, 2), (2, 2, 1)):
        dist.setup(*mesh, pipeline_num_layers=4, sequence_parallel=mesh == (2, 2, 1))
        logits_beside_flowvision(dict(patch_size=32, embed_dim=64, depth=4, num_heads=4))
    dist.setup(1, 2, 2, pipeline_num_layers=4)
    with pytest.raises(ValueError, match="depth 3 must be the pipeline_num_layers of .*, 4"):
        VisionTransformer(depth=3)


def test_timm_weights_of_another_grid_and_head_load_and_misfits_are_named():
    dist.setup()
    size = dict(patch_size=4, embed_dim=8, depth=1, num_heads=2)
    small = VisionTransformer(img_size=16, num_classes=3, **size)
    large = VisionTransformer(img_size=32, num_classes=5, **size)
    state, head = to_timm_state_dict(small), whole(large.head.weight)
    state["pos_embed"][0, 1:] = np.arange(4.0).repeat(4)[:, None]  # rises by row
    with pytest.raises(ValueError, match=r"head.weight has shape \(3, 8\), in the model \(5, 8\)"):
        load_timm_state_dict(large, state)
    load_timm_state_dict(large, state, keep_head=True)
    assert np.array_equal(whole(large.head.weight), head)
    grid = whole(large.pos_embed)[0, 1:].reshape(8, 8, 8)
    assert np.allclose(grid[:, :1], grid) and (np.diff(grid[:, 0, 0]) > 0).all()
    assert np.allclose(grid[2:6, 0, 0], [0.75, 1.25, 1.75, 2.25], atol=0.05)
    assert np.array_equal(whole(large.pos_embed)[0, 0], state["pos_embed"][0, 0])
    state["blocks.0.attn.odd"] = state.pop("norm.bias")
    with pytest.raises(ValueError, match="odd is not in the model; .*norm.bias is missing"):
        load_timm_state_dict(small, state)
    state["pos_embed"] = state["pos_embed"][:, :16]
    with pytest.raises(ValueError, match="16 tokens, which must be a class token and a square"):
        load_timm_state_dict(large, state)


def test_cuda_is_the_choice_only_where_its_code_runs_and_each_process_has_a_gpu(monkeypatch):
    for gpus, device_type in (
        ([(8, 6)], "cuda"), ([(8, 0)] * 8, "cuda"), ([(9, 0)], "cpu"), ([(5, 2)] * 8, "cpu"),
    ):  # fmt: skip
        monkeypatch.setattr(flow.cuda, "is_available", lambda: True)
        monkeypatch.setattr(flow.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(flow.cuda, "get_device_capability", lambda gpu: gpus[gpu])
        dist.setup()
        assert (dist.device_type, bool(dist.no_cuda)) == (device_type, device_type == "cpu")
    assert why_not_cuda([(8, 0)] * 8, 8) == why_not_cuda([(6, 0), (8, 9)], 2) == ""
    assert why_not_cuda([(8, 9)], 1) == ""
    assert why_not_cuda([], 1) == "no GPU here"
    assert why_not_cuda([(8, 0)], 8) == "GPUs: 1, processes: 8"
    assert "9.0 is not in 6.0 to 8.9" in why_not_cuda([(9, 0)] * 8, 8)
    assert why_not_cuda([(5, 2)], 1) and why_not_cuda([(8, 0), (12, 0)], 2)


def test_the_module_raises_value_errors():
    dist.setup()
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    nine = flow.zeros(1, 3, 9, 9, placement=dist.get_layer_placement(0), sbp=[B])
    for call, message in (
        (lambda: dist.setup(2), "2 x 1 x 1 = 2 must be the number of processes, 1"),
        (lambda: dist.setup(0), "each at least 1"),
        (lambda: dist.setup(device_type="tpu"), "'tpu' must be 'cpu' or 'cuda'"),
        (lambda: dist.setup(device_type="cuda"), "'cuda' cannot run, take 'cpu': no GPU here"),
        (lambda: dist.setup(1, 1, 1, 2, [0]), "name 1 layers, the model has 2"),
        (lambda: dist.setup(1, 1, 1, 2, [0, 1]), "must rise from 0 to 0 and leave out none"),
        (lambda: Linear(4, 4, parallel="diagonal"), "'data', 'col' or 'row'"),
        (lambda: MultiheadAttention(8, 3), "3 heads do not divide 8 features"),
        (lambda: Dropout(1.0), r"must lie in \[0, 1\)"),
        (lambda: VisionTransformer(img_size=30), "patches of side 16 do not divide"),
        (lambda: model(nine), "images of 9 x 9, the model takes 8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@in_processes(2)
def test_a_mesh_that_does_not_fit_is_a_value_error_on_every_rank():
    for arguments, message in (
        ((1, 1, 2, 1), "1 layers are too few for 2 stages"),
        ((1, 1, 2), "pipeline_num_layers must be given"),
        ((1, 1, 2, 4, [0, 1, 1]), "name 3 layers, the model has 4"),
        ((1, 1, 2, 4, [0, 1, 0, 1]), r"\[0, 1, 0, 1\] must rise from 0 to 1"),
        ((1, 1, 2, 4, [0, 0, 0, 2]), "must rise from 0 to 1 and leave out none"),
    ):
        with pytest.raises(ValueError, match=message):
            dist.setup(*arguments)
    dist.setup(1, 1, 2, 4)
    with pytest.raises(ValueError, match="layer_idx 4 must be one of the 4 layers of the pipeline"):
        Linear(4, 4, layer_idx=4)
    dist.setup(1, 2, 1)
    for call, message in (
        (lambda: Linear(4, 65, parallel="col"), "2 tensor-parallel ranks do not divide 65"),
        (lambda: MultiheadAttention(60, 5), "2 tensor-parallel ranks do not divide 5 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# 5. One process trains as it should ---------------------------------------------------------------

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2)
PIXELS = np.random.default_rng(0).standard_normal((128, 3, 16, 16)).astype("f4")
MEAN, STD = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).reshape(2, 3, 1, 1)  # ImageNet
PAPERS = dict(  # width, depth, MLP, heads, millions of parameters
    tiny=(192, 12, 768, 3, 5.7), small=(384, 12, 1536, 6, 22), base=(768, 12, 3072, 12, 86),
    large=(1024, 24, 4096, 16, 307), huge=(1280, 32, 5120, 16, 632),
    giant=(1408, 40, 6144, 16, 1011), gigantic=(1664, 48, 8192, 16, 1843))  # fmt: skip
close, same, about = np.testing.assert_allclose, np.array_equal, pytest.approx


def built(flags="", spread=0.0):
    """Arguments, a model with noise on all weights, as zeros hide much, and Mixup or None."""
    args, rng = train.parse_arguments(flags.split()), np.random.default_rng(0)
    dist.setup()
    model, mixup = train.build_model(args, SIZES, 10)
    load_weights(model, {k: w + rng.normal(0, spread, w.shape) for k, w in held(model).items()})
    return args, model, mixup


def held(model, gradients=False):
    tensors = {k: w.grad if gradients else w for k, w in model.named_parameters()}
    flat = flow.cat([tensor.to_local().flatten() for tensor in tensors.values()]).numpy()
    parts = np.split(flat.astype(float), np.cumsum([t.numel() for t in tensors.values()]))
    return {k: part.reshape(t.shape) for (k, t), part in zip(tensors.items(), parts)}


@pytest.mark.parametrize("mode", ["", "--eager"], ids=["graph", "eager"])
@pytest.mark.parametrize("clip, parts, warmup", [(1e-6, 2, 2), (1e3, 2, 0), (0, 1, 5), (0, 2, 5)])
def test_each_step_is_adamw_in_numpy_at_the_rate_of_warm_up_then_cosine(mode, clip, parts, warmup):
    """The low limit brings gradients down to Adam's eps; else eps is raised to their size."""
    flags = f"--lr 0.01 --weight-decay 0.5 --clip-grad {clip} --accumulation-steps {parts} {mode}"
    flags += f" --warmup-steps {warmup}" if warmup != 2 else ""  # a tenth
    (args, model, _), (_, twin, _) = built(flags, 0.1), built("", 0.1)
    trainer, eps = train.Trainer(model, args, 20), 1e-8 if clip == 1e-6 else 1e-2
    for group in trainer.optimizer.param_groups:
        group["eps"] *= eps / 1e-8
    now, m, v = held(model), dict.fromkeys(held(model), 0.0), dict.fromkeys(held(model), 0.0)
    for i in range(1, 21):
        lr = 0.005 + 0.005 * np.cos(np.pi * (i - 1 - warmup) / (20 - warmup))
        lr = 0.01 * (warmup + (warmup - 1) * (i - 1)) / warmup**2 if i <= warmup else lr
        images, labels = PIXELS[4 * i :][:4], np.arange(i, i + 4) % 10
        batch = batch_to_global(images, 0), batch_to_global(labels, -1)
        load_weights(twin, now)
        twin.zero_grad()
        loss = twin(*batch)["losses"]
        loss.backward()
        value, seen = trainer.step(images, labels)
        assert (value, seen["lr"]) == (about(whole(loss), abs=1e-5), about(lr))
        before, now, found = now, held(model), held(twin, gradients=True)
        norm = np.sqrt(sum((g**2).sum() for g in found.values()))
        for k, g in found.items():
            g = g * min(1, clip / norm) if clip else g
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            move = m[k] / (1 - 0.9**i) / (np.sqrt(v[k] / (1 - 0.999**i)) + eps)
            decay = 0 if "bias" in k or "norm" in k or k in ("cls_token", "pos_embed") else 0.5
            close(now[k], before[k] - lr * (move + decay * before[k]), rtol=0, atol=1e-6)
    assert not trainer.graph or trainer.graph(*batch).numel() == parts  # a loss for each part


def test_each_dropout_drops_its_share_in_its_place():
    _, model, _ = built("--drop-rate 0.1 --attn-drop-rate 0.2 --drop-path-rate 0.6", 0.1)
    drops = {k: (part, []) for k, part in model.named_modules() if isinstance(part, Dropout)}
    for part, calls in drops.values():
        part.register_forward_hook(lambda _, x, y, to=calls: to.append((whole(x[0]), whole(y))))
    model.train()(batch_to_global(PIXELS, 0))
    for k, (part, calls) in drops.items():
        rate = 0.3 * int(k[7]) if "path" in k else 0.2 if k.endswith("attention.dropout") else 0.1
        assert part.p == about(rate) and calls  # of the path: 0, 0.3 and 0.6 in blocks 0, 1 and 2
        for x, y in calls:
            kept = (y != 0).any((1, 2), keepdims=True) if "path" in k else y != 0
            close(y, kept * x / (1 - rate), rtol=1e-5)
            assert abs(kept.mean() - 1 + rate) <= 4 * np.sqrt(rate * (1 - rate) / kept.size)
    path, attention, output, mlp = (calls for k, (_, calls) in drops.items() if ".1." in k)
    assert same(path[0][0], output[0][1]) and same(path[1][0], mlp[0][1])
    assert attention[0][0].sum(-1) == about(np.ones((128, 2, 17)))


def test_mixup_and_cutmix_give_neighbours_and_their_labels_the_same_share():
    def mixed(flags, size=8, epoch=0):
        """256 images and one-hot labels in pairs, (128, 2, ...), and what `load` makes of both."""
        args, _, mixup = built(flags)
        keys = [[(epoch, i) for i in part] for part in np.arange(256).reshape(-1, size).tolist()]
        data, hot = train.SyntheticImages("train", 256, 10, 16, 0), np.resize(np.eye(10), (256, 10))
        got, labels = (np.concatenate(part) for part in zip(*train.load(data, keys, args, mixup)))
        clean = np.stack([data.image(i, 0) for i in range(256)])
        return [array.reshape(128, 2, *array.shape[1:]) for array in (clean, hot, got, labels)]

    flags = "--mixup 0.4 --cutmix 100 --label-smoothing 0.2"
    clean, hot, got, labels = mixed(flags)
    share = ((labels - 0.02) / 0.8 * hot).sum((1, 2), keepdims=True) / 2
    close(labels, 0.8 * (share * hot + (1 - share) * hot[:, ::-1]) + 0.2 / 10, atol=1e-6)
    pasted = (got == clean[:, ::-1]).all(2)
    cut = pasted.any((1, 2, 3))
    assert same((got == clean).all(2)[cut], ~pasted[cut]) and same(pasted[:, 0], pasted[:, 1])
    sides = np.array([np.ptp(np.argwhere(mask), 0) + 1 for mask in pasted[cut, 0]])
    assert same(sides.prod(1), pasted[cut, 0].sum((1, 2))) and cut.mean() == about(0.5, abs=0.15)
    close(share[cut, 0, 0], 1 - sides.prod(1) / 256, atol=1e-6)
    assert 10 <= sides.max() <= 12  # Beta(100, 100) is close to 1 / 2: 16 sqrt(1 / 2) is 11.3
    assert share[~cut].var() == about(0.25 / (2 * 0.4 + 1), rel=0.25)  # Beta(0.4, 0.4) is wide
    blend = share[..., None, None] * (clean - clean[:, ::-1]) + clean[:, ::-1]
    close(got[~cut], blend[~cut], atol=1e-5)
    assert same(mixed(flags, size=2)[2], got)
    moved = [got != mixed(flags, epoch=1)[2], got != mixed(f"{flags} --seed 1")[2]]
    moved += [clean != mixed(alone)[2] for alone in ("--mixup 1", "--cutmix 1")]
    assert min(each.any((1, 2, 3, 4)).mean() for each in moved) > 0.9
    (_, _, smooth, labels), (_, _, plain, classes) = mixed("--label-smoothing 0.2"), mixed("")
    close(labels, 0.8 * hot + 0.2 / 10, atol=1e-6)
    assert same(smooth, clean) and same(plain, clean) and same(classes, hot.argmax(-1))


@pytest.fixture
def sets(tmp_path):
    """sets(flags): train and val of bee/0.png, grey, and wasp/{1,2}.png, two equal ramps."""
    ramp = np.concatenate(np.meshgrid(4 * np.arange(64), 5 * np.arange(48), 77), -1)
    for name in ("wasp/2.png", "wasp/1.png", "bee/0.png"):
        image = Image.fromarray(ramp.astype("u1")) if "w" in name else Image.new("L", (40, 40), 100)
        for path in (tmp_path / "train" / name, tmp_path / "val" / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return lambda f="": train.data_sets(train.parse_arguments(f"--data={tmp_path} {f}".split()), 16)


def test_training_crops_flips_augments_and_erases_by_seed_epoch_and_index(sets):
    flags = "", "--rand-augment rand-n0", "--rand-augment rand-m9-mstd0.5-inc1"
    plain, none, some = (np.stack([sets(f)[0].image(1, i) for i in range(80)]) for f in flags)
    red, green, blue = ((plain * STD + MEAN) * 255).swapaxes(0, 1)
    assert abs(blue - 77).max() < 1 and np.ptp(red, 1).max() < 2 and np.ptp(green, 2).max() < 2
    width = (red[:, 8, 12] - red[:, 8, 3]) / 9 * 16 / 4  # of the crop, in pixels
    height = (green[:, 12, 8] - green[:, 3, 8]) / 9 * 16 / 5
    assert 24 < (width < 0).sum() < 56 and height.min() > 0  # flips, and none upside down
    area = abs(width) * height / (48 * 64)
    assert 0.06 < area.min() < 0.2 and 0.4 < np.median(area) < 0.65 and 0.8 < area.max() < 1.1
    for other in (sets()[0].image(2, 3), sets("--seed 1")[0].image(1, 3)):  # of the same file
        assert abs(other - plain[3]).max() > 0.05
    assert same(plain, none) and same(sets(flags[2])[0].image(1, 9), some[9])
    assert 40 < (plain != some).any((1, 2, 3)).sum() < 80
    seen = np.stack([sets("--random-erasing 0.6")[0].image(0, i) for i in range(100)])
    erased = (abs(seen - (100 / 255 - MEAN) / STD) > 1e-5).any(1)  # of the grey image
    areas = np.array([np.prod(np.ptp(np.argwhere(mask), 0) + 1) for mask in erased if mask.any()])
    assert len(areas) == about(60, abs=15) and areas.sum() == erased.sum()  # rectangles
    noise = seen.transpose(0, 2, 3, 1)[erased]
    assert (noise.mean(), noise.std()) == about((0, 1), abs=0.1) and 0.2 < areas.max() / 256 < 0.4


def test_folders_name_the_labels_and_images_are_resized_and_normalized_as_imagenets(sets):
    hard = "--random-erasing 0.99 --rand-augment rand-m9"
    plain, val = sets(f"--no-augment {hard}")
    ramp, grey = Image.open(val.folder.samples[1][0]), np.full((16, 16, 3), 100)
    square = ramp.resize((16, 16), Image.BILINEAR)
    center = ramp.resize((24, 18), Image.BILINEAR).crop((4, 1, 20, 17))  # 18 = 16 / 0.875
    for images, want in ((plain, square), (val, square), (sets(hard)[1], center)):
        batches = train.load(images, [[(0, 2), (0, 0)], [(5, 1)]], train.parse_arguments([]))
        got, labels = (np.concatenate(part) for part in zip(*batches))
        close(got, (np.stack([want, grey, want]).transpose(0, 3, 1, 2) / 255 - MEAN) / STD, 0, 1e-5)
        assert (len(images), [*labels]) == (3, [1, 0, 1])


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own_and_validation_other_noise():
    args, _, _ = built("--accumulation-steps 2 --num-classes 4")
    steps = list(train.training_keys(14, 4, args, 0, 9))  # three an epoch; two samples wait
    epochs, orders = np.array(steps).reshape(3, 12, 2).transpose(2, 0, 1)
    assert same(epochs.T, [[0, 1, 2]] * 12) and set(orders.flat) == set(range(14))
    assert [len(set(order)) for order in orders] == [12] * 3 and len(set(map(str, orders))) == 3
    assert list(train.training_keys(14, 4, args, 4, 9)) == steps[4:]  # as when resumed
    assert next(train.training_keys(14, 4, built("--seed 1")[0], 0, 9)) != steps[0]
    splits = train.data_sets(args, 16)
    assert [(len(images), images.labels[6]) for images in splits] == [(4096, 2), (1000, 2)]
    seen = np.array([[images.image(i, i % 3).flat for i in range(400)] for images in splits])
    patterns = seen.reshape(2, 100, 4, -1).mean(1, keepdims=True)  # sample i is of class i % 4
    noise = (seen.reshape(2, 100, 4, -1) - patterns).reshape(800, -1)
    assert abs(np.corrcoef(noise) - np.eye(800)).max() < 0.25 and noise.std() == about(1, abs=0.02)
    assert abs(patterns[0] - patterns[1]).max() < 0.8 and patterns[0, 0].std(0).mean() > 0.2
    assert same(splits[0].image(3, 9).flat, seen[0, 3])
    assert (train.SyntheticImages("train", 9, 4, 16, 1).image(3, 0).flat != seen[0, 3]).all()


def test_initial_weights_have_the_distribution_of_their_kind():
    _, model, _ = built()
    for k, w in held(model).items():
        uniform, n = "patch" in k, w.size  # within 48^-0.5; else normal
        if "norm" in k or (k.endswith("bias") and not uniform):
            assert (w == k.endswith("weight")).all(), k
            continue
        w, beyond = w / ((3 * 48) ** -0.5 if uniform else 0.02), 0 if uniform else 0.0455
        seen = w.mean(), w.std() - 1, (abs(w) > 2).mean() - beyond
        bounds = 4 / np.sqrt(n), 4 / np.sqrt(2 * n), 4 * np.sqrt(beyond / n)
        assert (np.abs(seen) <= bounds).all() and (abs(w).max() <= 3**0.5 or not uniform), k
    assert len({w.flat[0] for w in held(model).values()}) == 19 and model.norm.eps == 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_sizes_and_parameters_are_those_of_the_papers(name):
    family, patch = name.split("_")[1], int(name.split("_")[2][5:])
    width, depth, mlp, heads, millions = PAPERS[family]
    block = 4 * width * (width + 1) + width * (2 * mlp + 1) + mlp + 4 * width
    outside = (3 * patch**2 + 4) * width + 1000 * (width + 1)
    count = outside + depth * block + ((224 // patch) ** 2 + 1) * width
    assert count / 1e6 == about(millions, rel=0.05) and len(MODELS) == 11
    dist.setup()
    one = VisionTransformer(**{**MODELS[name], "depth": 1}, img_size=patch)  # of one patch
    seen = MODELS[name]["depth"], one.blocks[0].self_attention.num_heads
    assert (*seen, one.patch_embed.patch_size) == (depth, heads, patch)
    counts = {one: outside + block + 2 * width}
    if width < 400 and patch == 16:
        counts[VisionTransformer(**MODELS[name])] = count
        counts[getattr(vision_transformer, name)()] = count
    assert [sum(w.numel() for w in each.parameters()) for each in counts] == [*counts.values()]


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_logits_loss_and_gradient_are_those_of_flowvisions_model_in_float64(smoothing):
    def compute(weights):
        theirs.load_state_dict({k: flow.tensor(w) for k, w in weights.items()})
        logits = theirs(flow.tensor(PIXELS[:4].astype(float))).numpy()
        return logits, (np.log(np.exp(logits).sum(1)) - (targets * logits).sum(1)).mean()

    _, model, _ = built(f"--layer-norm-eps 1e-6 --label-smoothing {smoothing}", 0.05)
    theirs = vision_transformer.VisionTransformer(num_classes=10, **SIZES).double().eval()
    targets = np.eye(4, 10, dtype="f4") * (1 - smoothing) + smoothing / 10
    start = {k: w.astype(float) for k, w in to_timm_state_dict(model).items()}
    logits = whole(model.eval()(batch_to_global(PIXELS[:4], 0))["prediction_scores"])
    labels = batch_to_global(targets if smoothing else np.arange(4), -1)
    loss = model.train()(batch_to_global(PIXELS[:4], 0), labels)["losses"]
    loss.backward()
    close(logits, compute(start)[0], atol=2e-6)
    close(whole(loss), compute(start)[1], atol=2e-6)
    found = held(model, gradients=True)
    way = {k: np.random.default_rng(1).standard_normal(g.shape) for k, g in found.items()}
    load_weights(model, way)
    move = to_timm_state_dict(model)
    up, down = (compute({k: start[k] + h * move[k] for k in start})[1] for h in (1e-6, -1e-6))
    close(sum((found[k] * way[k]).sum() for k in way), (up - down) / 2e-6, atol=2e-5)


def test_validation_counts_each_image_once_as_numpy_does_and_nan_is_wrong():
    args, model, _ = built("--micro-batch-size 5 --drop-rate 0.5", 0.1)
    images, labels = train.SyntheticImages("val", 23, 10, 16, 0), np.arange(23) % 10
    pixels = batch_to_global(np.stack([images.image(i, 0) for i in range(23)]), 0)
    logits = whole(model.eval()(pixels)["prediction_scores"]).astype(float)
    w, true = held(model), logits[np.arange(23), labels]
    better, loss = (logits.T > true).sum(0), np.mean(np.log(np.exp(logits).sum(1)) - true)
    assert {0, 4} < set(better) and max(better) > 4
    for scale, bias, want in (
        (1, w["head.bias"], [loss, (better < 1).mean(), (better < 5).mean()]),
        (0, np.ones(10), [np.log(10), 3 / 23, 13 / 23]),  # right are class 0, classes 0 to 4
        (1, np.where(np.arange(10) == 3, np.nan, 0), [np.nan, 0, 0]),
    ):
        load_weights(model, {**w, "head.weight": scale * w["head.weight"], "head.bias": bias})
        start = time.perf_counter()
        seen = train.evaluate(model.train(), images, args)
        speed = 23 / (time.perf_counter() - start)
        assert [seen[k] for k in ("val_loss", "top1", "top5")] == about(want, nan_ok=True)
        assert (model.training, seen["images"]) == (True, 23)
        assert seen["val_images_per_s"] == about(speed, rel=0.2)


# 6. The script ------------------------------------------------------------------------------------

OF_A_RANK = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"  # the engine sets them
CLEAN = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}


def train_py(*flags, before=()):
    """Run train.py to its end; its stderr without the engine's own lines."""
    command = [sys.executable, *before, "train.py", *map(str, flags)]
    run = subprocess.run(
        command, cwd=HERE, env=CLEAN, capture_output=True, text=True, timeout=200,
        start_new_session=True,  # OneFlow's launcher ends its children only as a group's leader
    )
    run.stderr = re.sub(r"libibverbs not available.*\n", "", run.stderr)
    return run


def run_here(*flags):
    """Run train.py in this process."""
    train.run(train.parse_arguments(list(map(str, flags))))


def metrics(folder):
    """The lines of metrics.jsonl; of a step that was done again, the last counts."""
    seen = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        seen[record["step"], "loss" in record] = record
    return [seen[key] for key in sorted(seen, key=lambda key: (key[0], not key[1]))]


def test_the_default_run_learns_to_tell_held_out_images_and_ends_with_its_figures(tmp_path):
    run = train_py("--output-dir", tmp_path)
    assert run.returncode == 0 and run.stderr == ""
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines[:-1]] == list(range(1, 201))
    assert lines[0].keys() == {"step", "loss", "lr", "images_per_s"}
    assert lines[0]["loss"] > 2 and lines[-1]["top1"] > 0.95 and lines[-1]["images"] == 1000
    assert lines[-1]["val_images_per_s"] > 0
    last = r"step: median (\S+) ms, (\S+) images/s; peak memory of rank 0: (\S+) GB\n"
    ms, speed, memory = map(float, re.search(last, run.stdout).groups())
    assert speed == pytest.approx(32e3 / ms, rel=0.01) and 0.1 < memory < 10
    speeds = [line["images_per_s"] for line in lines[:-1]]
    assert speed == pytest.approx(np.median(speeds[1:]), rel=0.01)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_folder(root, dict(train=32, val=11))
    return root


def test_training_on_a_folder_of_images_is_exact_on_any_mesh(images, tmp_path):
    flags = ["--data", images, *TINY, "--epochs", 10, "--eval-every", 15, "--lr", 0.003]
    run_here(*flags, "--micro-batch-size", 16, "--output-dir", tmp_path / "1")
    mesh = ["--data-parallel", 2, "--accumulation-steps", 2, "--eager"]
    run = train_py(*flags, *mesh, "--micro-batch-size", 4, "--output-dir", tmp_path / "2")
    assert run.returncode == 0, run.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 60 + 4
    for a, b in zip(one, two):
        for key in a.keys() - {"images_per_s", "val_images_per_s"}:
            assert abs(a[key] - b[key]) < 1e-3, (a, b)
    assert one[-1]["images"] == two[-1]["images"] == 33
    assert one[-1]["top1"] > 0.95 and abs(one[-1]["top1"] * 33 % 1 - 0.5) > 0.49


@in_processes(4)
def test_micro_batch_i_holds_the_same_samples_on_every_mesh():
    for mesh in ((4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1)):
        dist.setup(*mesh, 2)
        args = train.parse_arguments(["--accumulation-steps", "3"])
        keys = np.array(list(train.training_keys(50, 24, args, 0, 2)))[..., 1]  # (2, mine)
        held = batch_to_global(keys.T.astype("f4"), 0)  # (24, 2) over the first stage
        parts = np.split(whole(held), mesh[0])
        micro_batches = [np.concatenate([np.split(part, 3)[i] for part in parts]) for i in range(3)]
        order = np.random.default_rng([0, 0]).permutation(50)[:48].reshape(2, 24)
        assert np.array_equal(np.concatenate(micro_batches), order.T), mesh


BAD = {
    "--stage": "unrecognized arguments: --stage",
    "--tensor-parallel 3 --nnodes 2": "--nnodes must divide 3 processes",
    "--data-parallel 2 --nnodes 2 --master-port 9": "--nnodes needs --master-addr and --master-por",
    "--nnodes 1 --node-rank 1": "--node-rank 1 must be below --nnodes",
    "--model vit_nano": "invalid choice: 'vit_nano' .choose from 'vit_tiny_patch16_224', ",
    "--amp --eager": "--amp needs the graph",
    "--eager --activation-checkpoint": "--activation-checkpoint needs the graph",
    "--resume": "--resume needs --output-dir",
    "--save-every 2": "--save-every needs --output-dir",
    "--resume --output-dir x --init-from y": "--resume and --init-from: give one of them",
    "--eval-only": "--eval-only needs --init-from or --resume",
    "--micro-batch-size -1": "'-1' must be at least 1",
    "--drop-rate 1": "'1' must be at least 0 and below 1",
    "--lr nan": "'nan' must be at least 0",
    "--steps 5 --epochs 5": "--steps and --epochs: give one of them",
    "--mixup 0.2 --micro-batch-size 3": "soft labels take an even --micro-batch-size",
    "--depth 0": "--depth: '0' must be at least 1",
    "--amp": "--amp needs CUDA: no GPU here",
    "--device cuda": "device_type 'cuda' cannot run, take 'cpu': no GPU here",
    "--num-heads 3": "3 heads do not divide 64 features",
    "--img-size 33": "patches of side 8 do not divide images of side 33",
    "--data NOWHERE": "must hold a folder train: .*NOWHERE/train is missing",
    "--data EMPTY": "EMPTY/train: Couldn't find any class folder",
    "--data BARE": "BARE/train: Found no valid file for the classes a",
    "--data ODD": r"train and val must hold the same classes, not \['b'\]",
    "--data FEW --num-classes 1": "--num-classes 1 is below the 2 folders",
    "--data FEW --rand-augment wild": "'wild' must be a policy such as rand-m9",
    "--data FEW": "a batch of 32 images is more than the 4 there are",
    "--init-from NOWHERE": "NOWHERE must be an .npz file",
    "--init-from VOID": "VOID must be an .npz file",
    "--init-from ARRAY": "ARRAY must be an .npz file",
    "--eval-only --resume --output-dir OUT": "--eval-only needs a checkpoint: .*OUT holds none",
    "--output-dir VOID": "--output-dir .*VOID cannot be used",
    "--steps 9 --warmup-steps 9": "--warmup-steps 9 must be below all 9 steps",
}


@pytest.fixture(scope="session")
def bad_folders(tmp_path_factory):
    root, image = tmp_path_factory.mktemp("bad"), Image.new("RGB", (8, 8))
    for name, train_classes, val_classes, count in (
        ("EMPTY", "", "", 0), ("BARE", "a", "a", 0), ("ODD", "ab", "a", 2), ("BROKEN", "a", "a", 2),
        ("FALSE", "a", "a", 2), ("FEW", "ab", "ab", 2), ("HUGE", "a", "a", 2),
    ):  # fmt: skip
        for split, classes in (("train", train_classes), ("val", val_classes)):
            (root / name / split).mkdir(parents=True)
            for label in classes:
                (root / name / split / label).mkdir()
                for i in range(count):
                    image.save(root / name / split / label / f"{i}.png")
    (root / "BROKEN/train/a/1.png").write_text("not an image")
    (root / "FALSE/train/a/1.png").rename(root / "FALSE/train/a/1.jpg")  # a PNG under its name
    (root / "VOID").touch()
    np.save(open(root / "ARRAY", "wb"), np.zeros(3))
    Image.new("1", (10000, 9000)).save(root / "HUGE/train/a/1.png")
    return root


@pytest.mark.parametrize("flags", BAD)
def test_a_mistake_is_told_in_one_sentence(bad_folders, flags):
    words = [str(bad_folders / word) if word.isupper() else word for word in flags.split()]
    with pytest.raises(ValueError, match=BAD[flags]) as stop:
        run_here(*words)
    assert "\n" not in str(stop.value)


ENDS = {
    "--lr fast": "invalid float value: 'fast'",
    "--num-heads 3": "3 heads do not divide 64 features",
    "--tensor-parallel 2 --num-heads 5 --embed-dim 60": "2 tensor-parallel ranks do not divide 5",
    "--data FALSE --micro-batch-size 1": "FALSE/train/a/1.jpg cannot be read as an image",
    "--data HUGE --micro-batch-size 1": "HUGE/train/a/1.png cannot be read as an image: Image size",
    "--data-parallel 2 --master-addr no.such.host": "--master-addr no.such.host is no address",
    "--data BROKEN --micro-batch-size 1 --data-parallel 2 --eager": "a/1.png cannot be read as an",
}


@pytest.mark.parametrize("flags", ENDS)
def test_a_mistake_ends_the_run_with_one_sentence_and_exit_code_2(bad_folders, flags):
    words = [str(bad_folders / word) if word.isupper() else word for word in flags.split()]
    run = train_py(*words)
    assert run.returncode == 2, run.stderr
    assert re.fullmatch(f"train.py: .*{ENDS[flags]}[^\n]*\n", run.stderr), run.stderr


LAUNCH = "import vit3d; from oneflow.distributed import launch; launch.main()"


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def test_under_oneflows_launcher_a_run_does_not_start_again_and_a_mistake_is_told_once(tmp_path):
    before = ["-c", LAUNCH, "--nproc_per_node", "2", "--master_port", free_port()]
    run = train_py(*TINY, "--data-parallel", 2, "--eager", "--steps", 2, before=before)
    assert run.returncode == 0 and run.stdout.count("data 2 x tensor 1 x pipeline 1 = 2") == 1
    before[-1] = free_port()
    run = train_py("--data-parallel", 3, before=before)
    assert run.returncode == 1  # that of OneFlow's launcher
    assert run.stderr.count("3 x 1 x 1 = 3 must be the number of processes, 2") == 1


def test_under_a_schedulers_variables_a_run_does_not_start_again():
    command = [sys.executable, "train.py", *TINY, "--data-parallel", "2", "--eager", "--steps", "2"]
    more = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    runs = []
    for rank in "01":
        env = {**CLEAN, **more, "RANK": rank, "LOCAL_RANK": rank}
        runs.append(subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE, text=True))
        time.sleep(1)  # rank 0 listens first
    told = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and told[1] == ""
    assert told[0].count("data 2 x tensor 1 x pipeline 1 = 2") == 1 and "step 2 " in told[0]


def test_haswells_products_are_chosen_where_the_processor_has_them_and_the_user_set_nothing():
    has = {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split())
    for given, want in (({}, "Haswell" if has else "None"), ({"OPENBLAS_CORETYPE": "Zen"}, "Zen")):
        env = {key: value for key, value in CLEAN.items() if key != "OPENBLAS_CORETYPE"}
        code = "import vit3d, os; print(os.environ.get('OPENBLAS_CORETYPE'))"
        run = [sys.executable, "-c", code]
        told = subprocess.run(run, cwd=HERE, env={**env, **given}, capture_output=True, text=True)
        assert told.stdout == want + "\n"


def test_the_lines_of_the_readme_train_on_eight_processes_when_copied(tmp_path):
    text = (HERE / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "yours.py").write_text(lines)
    shutil.copy(HERE / "vit3d.py", tmp_path)
    command = [sys.executable, "-c", LAUNCH, "--nproc_per_node", "8", "--master_port", free_port()]
    run = subprocess.run(
        [*command, "yours.py"], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = re.findall(r"^\d+\.\d+$", run.stdout, re.M)
    assert len(losses) >= 3 and len(set(losses)) > 1, run.stdout


# 7. Ends and checkpoints --------------------------------------------------------------------------


def alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def all_end(pids, seconds=10):
    """Whether the processes end in this time, which the kernel needs to take one down."""
    deadline = time.time() + seconds
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    return not any(map(alive, pids))


def start(folder, *flags):
    """Start train.py and wait for five more lines of metrics.jsonl; return it and its children."""
    command = [sys.executable, "train.py", "--output-dir", folder, *flags]
    log, lines = open(folder.with_suffix(".log"), "a"), folder / "metrics.jsonl"
    before = len(lines.read_text().splitlines()) if lines.exists() else 0
    run = subprocess.Popen(list(map(str, command)), cwd=HERE, env=CLEAN, stdout=log, stderr=log)
    deadline = time.time() + 60
    while not lines.exists() or len(lines.read_text().splitlines()) < before + 5:
        time.sleep(0.02)
        assert run.poll() is None and time.time() < deadline, Path(log.name).read_text()
    return run, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()


def arrays(folder):
    newest = max(folder.glob("step-*.npz"))
    return {k: v for k, v in np.load(newest).items() if k.split("/")[0] not in ("about", "engine")}


def test_a_run_whose_rank_is_killed_goes_on_to_the_same_weights_to_the_bit(tmp_path):
    flags = [*TINY, "--data-parallel", 2, "--eager", "--steps", 40, "--save-every", 2]
    flags += ["--micro-batch-size", 4]
    assert train_py(*flags, "--output-dir", tmp_path / "whole").returncode == 0
    run, children = start(tmp_path / "killed", *flags)
    time.sleep(0.1)
    os.kill(int(children[1]), signal.SIGKILL)
    assert run.wait(timeout=30) == 1 and all_end(children)
    log = (tmp_path / "killed.log").read_text()
    assert re.search("train.py: a process ended by SIG.*, and with it the run", log)
    assert train_py(*flags, "--output-dir", tmp_path / "killed", "--resume").returncode == 0
    whole_run, killed = arrays(tmp_path / "whole"), arrays(tmp_path / "killed")
    assert whole_run.keys() == killed.keys()
    assert all(np.array_equal(whole_run[name], killed[name]) for name in killed)
    a, b = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert [line["step"] for line in a] == [line["step"] for line in b]
    assert [line.get("loss") for line in a] == [line.get("loss") for line in b]
    assert len(list((tmp_path / "killed").glob("step-*.npz"))) == 2  # --keep


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_signal_to_the_command_ends_all_processes(tmp_path, name):
    run, children = start(tmp_path / "out", *TINY, "--data-parallel", 2, "--steps", 9999, "--eager")
    run.send_signal(getattr(signal, name))
    assert run.wait(timeout=30) == {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9}[name]
    assert len(children) == 2 and all_end(children)
    assert "Traceback" not in (tmp_path / "out.log").read_text()


def test_a_run_of_one_process_outlives_its_shell(tmp_path):
    flags = [*TINY, "--eager", "--steps", 300, "--output-dir", tmp_path]
    command = " ".join(map(str, [sys.executable, "train.py", *flags]))
    shell = f"{command} & until [ -s {tmp_path}/metrics.jsonl ]; do sleep 0.1; done"
    subprocess.run(["bash", "-c", shell], cwd=HERE, env=CLEAN, timeout=60, capture_output=True)
    deadline = time.time() + 60
    while not (tmp_path / "step-00000300.npz").exists():
        time.sleep(0.1)
        assert time.time() < deadline


def test_a_run_goes_on_on_another_mesh_and_in_another_mode(images, tmp_path):
    flags = ["--data", images, *TINY, "--steps", 6, "--save-every", 3]
    data = "--data-parallel 2 --shard-params --micro-batch-size 8 --accumulation-steps 2".split()
    tensor = "--tensor-parallel 2 --sequence-parallel --eager".split()
    run_here(*flags, "--output-dir", tmp_path / "one")
    assert train_py(*flags, *tensor, "--output-dir", tmp_path / "two").returncode == 0
    for source, others in (("one", tensor), ("two", data)):
        folder = tmp_path / f"from-{source}"
        folder.mkdir()
        shutil.copy(tmp_path / source / "step-00000003.npz", folder)
        run = train_py(*flags, *others, "--output-dir", folder, "--resume")
        assert run.returncode == 0 and "step-00000003.npz\n" in run.stdout, run.stderr
        for got, want in zip(metrics(folder)[:3], metrics(tmp_path / "one")[3:]):
            assert got["step"] == want["step"] and got["lr"] == pytest.approx(want["lr"])
            assert abs(got["loss"] - want["loss"]) < 1e-5


def test_a_checkpoint_is_used_skipped_or_refused_with_a_reason(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*TINY, "--steps", 6, "--save-every", 3, "--eager", "--output-dir", folder]
    run_here(*flags, "--resume")
    assert "from the start" in capsys.readouterr().out
    third, sixth = sorted(folder.glob("step-*.npz"))
    last = metrics(folder)[-1]
    run_here(*TINY, "--eval-only", "--init-from", sixth, "--output-dir", tmp_path / "other")
    again = metrics(tmp_path / "other")[-1]
    assert {**again, "val_images_per_s": 0} == {**last, "step": 0, "val_images_per_s": 0}
    for more, message in (
        ([], "holds checkpoints already: --resume goes on"),
        (["--resume", "--micro-batch-size", 8], "batch_size was 32 and is 8"),
        (["--resume", "--seed", 1], "seed was 0 and is 1"),
        (["--resume", "--lr", 0.1, "--steps", 7], "steps was 6 and is 7; lr was 0.001 and is 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            run_here(*flags, *more)
    with pytest.raises(ValueError, match="6.npz is of another run: num_heads was 2 and is 4"):
        run_here(*TINY, "--num-heads", 4, "--eval-only", "--init-from", sixth)
    with pytest.raises(ValueError, match=r"head.weight has shape \(10, 32\), in the model"):
        run_here(*TINY, "--embed-dim", 16, "--init-from", sixth)
    with pytest.raises(ValueError, match="blocks.2.input_layernorm.bias is missing"):
        run_here(*flags, "--resume", "--depth", 3)
    (folder / "step-00000009.npz").write_bytes(sixth.read_bytes()[:1000])  # does not open
    run_here(*flags, "--resume")
    assert "skipped" in capsys.readouterr().err and metrics(folder)[-1] == last
    content = bytearray(sixth.read_bytes())
    content[len(content) // 2] ^= 1
    sixth.write_bytes(content)
    with pytest.raises(ValueError, match="step-00000006.npz is damaged: .* delete it to resume"):
        run_here(*flags, "--resume")
    with pytest.raises(ValueError, match="step-00000006.npz is damaged"):
        run_here(*TINY, "--init-from", sixth)
    assert sixth.read_bytes() == content
    np.savez(folder / "step-00000008.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="step-00000008.npz is no checkpoint"):
        run_here(*flags, "--resume")


def test_damaged_newer_files_do_not_count_against_keep(tmp_path):
    flags = [*TINY, "--steps", 4, "--save-every", 1, "--eager", "--keep", 1]
    tmp_path.joinpath("step-00000900.npz").touch()
    run_here(*flags, "--output-dir", tmp_path, "--resume")
    assert {path.name for path in tmp_path.glob("step-*")} == {
        "step-00000004.npz", "step-00000900.npz",
    }  # fmt: skip


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with open(tmp_path / "metrics.jsonl", "a") as held:
        train.fcntl.flock(held, train.fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run writes to --output-dir"):
            run_here(*TINY, "--output-dir", tmp_path)


@in_processes(2)
def test_machines_that_list_other_files_or_were_given_other_flags_are_refused():
    dist.setup(2)
    train.require_agreement("the same", 3)
    with pytest.raises(ValueError, match="machines differ in files, flags or device"):
        train.require_agreement("another", dist.rank)


def test_a_loss_that_is_not_finite_and_a_save_that_fails_are_told_in_one_sentence(tmp_path):
    flags = [*TINY, "--steps", 20, "--save-every", 1, "--eager", "--keep", 99]
    wild = ["--lr", 1e30, "--clip-grad", 0, "--warmup-steps", 0, "--output-dir", tmp_path / "wild"]
    run = train_py(*flags, *wild)
    assert run.returncode == 1
    step = int(re.fullmatch(r"train.py: .* step (\d+),.*\n", run.stderr)[1])
    assert all(int(path.stem[5:]) < step for path in (tmp_path / "wild").glob("step-*.npz"))
    assert len(metrics(tmp_path / "wild")) == step - 1  # what was printed is written
    folder = tmp_path / "small"
    flags = [*TINY, "--steps", 20, "--save-every", 10, "--eager", "--output-dir", folder]
    run_here(*flags)
    tenth, twentieth = sorted(folder.glob("step-*.npz"))
    twentieth.unlink()
    before = tenth.read_bytes()
    command = " ".join(map(str, [sys.executable, "train.py", *flags, "--resume"]))
    small = ["bash", "-c", f"ulimit -f 200; exec {command}"]  # of 1,024 bytes a file
    run = subprocess.run(small, cwd=HERE, env=CLEAN, capture_output=True, text=True)
    assert run.returncode == 1 and "train.py: [Errno 27] File too large\n" in run.stderr
    assert list(folder.glob("step-*.npz")) == [tenth] and tenth.read_bytes() == before


# 8. The proof as a table --------------------------------------------------------------------------


def print_proof():
    """A row for each mesh and mode, with two micro-batches: how far it is from one process."""
    print("10 steps with", *ON["everything"], "(--activation-checkpoint: graph alone)")
    print("mesh   mode   largest difference of a loss   of a weight")
    exit_code = 0
    with tempfile.TemporaryDirectory() as folder:
        make_references(Path(folder), OF_EVERYTHING)
        for n, bodies in BODIES.items():
            names = [each for each in bodies if "everything" in each and each.endswith("-2")]
            for name, ranks in start_ranks(n, Path(folder), names).items():
                _, mesh, mode, _ = name.split("-")
                failed, value = next((rank for rank in ranks if rank[0]), ranks[0])
                row = "{:<31.1e}{:.1e}".format(*value) if value else "NOT THAT OF ONE PROCESS"
                print(f"{mesh:<7}{mode:<7}{row}", flush=True)
                if failed:
                    exit_code = 1
                    print(failed, file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_bodies(sys.argv[2:], sys.argv[1])
    else:
        print_proof()
