# SPDX-License-Identifier: Apache-2.0
"""Each mesh computes what one process computes, and its axes are real.

Started by pytest, this file launches itself as the processes of a mesh: `workers(n, job)` runs the
function `job` in n processes of OneFlow's launcher, each of which writes what it saw to a file.
"""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
LAUNCH = "import vit3d; from oneflow.distributed import launch; launch.main()"


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def workers(n, job, out):
    """Run `job(out)` in n processes; return each rank's arrays by name."""
    out.mkdir()
    launcher = ["--nproc_per_node", str(n), "--master_port", free_port()]
    command = [sys.executable, "-c", LAUNCH, *launcher, __file__, job.__name__, str(out)]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    return [dict(np.load(out / f"{rank}.npz")) for rank in range(n)]


def train_py(*flags, launcher=(), timeout=200):
    """Run train.py to its end."""
    command = [sys.executable, *launcher, "train.py", *map(str, flags)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=timeout)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Every mesh against one process -----------------------------------------------------------------

MESHES = {
    n: [mesh for mesh in itertools.product((1, 2, 4), repeat=3) if np.prod(mesh) == n]
    for n in (2, 4, 8)
}
VARIANTS = {
    "graph": [],
    "eager": ["--eager"],
    "eager-accumulation": ["--eager", "--accumulation-steps", "2"],
    "accumulation-checkpoint": ["--accumulation-steps", "2", "--activation-checkpoint"],
    "shard": ["--shard-params"],
    "eager-shard": ["--shard-params", "--eager"],
    "shard-checkpoint": ["--shard-params", "--activation-checkpoint"],
}
SOME = {
    (2, 1, 1): ["shard", "eager-shard", "shard-checkpoint"],
    (2, 2, 2): ["eager-accumulation", "accumulation-checkpoint", "shard"],
}
CASES = [
    (mesh, variant)
    for n in (2, 4, 8)
    for mesh in MESHES[n]
    for variant in ["graph", "eager", *SOME.get(mesh, [])]
]


def depth_of(mesh):
    return mesh[2]  # one block a stage


def train_on_every_mesh(out):
    """Ten steps on each mesh of this many processes, by train.py's own code."""
    import train
    from vit3d import dist, whole

    seen = {}
    cases = [(*case, depth_of(case[0])) for case in CASES if np.prod(case[0]) == dist.world_size]
    if dist.world_size == 1:  # what the others are held against
        cases = [
            ((1, 1, 1), variant, depth) for variant in ("graph", "eager") for depth in (1, 2, 4)
        ]
    for mesh, variant, depth in cases:
        flags = "--img-size 16 --patch-size 4 --embed-dim 32 --num-heads 4 --num-classes 2".split()
        flags += "--steps 10 --lr 0.005 --weight-decay 0.5".split()
        flags += ["--depth", depth, *VARIANTS[variant]]
        for axis, size in zip(("data", "tensor", "pipeline"), mesh):
            flags += [f"--{axis}-parallel", size]
        micro_batches = mesh[0] * (2 if "accumulation" in variant else 1)
        flags += ["--micro-batch-size", 16 // micro_batches]
        args = train.parse_arguments(list(map(str, flags)))
        model, images, *_ = train.build(args)
        name = "x".join(map(str, mesh)) + f"-{variant}-{depth}"
        parameters = list(model.named_parameters())
        if variant in ("graph", "shard"):
            for key, value in parameters:
                seen[f"{name}/part/{key}"] = value.to_local().numpy().copy()
                seen[f"{name}/first/{key}"] = whole(value)
        trainer = train.Trainer(model, args)
        for group in trainer.optimizer.param_groups:
            # Adam divides by the size of the gradient. That of a key's bias is zero but for
            # rounding, which eps 1e-8 would let become whole steps, different on each mesh.
            group["eps"] = 1e-5
        batches = train.training_batches(len(images), args.batch_size, args.seed, 0, args.steps)
        losses = [trainer.step(*batch)[0] for batch in train.load(images, batches, args)]
        if dist.rank == 0:
            seen[f"{name}/losses"] = np.array(losses)
        tensors = trainer.tensors()
        for key, value in parameters:
            seen[f"{name}/last/{key}"] = whole(value)
            for moment in "mv":
                held = tensors[f"adam/{moment}/{key}"].to_local().numel()
                seen[f"{name}/{moment}/{key}"] = np.array(held)
    np.savez(out / f"{dist.rank}.npz", **seen)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """runs(n): what each of n ranks saw on all meshes of n processes; started when first asked."""
    done, folder = {}, tmp_path_factory.mktemp("meshes")

    def run(n):
        if n not in done:
            done[n] = workers(n, train_on_every_mesh, folder / str(n))
        return done[n]

    return run


def name_of(mesh, variant):
    return "x".join(map(str, mesh)) + f"-{variant}-{depth_of(mesh)}"


def those(seen, prefix):
    """Entries whose names start with the prefix, without it."""
    return {k[len(prefix) :]: v for k, v in seen.items() if k.startswith(prefix)}


@pytest.mark.parametrize("mesh, variant", CASES)
def test_ten_steps_give_the_losses_and_weights_of_one_process(runs, mesh, variant):
    here, name = runs(np.prod(mesh))[0], name_of(mesh, variant)
    mode = "eager" if "eager" in variant else "graph"
    one = those(runs(1)[0], f"1x1x1-{mode}-{depth_of(mesh)}/")
    np.testing.assert_allclose(here[f"{name}/losses"], one["losses"], rtol=0, atol=1e-5)
    for key, want in those(one, "last/").items():
        got = here[f"{name}/last/{key}"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5, err_msg=key)
        before = runs(1)[0][f"1x1x1-graph-{depth_of(mesh)}/first/{key}"]
        assert abs(want - before).max() > 1e-4, key  # all of it is trained


GRAPHS = [case[0] for case in CASES if case[1] == "graph"]


@pytest.mark.parametrize("mesh", GRAPHS)
def test_one_seed_gives_the_same_weights_to_the_bit(runs, mesh):
    here = those(runs(np.prod(mesh))[0], name_of(mesh, "graph") + "/first/")
    one = those(runs(1)[0], f"1x1x1-graph-{depth_of(mesh)}/first/")
    assert here.keys() == one.keys()
    assert all(np.array_equal(here[key], one[key]) for key in one)


@pytest.mark.parametrize("mesh", GRAPHS)
def test_each_rank_holds_its_slice_of_the_layers_of_its_stage_and_nothing_else(runs, mesh):
    data, tensor, stages = mesh
    blocks = depth_of(mesh)
    columns, rows = ("query_key_value.", "dense_h_to_4h."), ("attention.dense.w", "4h_to_h.w")
    whole = those(runs(1)[0], f"1x1x1-graph-{blocks}/first/")
    for rank, seen in enumerate(runs(np.prod(mesh))):
        stage, shard = rank // (data * tensor), rank % tensor
        for key, want in whole.items():
            if key.startswith("blocks"):
                home = int(key.split(".")[1]) * stages // blocks
            else:
                home = stages - 1 if key.startswith(("norm", "head")) else 0
            part = seen[f"{name_of(mesh, 'graph')}/part/{key}"]
            if home != stage:
                assert part.size == 0, (rank, key)
                continue
            if any(word in key for word in columns):
                want = np.split(want, tensor, 0)[shard]
            elif any(word in key for word in rows):
                want = np.split(want, tensor, 1)[shard]
            assert np.array_equal(part, want), (rank, key)


@pytest.mark.parametrize("mesh", [(2, 1, 1), (2, 2, 2)])
def test_sharded_weights_and_moments_lie_split_over_the_replicas_too(runs, mesh):
    for seen in runs(np.prod(mesh)):
        for key, part in those(seen, name_of(mesh, "shard") + "/part/").items():
            whole = seen[f"{name_of(mesh, 'graph')}/part/{key}"]
            replicated = key.endswith(("value.bias", "h_to_4h.bias"))  # of column-parallel layers
            assert part.size == whole.size // (1 if replicated else mesh[0]), key
            for moment in "mv":
                assert seen[f"{name_of(mesh, 'shard')}/{moment}/{key}"] == part.size


# One mesh of four processes, looked at closely --------------------------------------------------


def images_and_labels(n, size, classes):
    rng = np.random.default_rng(1)
    return rng.standard_normal((n, 3, size, size)).astype("f4"), rng.integers(0, classes, n)


def as_in_the_reference():
    """A small model in the way of LiBai's tutorial, its own parameters and initialization too."""
    import oneflow as flow
    from flowvision.layers.weight_init import trunc_normal_
    from oneflow import nn

    from vit3d import LayerNorm, Linear, PatchEmbedding, TransformerLayer, dist

    class Reference(nn.Module):
        def __init__(self, width=8, depth=2, num_classes=3):
            super().__init__()
            self.patch_embed = PatchEmbedding(img_size=8, patch_size=4, in_chans=3, embed_dim=width)
            broadcast = dict(
                sbp=dist.get_nd_sbp([flow.sbp.broadcast, flow.sbp.broadcast]),
                placement=dist.get_layer_placement(0),
            )
            self.cls_token = nn.Parameter(flow.zeros(1, 1, width, **broadcast))
            patches = self.patch_embed.num_patches
            self.pos_embed = nn.Parameter(flow.zeros(1, patches + 1, width, **broadcast))
            self.pos_drop = nn.Dropout(p=0.0)
            layers = [
                TransformerLayer(
                    hidden_size=width,
                    ffn_hidden_size=4 * width,
                    num_attention_heads=2,
                    attention_dropout_prob=0.0,
                    output_dropout_prob=0.0,
                    drop_path_prob=prob.item(),
                    layer_idx=i,
                )
                for i, prob in enumerate(flow.linspace(0, 0, depth))
            ]
            self.blocks = nn.Sequential(*layers)
            self.norm = LayerNorm(width, layer_idx=-1)
            self.head = Linear(width, num_classes, layer_idx=-1)
            self.loss_func = nn.CrossEntropyLoss()
            trunc_normal_(self.pos_embed, std=0.02)
            self.apply(self.init)

        def init(self, module):
            if isinstance(module, Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.constant_(module.bias, 0)
            elif isinstance(module, LayerNorm):
                nn.init.constant_(module.weight, 1.0)

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

    return Reference()


def look_closely(out):
    """Layers, dropout, stages and a model written as in the reference, on 4 processes."""
    import oneflow as flow
    from oneflow import nn

    import train
    from vit3d import B, Dropout, DropPath, Linear, S, VisionTransformer, dist, whole

    seen = {"default": np.array(str(dist))}
    dist.setup(2, 2, 1)
    world = dist.get_layer_placement(0)
    for parallel in ("col", "row"):
        layer = Linear(6, 4, parallel=parallel)
        x = np.random.default_rng(0).standard_normal((8, 3, 6)).astype("f4")
        replica = x[dist.get_data_parallel_rank() * 4 :][:4]
        x = train.to_global(replica, 0).requires_grad_()
        y = layer(x)
        seen[f"{parallel}/y/part"] = y.to_local().numpy()
        (y * y).sum().backward()
        for key, value in dict(
            x=x, y=y, dx=x.grad, w=layer.weight, b=layer.bias, dw=layer.weight.grad,
            db=layer.bias.grad,
        ).items():  # fmt: skip
            seen[f"{parallel}/{key}"] = whole(value)

    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.path = Dropout(0.5), Dropout(0.5), DropPath(0.5)

        def forward(self, x, heads):
            return self.first(x), self.second(x), self.path(x), self.first(heads)

    class Graph(nn.Graph):
        def __init__(self, model):
            super().__init__()
            self.model = model
            if isinstance(model, VisionTransformer):
                model.set_pipeline_stage_id(self.model)

        def build(self, *inputs):
            return self.model(*inputs)

    x = flow.ones(8, 16, 16, placement=world, sbp=[S(0), B])
    heads = flow.ones(8, 16, 16, placement=world, sbp=[S(0), S(1)])
    for mode, drops in dict(eager=Drops(), graph=Graph(Drops())).items():
        for step in range(2):
            for key, value in zip(("first", "second", "path", "heads"), drops(x, heads)):
                seen[f"{mode}/{step}/{key}"] = value.to_local().numpy()

    for kind, stage_ids, layers in (
        ("even", None, 8), ("remainder", None, 6), ("custom", [0, 1, 1, 1, 2, 3], 6),
    ):  # fmt: skip
        dist.setup(1, 1, 4, pipeline_num_layers=layers, custom_pipeline_stage_id=stage_ids)
        size = dict(img_size=8, patch_size=4, embed_dim=8, num_heads=2, num_classes=3)
        model = VisionTransformer(depth=layers, **size)
        seen[f"{kind}/ids"] = np.array([dist.get_layer_stage_id(i) for i in range(layers)])
        seen[f"{kind}/last"] = np.array([dist.get_layer_stage_id(-1)])
        seen[f"{kind}/holds"] = np.array(
            [block.mlp.dense_4h_to_h.bias.to_local().numel() for block in model.blocks]
        )
        graph = Graph(model.eval())
        images, labels = images_and_labels(4, 8, 3)
        graph(train.to_global(images, 0))
        stages = [block.to(nn.graph.GraphModule).stage_id for block in graph.model.blocks] + [
            graph.model.head.to(nn.graph.GraphModule).stage_id
        ]
        seen[f"{kind}/graph"] = np.array(stages)
        seen[f"{kind}/drawn"] = np.array(str(dist))

    for mesh in ((2, 2, 1), (2, 1, 2), (1, 2, 2)):
        dist.setup(*mesh, pipeline_num_layers=2)
        model = as_in_the_reference()
        share, replica = 8 // mesh[0], dist.get_data_parallel_rank()
        images, labels = (a[replica * share :][:share] for a in images_and_labels(8, 8, 3))
        ours = VisionTransformer(depth=2, **size)
        named = dict(model.named_parameters())
        state = {
            key: flow.tensor(
                np.random.default_rng(len(key)).standard_normal(value.shape, "f4")
            ).to_global(placement=flow.placement("cpu", list(range(4))), sbp=B)
            for key, value in ours.state_dict().items()
        }
        ours.load_state_dict(state, strict=True)
        model.load_state_dict(state, strict=True)
        assert named.keys() == state.keys()
        inputs = train.to_global(images, 0), train.to_global(labels, -1)
        name = "x".join(map(str, mesh))
        seen[f"{name}/losses"] = whole(model.train()(*inputs)["losses"])
        seen[f"{name}/want"] = whole(ours.train()(*inputs)["losses"])
        graph = Graph(model.eval())
        seen[f"{name}/scores"] = whole(graph(*inputs)["prediction_scores"])
        seen[f"{name}/eager"] = whole(ours.eval()(*inputs)["prediction_scores"])
    np.savez(out / f"{dist.rank}.npz", **seen)


@pytest.fixture(scope="session")
def looks(tmp_path_factory):
    return workers(4, look_closely, tmp_path_factory.mktemp("looks") / "4")


@pytest.mark.parametrize("parallel", ["col", "row"])
def test_parallel_linear_computes_what_numpy_computes_forward_and_backward(looks, parallel):
    x, y, dx, w, b, dw, db = (looks[0][f"{parallel}/{k}"] for k in "x y dx w b dw db".split())
    want = x @ w.T + b
    np.testing.assert_allclose(y, want, atol=1e-6)
    np.testing.assert_allclose(dx, 2 * want @ w, atol=1e-6)
    np.testing.assert_allclose(dw, np.einsum("bno,bni->oi", 2 * want, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(db, (2 * want).sum((0, 1)), rtol=1e-5, atol=1e-6)
    for rank, seen in enumerate(looks):
        part = np.split(want, 2, 0)[rank // 2]
        if parallel == "col":
            part = np.split(part, 2, 2)[rank % 2]
        np.testing.assert_allclose(seen[f"{parallel}/y/part"], part, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_dropout_differs_by_layer_step_replica_and_shard_and_agrees_on_copies(looks, mode):
    masks = [those(seen, f"{mode}/") for seen in looks]
    kinds = ("first", "second", "path", "heads")
    for mask, step, kind in itertools.product(masks, "01", kinds):
        assert set(np.unique(mask[f"{step}/{kind}"])) <= {0.0, 2.0}
        assert kind == "path" or abs(mask[f"{step}/{kind}"].mean() - 1) < 0.2
    for step, kind in itertools.product("01", ("first", "second")):
        a, b, c, d = (mask[f"{step}/{kind}"] for mask in masks)
        assert np.array_equal(a, b) and np.array_equal(c, d)  # tensor-parallel copies
        assert not np.array_equal(a, c)  # replicas
    for mask in masks:
        assert not np.array_equal(mask["0/first"], mask["0/second"])
        assert not np.array_equal(mask["0/first"], mask["1/first"])
    slices = [mask["0/heads"].tobytes() for mask in masks]
    assert len(set(slices)) == 4  # the heads of a shard are its own
    paths = [np.concatenate([mask[f"{s}/path"][:, 0, 0] for s in "01"]) for mask in masks]
    assert np.array_equal(paths[0], paths[1]) and not np.array_equal(paths[0], paths[2])
    path = masks[0]["0/path"]
    assert (path == path[:, :1, :1]).all()  # whole samples


@pytest.mark.parametrize(
    "kind, ids",
    dict(even=[0, 0, 1, 1, 2, 2, 3, 3], remainder=[0, 1, 2, 2, 3, 3], custom=[0, 1, 1, 1, 2, 3])
    .items(),
)  # fmt: skip
def test_blocks_lie_on_the_stages_that_were_asked_for(looks, kind, ids):
    for rank, seen in enumerate(looks):
        assert seen[f"{kind}/ids"].tolist() == ids and seen[f"{kind}/last"] == 3
        assert (seen[f"{kind}/holds"] > 0).tolist() == [i == rank for i in ids]
        assert seen[f"{kind}/graph"].tolist() == ids + [3]  # the ids that make it 1F1B
    drawn = str(looks[0]["custom/drawn"]).splitlines()
    assert drawn[1].split("  ")[-1].strip() == "stage 3: blocks 5-5" and drawn[-1].endswith("3")


def test_processes_are_replicas_until_a_mesh_is_laid_out(looks):
    assert all(str(seen["default"]).startswith("data 4 x tensor 1 x pipeline 1") for seen in looks)


@pytest.mark.parametrize("mesh", ["2x2x1", "2x1x2", "1x2x2"])
def test_a_model_written_as_in_the_reference_runs_and_loads_libai_names_strictly(looks, mesh):
    losses, want, scores, eager = (
        looks[0][f"{mesh}/{key}"] for key in ("losses", "want", "scores", "eager")
    )
    np.testing.assert_allclose(losses, want, atol=1e-6)
    np.testing.assert_allclose(scores, eager, atol=1e-5)
    np.testing.assert_allclose(scores, looks[0]["2x2x1/scores"], atol=1e-5)


# One process, and the script ---------------------------------------------------------------------


def numpy_state(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def beside_flowvision(name=None):
    """Logits of flowvision's model and of ours with its weights, which go there and back."""
    import train
    from flowvision.models import vision_transformer

    from vit3d import (
        MODELS, VisionTransformer, flow, load_timm_state_dict, to_timm_state_dict, whole,
    )  # fmt: skip

    size = MODELS[name] if name else dict(patch_size=32, embed_dim=64, depth=4, num_heads=4)
    flow.manual_seed(0)
    theirs = vision_transformer.VisionTransformer(**size).eval()
    rng = np.random.default_rng(0)  # not the initial values: zero biases and a zero head hide much
    state = {
        key: (value + rng.normal(0, 0.05, value.shape)).astype("f4")
        for key, value in numpy_state(theirs).items()
    }
    theirs.load_state_dict({key: flow.tensor(value) for key, value in state.items()})
    ours = VisionTransformer(**size, layer_norm_eps=1e-6).eval()
    load_timm_state_dict(ours, state)
    images, _ = images_and_labels(2, 224, 1)
    with flow.no_grad():
        want = theirs(flow.tensor(images)).numpy()
        got = whole(ours(train.to_global(images, 0))["prediction_scores"])
    back = to_timm_state_dict(ours)
    exact = back.keys() == state.keys() and all(np.array_equal(back[k], state[k]) for k in state)
    return dict(got=got, want=want, exact=np.array(exact))


def flowvision_on_four(out):
    from vit3d import VisionTransformer, dist

    dist.setup(1, 2, 2, pipeline_num_layers=4)
    with pytest.raises(
        ValueError, match="depth 3 must be the pipeline_num_layers of dist.setup, 4"
    ):
        VisionTransformer(depth=3)
    np.savez(out / f"{dist.rank}.npz", **beside_flowvision())


@pytest.mark.parametrize("size", ["tiny", "small", "4 blocks on 1x2x2"])
def test_logits_are_flowvisions_with_its_weights_which_come_back_exactly(size, tmp_path):
    if "on" in size:
        seen = workers(4, flowvision_on_four, tmp_path / "4")
    else:
        import train  # noqa: F401
        from vit3d import dist

        dist.setup()
        seen = [beside_flowvision(f"vit_{size}_patch16_224")]
    for each in seen:
        assert each["exact"] and abs(each["want"]).max() > 1
        np.testing.assert_allclose(each["got"], each["want"], atol=1e-4)


def test_timm_weights_of_another_grid_and_head_load_and_misfits_are_named():
    from vit3d import VisionTransformer, dist, load_timm_state_dict, to_timm_state_dict

    dist.setup()
    size = dict(patch_size=4, embed_dim=8, depth=1, num_heads=2)
    small = VisionTransformer(img_size=16, num_classes=3, **size)
    large = VisionTransformer(img_size=32, num_classes=5, **size)
    state, head = to_timm_state_dict(small), large.head.weight.numpy().copy()
    ramp = np.arange(4.0).repeat(4)  # rises by row: so must what is made of it
    state["pos_embed"][0, 1:] = ramp[:, None]
    with pytest.raises(ValueError, match=r"head.weight has shape \(3, 8\), in the model \(5, 8\)"):
        load_timm_state_dict(large, state)
    load_timm_state_dict(large, state, keep_head=True)
    assert np.array_equal(large.head.weight.numpy(), head)
    grid = large.pos_embed.numpy()[0, 1:].reshape(8, 8, 8)
    assert np.allclose(grid[:, :1], grid) and (np.diff(grid[:, 0, 0]) > 0).all()
    assert np.allclose(grid[2:6, 0, 0], [0.75, 1.25, 1.75, 2.25], atol=0.05)
    assert np.array_equal(large.pos_embed.numpy()[0, 0], state["pos_embed"][0, 0])
    state["blocks.0.attn.odd"] = state.pop("norm.bias")
    with pytest.raises(ValueError, match="odd is not in the model; .*norm.bias is missing"):
        load_timm_state_dict(small, state)


def test_the_default_run_learns_to_tell_held_out_images(tmp_path):
    run = train_py("--output-dir", tmp_path)
    assert run.returncode == 0 and run.stderr == ""
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines[:-1]] == list(range(1, 201))
    assert lines[0].keys() == {"step", "loss", "lr", "images_per_s"}
    assert lines[0]["loss"] > 2 and lines[-1]["top1"] > 0.95 and lines[-1]["images"] == 1000
    rates = [line["lr"] for line in lines[:-1]]
    assert np.allclose(rates[:21], np.linspace(5e-5, 1e-3, 21))
    assert rates[20] == max(rates) == pytest.approx(1e-3) and rates[-1] < 1e-5


def test_a_model_that_gives_nan_is_right_about_nothing():
    import train

    args = train.parse_arguments([*TINY, "--num-classes", "8"])
    model, images, val, _ = train.build(args)
    model.head.bias.data.copy_(model.head.bias.data * np.nan)
    seen = train.evaluate(model, val, args)
    assert seen["top1"] == seen["top5"] == 0 and np.isnan(seen["val_loss"])


def test_a_run_of_one_process_outlives_its_shell(tmp_path):
    command = [
        sys.executable,
        "train.py",
        *TINY,
        "--eager",
        "--steps",
        300,
        "--output-dir",
        tmp_path,
    ]
    shell = (
        f"{' '.join(map(str, command))} & until [ -s {tmp_path}/metrics.jsonl ]; do sleep 0.1; done"
    )
    subprocess.run(["bash", "-c", shell], cwd=HERE, timeout=60)  # it ends while the run trains
    deadline = time.time() + 60
    while not (tmp_path / "step-00000300.npz").exists():
        time.sleep(0.1)
        assert time.time() < deadline


def test_the_benchmark_counts_the_matrix_products_of_the_model():
    flags = ["--data-parallel", 2, "--micro-batch-size", 4, "--eager", "--benchmark"]
    run = train_py(*TINY, *flags)
    assert run.returncode == 0, run.stderr
    # in multiply-adds: 2 blocks of 12 weights of 32 x 32 and two of 17 x 17 x 32, patches, head
    image = 2 * (17 * 12 * 32**2 + 2 * 17**2 * 32) + 16 * 48 * 32 + 32 * 10
    for name, flops in (("step", 6), ("inference", 2)):
        figures = re.search(rf"{name}: (\S+) ms, (\S+) images/s, (\S+) GFLOP/s", run.stdout)
        ms, rate, speed = map(float, figures.groups())
        assert rate == pytest.approx(8e3 / ms, rel=0.1)
        assert speed == pytest.approx(flops * image * rate / 1e9, rel=0.02)
    assert re.search(r"of a process: [1-9]\d+ to [1-9]\d+ MB\n", run.stdout)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three classes that differ by colour: 96 images to train on, 31 to validate."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 31)):
        for i in range(count):
            place = root / split / f"class{i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (20, 24, 3))
            pixels[..., i % 3] += 100
            Image.fromarray(pixels.astype("u1")).save(place / f"{i}.png")
    return root


TINY = "--img-size 16 --patch-size 4 --embed-dim 32 --depth 2 --num-heads 2".split()


def test_training_on_a_folder_of_images_is_exact_on_any_mesh(folder, tmp_path):
    flags = ["--data", folder, *TINY, "--epochs", 10, "--eval-every", 15, "--lr", 0.003]
    one = train_py(*flags, "--micro-batch-size", 16, "--output-dir", tmp_path / "1")
    mesh = ["--data-parallel", 2, "--pipeline-parallel", 2, "--accumulation-steps", 2]
    four = train_py(
        *flags, *mesh, "--micro-batch-size", 4, "--output-dir", tmp_path / "4", "--eager"
    )
    assert one.returncode == four.returncode == 0, one.stderr + four.stderr
    one, four = metrics(tmp_path / "1"), metrics(tmp_path / "4")
    assert len(one) == len(four) == 60 + 4
    for a, b in zip(one, four):
        for key in a.keys() - {"images_per_s"}:
            assert abs(a[key] - b[key]) < 1e-3, (a, b)
    assert one[-1]["images"] == four[-1]["images"] == 31
    assert one[-1]["top1"] > 0.95 and abs(one[-1]["top1"] * 31 % 1 - 0.5) > 0.49


MISTYPED = {
    "--stage-ids 0,a": "'0,a' must be stages such as",
    "--tensor-parallel 3 --nnodes 2": "--nnodes 2 must divide 3 processes",
    "--model vit_nano": "'vit_nano' must be one of vit_tiny_patch16_224, ",
    "--amp": "--amp needs a GPU",
    "--resume": "--resume needs --output-dir",
    "--eval-only": "--eval-only needs --init-from or --resume",
    "--device cuda": "--device cuda needs a GPU",
    "--micro-batch-size -1": "'-1' must be a whole number",
    "--drop-rate 1": "'1' must be a number at least 0 and below 1",
    "--lr fast": "'fast' must be a number above 0",
    "--steps 5 --epochs 5": "give one of them",
}
BAD = {
    "--tensor-parallel 2 --num-heads 5 --embed-dim 60": "2 tensor-parallel ranks .* 5 heads",
    "--tensor-parallel 2 --mlp-ratio 1.016": "2 tensor-parallel ranks do not divide 65 features",
    "--pipeline-parallel 2 --depth 1": "1 layers are too few for 2 stages",
    "--pipeline-parallel 2 --stage-ids 0,1,1": "name 3 layers, the model has 4",
    "--pipeline-parallel 2 --stage-ids 0,1,0,1": r"\[0, 1, 0, 1\] must rise from 0 to 1",
    "--pipeline-parallel 2 --stage-ids 0,0,0,2": "must rise from 0 to 1 and leave out none",
    "--num-heads 3": "3 heads do not divide 64 features",
    "--img-size 33": "patches of side 8 do not divide images of side 33",
    "--data NOWHERE": "must hold a folder train, and .*NOWHERE/train is none",
    "--data EMPTY": "EMPTY/train: Couldn't find any class folder",
    "--data BARE": "BARE/train: Found no valid file for the classes a",
    "--data ODD": r"train and val must hold the same classes, not \['b'\]",
    "--data BROKEN --micro-batch-size 1": "BROKEN/train/a/1.png cannot be read as an image",
    "--data BROKEN --micro-batch-size 1 --tensor-parallel 2 --eager": "a/1.png cannot be read",
    "--data FEW --num-classes 1": "--num-classes 1 is below the 2 folders",
    "--data FEW --rand-augment wild": "'wild' must be a policy such as rand-m9",
    "--data FEW": "a batch of 32 images is more than the 4 there are",
    "--init-from NOWHERE": "NOWHERE must be an .npz file",
    "--init-from VOID": "VOID must be an .npz file",
    "--eval-only --resume --output-dir OUT": "--eval-only needs a checkpoint, and .*OUT holds none",
    "--steps 9 --warmup-steps 9": "--warmup-steps 9 must be below all 9 steps",
    "--mixup 0.2 --micro-batch-size 3": "--micro-batch-size 3 is odd",
    "--depth 0": "--depth: '0' must be a whole number at least 1",
}


@pytest.fixture(scope="session")
def bad_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    image = Image.new("RGB", (8, 8))
    for name, splits in dict(
        EMPTY=dict(train="", val=""), BARE=dict(train="a", val="a"), ODD=dict(train="ab", val="a"),
        BROKEN=dict(train="a", val="a"), FEW=dict(train="ab", val="ab"),
    ).items():  # fmt: skip
        for split, classes in splits.items():
            (root / name / split).mkdir(parents=True)
            for label in classes:
                (root / name / split / label).mkdir()
                for i in range(2 * (name != "BARE")):
                    image.save(root / name / split / label / f"{i}.png")
    (root / "BROKEN/train/a/1.png").write_text("not an image")
    (root / "VOID").touch()
    return root


@pytest.mark.parametrize("flags", BAD)
def test_a_mistake_gets_one_sentence_and_exit_code_2(bad_folders, flags):
    words = [str(bad_folders / word) if word.isupper() else word for word in flags.split()]
    run = train_py(*words)
    assert run.returncode == 2, run.stderr
    assert re.fullmatch(f"train.py: .*{BAD[flags]}.*\n", run.stderr), run.stderr


@pytest.mark.parametrize("flags", MISTYPED)
def test_a_flag_that_is_no_use_gets_one_sentence_and_exit_code_2(flags, capsys):
    import train

    with pytest.raises(SystemExit) as stop:
        train.parse_arguments(flags.split())
    assert stop.value.code == 2
    assert re.fullmatch(f"train.py: .*{MISTYPED[flags]}.*\\n", capsys.readouterr().err)


def test_a_mesh_that_the_launcher_did_not_start_gets_one_sentence():
    launcher = ["-c", LAUNCH, "--nproc_per_node", "2", "--master_port", free_port()]
    run = train_py("--data-parallel", 3, launcher=launcher)
    assert run.returncode == 1  # that of OneFlow's launcher
    assert run.stderr.count("3 x 1 x 1 = 3 must be the number of processes, 2") == 1


def test_the_module_raises_value_errors():
    from vit3d import B, Dropout, Linear, MultiheadAttention, VisionTransformer, dist, flow

    dist.setup()
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    for call in (
        lambda: dist.setup(2),
        lambda: dist.setup(0),
        lambda: dist.setup(device_type="tpu"),
        lambda: dist.setup(pipeline_num_layers=2, custom_pipeline_stage_id=[0]),
        lambda: Linear(4, 4, parallel="diagonal"),
        lambda: MultiheadAttention(8, 3),
        lambda: Dropout(1.0),
        lambda: VisionTransformer(img_size=30),
        lambda: model(flow.zeros(1, 3, 9, 9, placement=dist.get_layer_placement(0), sbp=[B])),
    ):
        with pytest.raises(ValueError, match="must|do not divide|takes|name"):
            call()


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
    """Start train.py and wait for five lines of its metrics.jsonl; return it and its children."""
    command = [sys.executable, "train.py", "--output-dir", folder, *flags]
    log, lines = open(folder.with_suffix(".log"), "w"), folder / "metrics.jsonl"
    before = lines.read_text() if lines.exists() else ""
    run = subprocess.Popen(
        list(map(str, command)), cwd=HERE, stdout=log, stderr=log, start_new_session=True
    )
    deadline = time.time() + 60
    while not lines.exists() or len(lines.read_text()) < 400 or lines.read_text() == before:
        time.sleep(0.02)
        assert run.poll() is None and time.time() < deadline, Path(log.name).read_text()
    return run, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()


# Long runs --------------------------------------------------------------------------------------


def arrays(folder):
    newest = max(folder.glob("step-*.npz"))
    return {k: v for k, v in np.load(newest).items() if "about" not in k}


def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights_to_the_bit(tmp_path):
    flags = [*TINY, "--data-parallel", 2, "--eager", "--steps", 60, "--save-every", 2]
    flags += ["--micro-batch-size", 4]
    assert train_py(*flags, "--output-dir", tmp_path / "whole").returncode == 0
    for victim, delay in (("rank", 0.1), ("all", 0.33)):
        run, children = start(tmp_path / "killed", *flags, "--resume")
        time.sleep(delay)
        if victim == "all":
            os.killpg(run.pid, signal.SIGKILL)
        else:
            os.kill(int(children[1]), signal.SIGKILL)
        assert run.wait(timeout=30) != 0
        assert all_end(children)
        if victim == "rank":
            log = (tmp_path / "killed.log").read_text()
            assert re.search("train.py: a process was ended by SIG.*, and with it the run", log)
    assert train_py(*flags, "--output-dir", tmp_path / "killed", "--resume").returncode == 0
    whole, killed = arrays(tmp_path / "whole"), arrays(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(np.array_equal(whole[key], killed[key]) for key in whole)
    a, b = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert [line["step"] for line in a] == [line["step"] for line in b]
    assert [line.get("loss") for line in a] == [line.get("loss") for line in b]
    assert len(list((tmp_path / "killed").glob("step-*.npz"))) == 2  # --keep


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_command_ends_all_processes(tmp_path, name):
    run, children = start(tmp_path / "out", *TINY, "--data-parallel", 2, "--steps", 9999, "--eager")
    run.send_signal(getattr(signal, name))
    assert run.wait(timeout=30) == 1 and len(children) == 2 and all_end(children)


def test_a_run_goes_on_on_another_mesh_and_in_another_mode(tmp_path):
    flags = [*TINY, "--steps", 12, "--save-every", 6]
    mesh = "--data-parallel 2 --tensor-parallel 2 --shard-params --micro-batch-size 16".split()
    assert train_py(*flags, "--output-dir", tmp_path / "one").returncode == 0
    assert train_py(*flags, *mesh, "--eager", "--output-dir", tmp_path / "four").returncode == 0
    for source, others in (("one", mesh), ("four", ["--eager"])):
        folder = tmp_path / f"from-{source}"
        folder.mkdir()
        shutil.copy(tmp_path / source / "step-00000006.npz", folder)
        run = train_py(*flags, *others, "--output-dir", folder, "--resume")
        assert run.returncode == 0 and "step-00000006.npz\n" in run.stdout, run.stderr
        for got, want in zip(metrics(folder)[:6], metrics(tmp_path / "one")[6:]):
            assert got["step"] == want["step"] and got["lr"] == pytest.approx(want["lr"])
            assert abs(got["loss"] - want["loss"]) < 1e-5


def test_a_checkpoint_is_used_skipped_or_refused_with_a_reason(tmp_path):
    flags = [*TINY, "--steps", 6, "--save-every", 3, "--eager", "--output-dir", tmp_path / "run"]
    assert "anew" in train_py(*flags, "--resume").stdout
    third, sixth = sorted((tmp_path / "run").glob("step-*.npz"))
    last = metrics(tmp_path / "run")[-1]
    again = train_py(*flags)
    assert again.returncode == 2 and "is there already: --resume goes on" in again.stderr
    out = ["--output-dir", tmp_path / "other"]
    train_py(*TINY, "--eval-only", "--init-from", sixth, *out)
    assert metrics(tmp_path / "other")[-1] == {**last, "step": 0}
    other = train_py(*TINY, "--embed-dim", 16, "--init-from", sixth)
    assert other.returncode == 2 and "head.weight has shape (10, 32), in the model (10, 16)" in (
        other.stderr
    )
    other = train_py("--output-dir", tmp_path / "run", "--resume")
    assert other.returncode == 2 and "blocks.2.input_layernorm.bias is missing" in other.stderr
    other = train_py(*flags, "--resume", "--micro-batch-size", 8)
    assert other.returncode == 2 and "has 32 images a step, this run 8" in other.stderr
    content = bytearray(sixth.read_bytes())
    content[len(content) // 2] ^= 1
    sixth.write_bytes(content)
    (tmp_path / "run" / "step-00000009.npz").write_bytes(content[:1000])
    run = train_py(*flags, "--resume")
    assert run.returncode == 0 and run.stderr.count("is damaged and skipped") == 2
    assert f"resuming from {third}" in run.stdout and metrics(tmp_path / "run")[-1] == last


def test_a_loss_that_is_not_finite_and_a_save_that_fails_are_told_in_one_sentence(tmp_path):
    flags = [*TINY, "--steps", 20, "--save-every", 1, "--eager", "--keep", 99]
    wild = ["--lr", 1e30, "--clip-grad", 0, "--warmup-steps", 0, "--output-dir", tmp_path / "wild"]
    run = train_py(*flags, *wild)
    assert run.returncode == 1
    step = int(re.fullmatch(r"train.py: .* step (\d+),.*\n", run.stderr)[1])
    assert all(int(path.stem[5:]) < step for path in (tmp_path / "wild").glob("step-*.npz"))
    command = [sys.executable, "train.py", *flags, "--resume", "--output-dir", tmp_path / "small"]
    train_py(*flags[:-2], "--steps", 2, "--output-dir", tmp_path / "small")
    kept = {path: path.read_bytes() for path in (tmp_path / "small").glob("step-*.npz")}
    small = f"ulimit -f 200; exec {' '.join(map(str, command))}"  # of 1,024 bytes a file
    run = subprocess.run(["bash", "-c", small], cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 1 and "step 20 could not be saved: [Errno 27]" in run.stderr
    assert kept and all(path.read_bytes() == content for path, content in kept.items())


def test_mixup_and_augmentation_are_the_same_on_any_mesh(folder, tmp_path):
    flags = ["--data", folder, *TINY, "--steps", 8, "--eager", "--mixup", 0.8, "--cutmix", 1.0]
    flags += ["--label-smoothing", 0.1, "--random-erasing", 0.5]
    flags += ["--rand-augment", "rand-m9-mstd0.5-inc1"]
    mesh = ["--data-parallel", 2, "--pipeline-parallel", 2, "--micro-batch-size", 16]
    one = train_py(*flags, "--output-dir", tmp_path / "1")
    four = train_py(*flags, *mesh, "--output-dir", tmp_path / "4")
    assert one.returncode == four.returncode == 0, one.stderr + four.stderr
    one, four = metrics(tmp_path / "1"), metrics(tmp_path / "4")
    assert len({line["loss"] for line in one[:8]}) == 8
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(one[:8], four[:8]))


if __name__ == "__main__":
    import train  # noqa: F401  first: it imports the engine

    globals()[sys.argv[1]](Path(sys.argv[2]))
