# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer on synthetic images or on folders of images, on any mesh.

python train.py                                                     # one process, synthetic
python train.py --data-parallel 2 --tensor-parallel 2 --pipeline-parallel 2   # 8 processes
python train.py --data DIR --model vit_small_patch16_224 --epochs 300 --output-dir runs/s16
python train.py --help
"""

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence, exit code 2."""
        self.exit(2, f"train.py: {message}\n")


def import_quietly():
    """Import the engine without its start-up lines about hardware that is not there."""
    chatter = "libibverbs not available|CUDA driver version is insufficient"
    with subprocess.Popen(["grep", "-Ev", chatter], stdin=subprocess.PIPE, stdout=2) as grep:
        stderr = os.dup(2)
        os.dup2(grep.stdin.fileno(), 2)
        try:
            from vit3d import flow

            flow.framework.session_context.GetDefaultSession().TryInit()
        except ImportError as error:
            Parser().error(error)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    # A launcher that dies, however it dies, takes its processes along: 1 is PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
import_quietly()

import numpy as np
import oneflow as flow
from flowvision import datasets, transforms
from flowvision.data import Mixup, create_transform
from flowvision.loss.cross_entropy import SoftTargetCrossEntropy
from oneflow import nn
from tqdm import tqdm

from vit3d import MODELS, B, S, VisionTransformer, dist, distribute
from vit3d import load_state_dict, load_timm_state_dict, require, whole

# flowvision's own create_transform passes what its Resize warns of.
warnings.filterwarnings("ignore", "Argument interpolation should be")

DEMO = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)

# 1. Arguments -----------------------------------------------------------------------------------


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a number in [low, high), or in (low, high) if `above`."""
    bounds = f"{'above' if above else 'at least'} {low}" + f" and below {high}" * (high < math.inf)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < high or (above and value == low):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} must be {what} {bounds}")
        return value

    return parse


def stage_list(text):
    try:
        return [int(stage) for stage in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be stages such as 0,0,1,1") from None


def parse_arguments(argv=None):
    count, rate, positive = number(int, 1), number(float, 0, 1), number(float, 0, above=True)
    zero_up, names = number(float, 0), ", ".join(MODELS)
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog="Sizes that are not given are those of --model; without --model, a small ViT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("mesh").add_argument
    add("--data-parallel", type=count, default=1, help="replicas, each with its share of a batch")
    add("--tensor-parallel", type=count, default=1, help="processes that share each layer")
    add("--pipeline-parallel", type=count, default=1, help="stages, each with some of the layers")
    add("--stage-ids", type=stage_list, help="stage of each block, such as 0,0,0,1", metavar="IDS")
    add("--shard-params", action="store_true", help="split weights over the replicas (ZeRO-3)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one, else cpu")
    add("--nnodes", type=count, default=1, help="machines; run the command once on each")
    add("--node-rank", type=number(int, 0), default=0, help="which of the machines this is")
    add("--master-addr", default="127.0.0.1", help="address of machine 0")
    add("--master-port", type=number(int, 1, 65536), help="free port there; default: chosen")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help=names)
    for name in ("img-size", "patch-size", "embed-dim", "depth", "num-heads", "num-classes"):
        add(f"--{name}", type=count, metavar="N")
    add("--mlp-ratio", type=positive, metavar="R", help="width of the MLP / embed-dim")
    add("--layer-norm-eps", type=positive, default=1e-5, help="LiBai's; timm's is 1e-6")
    for name in ("drop-rate", "attn-drop-rate", "drop-path-rate"):
        add(f"--{name}", type=rate, default=0.0, metavar="P")
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, metavar="DIR", help="DIR/train/CLASS/* and DIR/val/CLASS/*")
    add("--no-augment", action="store_true", help="only resize: no crops, no flips")
    add("--rand-augment", metavar="POLICY", help="such as rand-m9-mstd0.5-inc1")
    add("--random-erasing", type=rate, default=0.0, metavar="P", help="of an image")
    add("--mixup", type=zero_up, default=0.0, metavar="ALPHA", help="0: none")
    add("--cutmix", type=zero_up, default=0.0, metavar="ALPHA", help="0: none")
    add("--label-smoothing", type=rate, default=0.0, metavar="P")
    add("--workers", type=count, default=2, help="processes that decode, for each process")
    add = parser.add_argument_group("training").add_argument
    add("--micro-batch-size", type=count, default=32, help="images per replica and micro-batch")
    add("--accumulation-steps", type=count, default=1, help="micro-batches per optimizer step")
    add("--steps", type=count, help="optimizer steps; default: 200, or those of --epochs")
    add("--epochs", type=count, help="passes over the training images")
    add("--lr", type=positive, default=1e-3, help="highest learning rate")
    add("--warmup-steps", type=number(int, 0), help="default: a tenth of all steps")
    add("--weight-decay", type=zero_up, default=0.05, help="of weights; not of biases and norms")
    add("--clip-grad", type=zero_up, default=1.0, help="highest norm of all gradients; 0: none")
    add(
        "--activation-checkpoint",
        action="store_true",
        help="recompute blocks to save memory (CUDA)",
    )
    add("--amp", action="store_true", help="half precision (CUDA)")
    add("--eager", action="store_true", help="run without nn.Graph")
    add("--seed", type=number(int, 0, 2**31), default=0)
    add = parser.add_argument_group("output").add_argument
    add("--eval-every", type=count, help="steps between validations; there is one at the end")
    add("--eval-only", action="store_true", help="validate the weights of --init-from, --resume")
    add("--benchmark", action="store_true", help="time a step and inference instead of training")
    add("--output-dir", type=Path, help="where metrics.jsonl and checkpoints go")
    add("--save-every", type=count, help="steps between checkpoints; there is one at the end")
    add("--keep", type=count, default=2, help="checkpoints that stay, the newest")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --output-dir")
    add("--init-from", type=Path, metavar="PATH", help="start from the weights of a checkpoint")
    args = parser.parse_args(argv)

    args.world_size = args.data_parallel * args.tensor_parallel * args.pipeline_parallel
    gpu, weights = flow.cuda.is_available(), args.resume or args.init_from
    for wrong, message in (
        (
            args.world_size % args.nnodes,
            f"--nnodes {args.nnodes} must divide {args.world_size} processes",
        ),
        (args.node_rank >= args.nnodes, f"--node-rank {args.node_rank} must be below --nnodes"),
        (args.nnodes > 1 and not args.master_port, "--nnodes above 1 needs --master-port"),
        (args.model and args.model not in MODELS, f"--model {args.model!r} must be one of {names}"),
        (
            args.steps and args.epochs,
            f"--steps {args.steps} and --epochs {args.epochs}: give one of them",
        ),
        (args.device == "cuda" and not gpu, "--device cuda needs a GPU, and there is none here"),
        (args.amp and (not gpu or args.device == "cpu"), "--amp needs a GPU to run on"),
        (args.eager and args.amp, "--amp needs the graph: leave out --eager"),
        (args.eager and args.activation_checkpoint, "--activation-checkpoint needs the graph"),
        (args.resume and not args.output_dir, "--resume needs --output-dir"),
        (args.save_every and not args.output_dir, "--save-every needs --output-dir"),
        (args.resume and args.init_from, "--resume and --init-from: give one of them"),
        (args.eval_only and not weights, "--eval-only needs --init-from or --resume"),
    ):
        if wrong:
            parser.error(message)
    return args


# 2. Data ----------------------------------------------------------------------------------------


class SyntheticImages:
    """Class-dependent patterns under noise; an image is a function of seed, split and index."""

    def __init__(self, split, length, num_classes, img_size, seed):
        self.length, self.num_classes, self.img_size = length, num_classes, img_size
        self.seed, self.split = seed, split
        self.patterns = np.random.default_rng(seed).standard_normal((num_classes, 3, 4, 4))

    def __len__(self):
        return self.length

    def label(self, index):
        return index % self.num_classes

    def image(self, index, epoch):
        rng = np.random.default_rng([self.seed, self.split == "val", index])
        size, scale = self.img_size, math.ceil(self.img_size / 4)
        pattern = self.patterns[self.label(index)].repeat(scale, 1).repeat(scale, 2)
        pattern = pattern[:, :size, :size]
        return (0.5 * pattern + rng.standard_normal(pattern.shape)).astype(np.float32)


class UnreadableImage(ValueError):
    """A file of --data that is not an image."""


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class FolderImages:
    """Images in ImageNet's layout, augmented by a function of the seed, the epoch and the index."""

    def __init__(self, split, args, img_size):
        root = args.data / split
        require(root.is_dir(), f"--data {args.data} must hold a folder {split}, and {root} is none")
        try:
            self.folder = datasets.ImageFolder(str(root))
        except FileNotFoundError as error:  # no class folder, or a class without images
            raise ValueError(f"{root}: {str(error).split('Supported')[0].strip()}") from None
        self.seed = args.seed
        if args.no_augment:
            resize = transforms.Resize((img_size, img_size))
            normalize = create_transform(img_size).transforms[-2:]
            self.transform = transforms.Compose([resize, *normalize])
        else:
            policy = args.rand_augment
            try:
                self.transform = create_transform(
                    img_size,
                    is_training=split == "train",
                    color_jitter=None,
                    auto_augment=policy,
                    re_prob=args.random_erasing,
                    re_mode="pixel",
                )
            except AssertionError:
                raise ValueError(
                    f"--rand-augment {policy!r} must be a policy such as rand-m9-mstd0.5-inc1"
                ) from None

    def __len__(self):
        return len(self.folder)

    def label(self, index):
        return self.folder.targets[index]

    def image(self, index, epoch):
        path = self.folder.samples[index][0]
        seed = seed_of(self.seed, epoch, index)  # flowvision's transforms draw from all of these:
        for draw in (random.seed, np.random.seed, flow.manual_seed):
            draw(seed)
        try:
            return self.transform(self.folder.loader(path)).numpy()
        except Exception as error:
            raise UnreadableImage(f"{path} cannot be read as an image: {error}") from None


def data_sets(args):
    """The training and the validation images; sets `args.num_classes` if it was not given."""
    if not args.data:
        args.num_classes, args.workers = args.num_classes or 10, 0  # no readers: drawing is quick
        sizes = args.num_classes, args.img_size, args.seed
        return SyntheticImages("train", 4096, *sizes), SyntheticImages("val", 1000, *sizes)
    train, val = (FolderImages(split, args, args.img_size) for split in ("train", "val"))
    odd = sorted(set(train.folder.classes) ^ set(val.folder.classes))
    require(not odd, f"{args.data}: train and val must hold the same classes, not {odd}")
    folders = len(train.folder.classes)
    args.num_classes = classes = args.num_classes or folders
    require(classes >= folders, f"--num-classes {classes} is below the {folders} folders")
    return train, val


class Samples(flow.utils.data.Dataset):
    """What this process needs of a sample: only the first stage reads images."""

    def __init__(self, images, img_size):
        self.images, self.blank = images, np.zeros((3, img_size, img_size), np.float32)
        self.reads = dist.rank in dist.get_layer_placement(0).ranks

    def __getitem__(self, key):
        epoch, index = key
        image = self.images.image(index, epoch) if self.reads else self.blank
        return image, self.images.label(index), key


def load(images, batches, args, mixup=None):
    """Iterate over numpy batches (images (b, 3, H, W), labels (b,)) of lists of (epoch, index).

    With mixup, labels are (b, classes). It mixes pairs of neighbours, so that all processes of a
    replica, and replicas of other sizes, see the same mix.
    """

    def collate(samples):
        images, labels, keys = zip(*samples)
        images, labels = np.stack(images), np.array(labels)
        if mixup is None:
            return images, labels
        pairs = []
        for i in range(0, len(keys), 2):
            np.random.seed(seed_of(args.seed, *keys[i], 1))
            pair = flow.tensor(images[i : i + 2]), flow.tensor(labels[i : i + 2])
            pairs.append([mixed.numpy() for mixed in mixup(*pair)])
        return [np.concatenate(parts) for parts in zip(*pairs)]

    samples = Samples(images, args.img_size)
    return flow.utils.data.DataLoader(
        samples, batch_sampler=batches, num_workers=args.workers, collate_fn=collate
    )


def training_batches(length, batch_size, seed, first_step, last_step):
    """This replica's share of each step's global batch, shuffled by epoch."""
    share, replica = batch_size // dist.data_parallel_size, dist.get_data_parallel_rank()
    steps_per_epoch = length // batch_size
    for step in range(first_step, last_step):
        epoch, position = divmod(step, steps_per_epoch)
        if step == first_step or position == 0:
            order = np.random.default_rng([seed, epoch]).permutation(length)
        start = position * batch_size + replica * share
        yield [(epoch, int(i)) for i in order[start : start + share]]


def to_global(array, layer_idx):
    """A replica's numpy array -> the global tensor [S(0), B] on the placement of a layer."""
    return flow.tensor(array).to_global(
        placement=dist.get_layer_placement(layer_idx), sbp=dist.get_nd_sbp([S(0), B])
    )


# 3. The step ------------------------------------------------------------------------------------


class AdamW(flow.optim.AdamW):
    """AdamW on two parameter groups, with and without weight decay.

    A graph clips each group by the norm of its own gradients. Clipping by the global norm takes
    one group, from whose decay the engine excludes variables by name.
    """

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        decay, no_decay = super()._generate_conf_for_graph(train_conf, vars_conf)
        decay.variable_op_names.extend(no_decay.variable_op_names)
        decay.weight_decay_conf.excludes.pattern.extend(
            f"^{name}$" for name in no_decay.variable_op_names
        )
        del train_conf.optimizer_conf[-1]
        return [decay]


def build_optimizer(model, args):
    """AdamW without decay on biases, norms, cls_token and pos_embed; warm-up, then cosine."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name not in model.no_weight_decay()].append(parameter)
    clip = (
        dict(clip_grad_max_norm=args.clip_grad, clip_grad_norm_type=2.0) if args.clip_grad else {}
    )
    optimizer = AdamW(
        [
            dict(params=groups[True], weight_decay=args.weight_decay, **clip),
            dict(params=groups[False], weight_decay=0.0, **clip),
        ],
        lr=args.lr,
    )
    warmup = args.warmup_steps
    scheduler = flow.optim.lr_scheduler.CosineDecayLR(optimizer, args.steps - warmup)
    if warmup:
        scheduler = flow.optim.lr_scheduler.WarmUpLR(
            scheduler, warmup_factor=1 / warmup, warmup_iters=warmup, warmup_prefix=True
        )
    return optimizer, scheduler


class TrainGraph(nn.Graph):
    """Forward, backward and update of one step, compiled into one static graph.

    With gradient accumulation the engine cuts its inputs into micro-batches; with stage ids it
    runs these through the pipeline as 1F1B does.
    """

    def __init__(self, model, optimizer, scheduler, args):
        super().__init__()
        self.model = model
        self.add_optimizer(optimizer, lr_sch=scheduler)
        self.config.set_gradient_accumulation_steps(args.accumulation_steps)
        if args.amp:  # not run: no GPU was at hand
            self.config.enable_amp(True)
            self.set_grad_scaler(flow.amp.GradScaler())
        if args.activation_checkpoint:
            for block in self.model.blocks:
                block.to(nn.graph.GraphModule).activation_checkpointing = True
        VisionTransformer.set_pipeline_stage_id(self.model)

    def build(self, images, labels):
        losses = self.model(images, labels)["losses"]
        losses.backward()
        return losses


class Trainer:
    """Model, optimizer and schedule; `step` trains on one batch, through a graph or eagerly."""

    def __init__(self, model, args):
        self.model, self.args = model.train(), args
        self.optimizer, self.scheduler = build_optimizer(model, args)
        if not args.eager:
            self.graph = TrainGraph(model, self.optimizer, self.scheduler, args)

    def step(self, images, labels):
        """A replica's batch as numpy -> (mean loss, learning rate)."""
        lr = self.optimizer.param_groups[0]["lr"]
        if self.args.eager:
            losses = self.eager_step(images, labels)
        else:
            losses = self.graph(to_global(images, 0), to_global(labels, -1))
        self.scheduler.step()  # a graph keeps its own count of steps: here it is for `lr`
        return float(whole(losses).mean()), lr

    def tensors(self):
        """The weights by name, and Adam's moments of each as `adam/m/NAME` and `adam/v/NAME`."""
        tensors = dict(self.model.named_parameters())
        state = self.optimizer._state if self.args.eager else self.graph.state_dict()
        for name, weight in list(tensors.items()):
            for m, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                moment = state[weight][key] if self.args.eager else state[f"model.{name}-{m}"]
                tensors[f"adam/{m}/{name}"] = moment
        return tensors

    def load(self, arrays, step):
        """Go on from the whole arrays of `tensors` after this many steps."""
        load_state_dict(self.model, arrays)
        state = {"model": self.model.state_dict()}
        for name, weight in self.model.named_parameters():
            m, v = (flow.tensor(arrays[f"adam/{m}/{name}"]) for m in "mv")
            m, v = (distribute(moment, weight.placement, weight.sbp) for moment in (m, v))
            state[f"model.{name}-m"], state[f"model.{name}-v"] = m, v
            self.optimizer._state[weight].update(exp_avg=m, exp_avg_sq=v)
        self.optimizer._state["step"] = step
        if not self.args.eager:
            first = dict(placement=dist.get_layer_placement(0), sbp=dist.get_nd_sbp([B, B]))
            state["System-Train-TrainStep"] = flow.tensor([step]).to_global(**first)
            self.graph.load_state_dict(state)
        for _ in range(step):
            self.scheduler.step()

    def eager_step(self, images, labels):
        n, total = self.args.accumulation_steps, 0
        for image, label in zip(np.split(images, n), np.split(labels, n)):
            losses = self.model(to_global(image, 0), to_global(label, -1))["losses"] / n
            losses.backward()
            total = total + losses.detach()
        if self.args.clip_grad:
            nn.utils.clip_grad_norm_(list(self.model.parameters()), self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def evaluate(model, images, args):
    """Validation loss, top-1 and top-5 accuracy, each image counted once."""
    replicas, size = dist.data_parallel_size, args.micro_batch_size
    mine = list(range(dist.get_data_parallel_rank(), len(images), replicas))
    batches = math.ceil(len(images) / (replicas * size))
    padded = (mine + [0] * (batches * size))[: batches * size]  # replicas need equal batches
    keys = [[(0, i) for i in padded[b * size : (b + 1) * size]] for b in range(batches)]
    sums = np.zeros(4)  # loss, top-1, top-5, images
    model.eval()
    with flow.no_grad():
        for b, (image, label) in enumerate(load(images, keys, args)):
            logits = model(to_global(image, 0))["prediction_scores"].to_local().numpy()
            if logits.size:  # on the last stage
                real = min(size, len(mine) - b * size)
                logits, label = logits[: max(real, 0)].astype(np.float64), label[: max(real, 0)]
                logits -= logits.max(-1, keepdims=True, initial=-np.inf)
                true = np.take_along_axis(logits, label[:, None], 1)
                better = (~(logits <= true)).sum(1)  # NaN is better than none
                losses = np.log(np.exp(logits).sum(1)) - true[:, 0]
                sums += losses.sum(), (better < 1).sum(), (better < 5).sum(), len(label)
    model.train()
    # (1, 4) of each replica -> (replicas, 4) -> (4,)
    loss, top1, top5, seen = whole(to_global(sums[None], -1)).sum(0)
    return dict(val_loss=loss / seen, top1=top1 / seen, top5=top5 / seen, images=int(seen))


# 4. Checkpoints ---------------------------------------------------------------------------------


def save(trainer, step, args):
    """Write `step-N.npz`: whole arrays, which know no mesh, and `about`, what the run was.

    Complete or absent: it is written beside and then renamed.
    """
    arrays = {}
    for name, tensor in trainer.tensors().items():
        array = whole(tensor)
        if not np.isfinite(array).all():
            fail(f"{name} is not finite after step {step}, which is not saved", dist.rank == 0, 1)
        if dist.rank == 0:
            arrays[name] = array
    if dist.rank > 0:
        return
    arguments = {key: str(value) for key, value in vars(args).items()}
    about = dict(step=step, batch_size=args.batch_size, arguments=arguments)
    beside = args.output_dir / "unfinished.npz"
    try:
        np.savez(beside, **{"about/run": json.dumps(about)}, **arrays)
        beside.replace(args.output_dir / f"step-{step:08d}.npz")
        for old in sorted(args.output_dir.glob("step-*.npz"))[: -args.keep]:
            old.unlink()
    except OSError as error:
        beside.unlink(missing_ok=True)
        print(f"train.py: step {step} could not be saved: {error}", file=sys.stderr, flush=True)
        if step == args.steps:
            fail("the run has ended without a checkpoint of its last step", code=1)


def newest(args):
    """The newest complete checkpoint of --output-dir or None, the same on every rank."""
    step = flow.tensor(-1)
    if dist.rank == 0:
        for path in sorted(args.output_dir.glob("step-*.npz"), reverse=True):
            try:
                if zipfile.ZipFile(path).testzip():  # reads all of it and compares its checksums
                    raise zipfile.BadZipFile("its content is not what was written")
                step = flow.tensor(int(path.stem[5:]))
                break
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                print(f"train.py: {path} is damaged and skipped: {error}", file=sys.stderr)
    flow.comm.broadcast(step, 0)
    return None if step.item() < 0 else args.output_dir / f"step-{step.item():08d}.npz"


def load_file(model, path):
    """Start from the weights of a checkpoint or of another .npz file, timm's names included."""
    try:
        arrays = np.load(path)
        timm = "blocks.0.attn.qkv.weight" in arrays.files
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"--init-from {path} must be an .npz file: {error}") from None
    (load_timm_state_dict if timm else load_state_dict)(model, arrays)


def restore(trainer, args):
    """Go on from the newest checkpoint, if there is one; return its step."""
    try:
        if args.output_dir:
            args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output-dir {args.output_dir} cannot be made: {error}") from None
    path = newest(args) if args.output_dir else None
    require(args.resume or not path, f"{path} is there already: --resume goes on from it")
    none = f"--eval-only needs a checkpoint, and {args.output_dir} holds none"
    require(path or args.init_from or not args.eval_only, none)
    if args.resume and dist.rank == 0:
        print(f"resuming from {path}" if path else f"no checkpoint in {args.output_dir}: anew")
    if not path:
        return 0
    arrays = np.load(path)
    about = json.loads(str(arrays["about/run"]))
    require(
        about["batch_size"] == args.batch_size,
        f"{path} has {about['batch_size']} images a step, this run {args.batch_size}: change"
        " --micro-batch-size or --accumulation-steps",
    )
    trainer.load(arrays, about["step"])
    return about["step"]


# 5. The run -------------------------------------------------------------------------------------


def build(args):
    """Set the mesh up -> model, two data sets, mixup or None. ValueError: a user's mistake."""
    sizes = dict(MODELS[args.model] if args.model else DEMO)
    for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
        if getattr(args, name) is not None:
            sizes[name] = getattr(args, name)
    args.img_size = sizes.setdefault("img_size", 224)
    dist.setup(
        args.data_parallel,
        args.tensor_parallel,
        args.pipeline_parallel,
        pipeline_num_layers=sizes["depth"],
        custom_pipeline_stage_id=args.stage_ids,
        device_type=args.device,
        shard_params=args.shard_params,
    )
    train, val = data_sets(args)
    share, mixup = args.micro_batch_size * args.accumulation_steps, None
    args.batch_size = share * args.data_parallel
    per_epoch = len(train) // args.batch_size
    too_large = f"a batch of {args.batch_size} images is more than the {len(train)} there are"
    require(per_epoch, too_large)
    args.steps = args.steps or (args.epochs * per_epoch if args.epochs else 200)
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 10
    warmup = args.warmup_steps
    require(warmup < args.steps, f"--warmup-steps {warmup} must be below all {args.steps} steps")
    if args.mixup or args.cutmix or args.label_smoothing:
        odd = f"mixup and smoothing take pairs: --micro-batch-size {args.micro_batch_size} is odd"
        require(share % 2 == 0, odd)
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=float(args.mixup > 0 or args.cutmix > 0),
            label_smoothing=args.label_smoothing,
            num_classes=args.num_classes,
        )
    flow.manual_seed(args.seed)
    model = VisionTransformer(
        **sizes,
        drop_rate=args.drop_rate,
        attn_drop_rate=args.attn_drop_rate,
        drop_path_rate=args.drop_path_rate,
        num_classes=args.num_classes,
        loss_func=SoftTargetCrossEntropy() if mixup else None,
        layer_norm_eps=args.layer_norm_eps,
    )
    return model, train, val, mixup


def of_all_ranks(number):
    """A number of each process -> all of them as numpy, by rank."""
    numbers = flow.tensor([number]).to_global(placement=dist.get_world_placement(), sbp=S(0))
    return whole(numbers)


def describe(args, model):
    """Print the mesh, and what a process holds: 12 bytes for a weight and its two moments."""
    held = of_all_ranks(sum(w.to_local().numel() for w in model.parameters())) * 12 / 1e6
    if dist.rank == 0:
        print(
            f"{dist}\n{sum(w.numel() for w in model.parameters()):,} parameters; a process holds"
            f" {held.min():.1f} to {held.max():.1f} MB of weights and optimizer state\n"
            f"{args.batch_size} images a step, {args.steps} steps"
        )


def open_metrics(args, first_step):
    """metrics.jsonl without the lines past the checkpoint, of which a killed run can leave some."""
    path, lines = args.output_dir / "metrics.jsonl", []
    if first_step and path.exists():
        lines = [line for line in path.open() if line.endswith("}\n")]  # the last may be torn
    beside = path.with_suffix(".unfinished")
    beside.write_text("".join(line for line in lines if json.loads(line)["step"] <= first_step))
    beside.replace(path)
    return path.open("a", buffering=1)


def fit(args, trainer, first_step, train, val, mixup):
    """Train, validate, report and save; rank 0 prints and writes."""
    quiet = dist.rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=args.steps, initial=first_step, disable=quiet)
    metrics = open_metrics(args, first_step) if args.output_dir and dist.rank == 0 else None
    step, start = first_step, time.perf_counter()

    def report(show, **record):
        if metrics:
            print(json.dumps(record), file=metrics)
        if show and dist.rank == 0:
            text = [
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()
            ]
            if step > first_step:
                left = (time.perf_counter() - start) / (step - first_step) * (args.steps - step)
                text.append(f"{left:.0f} s left")
            bar.write("  ".join(text), file=sys.stdout)

    if args.eval_only:
        return report(True, step=step, **evaluate(trainer.model, val, args))
    flow.manual_seed(args.seed + first_step)  # of the masks: a graph draws their seeds when built
    batches = training_batches(len(train), args.batch_size, args.seed, first_step, args.steps)
    before = start
    for images, labels in load(train, batches, args, mixup):
        step += 1
        loss, lr = trainer.step(images, labels)
        if not math.isfinite(loss):
            fail(f"the loss is {loss} at step {step}, learning rate {lr:.3g}", dist.rank == 0, 1)
        speed = round(args.batch_size / (time.perf_counter() - before), 1)
        show = bar.disable and step % max(args.steps // 20, 1) == 0
        report(show, step=step, loss=loss, lr=lr, images_per_s=speed)
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", images_per_s=speed)
        bar.update()
        last = step == args.steps
        if last or (args.eval_every and step % args.eval_every == 0):
            report(True, step=step, **evaluate(trainer.model, val, args))
        if args.output_dir and (last or (args.save_every and step % args.save_every == 0)):
            save(trainer, step, args)
        before = time.perf_counter()
    bar.close()


def benchmark(args, trainer, train, val, mixup):
    """Print the median times of a training step and of inference, FLOP/s and the peak memory.

    The model's FLOPs are those of its matrix products, 2 a multiply-add, times 3 for training. The
    peak is that of the best of 10 matrix products of 1024 x 1024, times the processes.
    """

    def seconds(run, of=np.median):
        times = []
        for _ in range(12):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return float(of(times[2:]))

    square, model = flow.rand(1024, 1024, device=dist.device_type), trainer.model
    peak = dist.world_size * 2 * 1024**3 / seconds(lambda: flow.matmul(square, square).numpy(), min)
    batches = training_batches(len(train), args.batch_size, args.seed, 0, 1)
    images, labels = next(iter(load(train, batches, args, mixup)))
    start = time.perf_counter()
    trainer.step(images, labels)
    first = time.perf_counter() - start
    step = seconds(lambda: trainer.step(images, labels))
    model.eval()
    with flow.no_grad():
        inference = seconds(lambda: whole(model(to_global(images, 0))["prediction_scores"]))
    tokens, width = model.pos_embed.shape[1:]
    products = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2) * tokens
    products += 2 * tokens**2 * width * len(model.blocks)
    products += model.patch_embed.proj.weight.numel() * (tokens - 1) + model.head.weight.numel()
    memory = of_all_ranks(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1000
    if dist.rank == 0:
        print(f"first step, compilation included: {first:.1f} s; peak {peak / 1e9:.0f} GFLOP/s")
        for name, took, flops in (("step", step, 6), ("inference", inference, 2)):
            speed = flops * products * args.batch_size / took
            print(
                f"{name}: {1e3 * took:.0f} ms, {args.batch_size / took:.1f} images/s,"
                f" {speed / 1e9:.3g} GFLOP/s, {speed / peak:.0%} of the peak"
            )
        print(f"peak resident size of a process: {memory.min():.0f} to {memory.max():.0f} MB")


def launch(args):
    """Start this machine's share of the processes; return the exit code of the run."""
    from oneflow.distributed import launch

    if args.master_port is None:
        with socket.socket() as free:
            free.bind(("", 0))
            args.master_port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else the launcher says that it sets it
    sys.argv = [
        "launch",
        *("--nproc_per_node", str(args.world_size // args.nnodes)),
        *("--nnodes", str(args.nnodes), "--node_rank", str(args.node_rank)),
        *("--master_addr", args.master_addr, "--master_port", str(args.master_port)),
        *sys.argv,
    ]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its "Killing subprocess" lines
            launch.main()
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:  # else the process has told its user what was wrong
            name = signal.Signals(-error.returncode).name
            print(f"train.py: a process was ended by {name}, and with it the run", file=sys.stderr)
        return max(error.returncode, 1)
    return 0


def fail(message, tell=True, code=2):
    """One sentence and an exit code, at once: a clean exit would wait for the other processes."""
    if tell:
        print(f"train.py: {message}", file=sys.stderr, flush=True)
    if os.fork() == 0:  # the others abort on a closed connection: hold it until they are ended
        os.closerange(0, 3)
        time.sleep(3)
    os._exit(code)


def main():
    args = parse_arguments()
    if args.world_size > 1 and dist.world_size == 1:
        sys.exit(launch(args))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    try:
        model, *data = build(args)
        if args.init_from:
            load_file(model, args.init_from)
        trainer = Trainer(model, args)
        first_step = restore(trainer, args)
    except ValueError as error:  # all processes find the same mistake, one tells of it
        fail(error, tell=dist.rank == 0)
    except (OSError, zipfile.BadZipFile) as error:  # a file that not every machine sees, or damaged
        fail(error)
    try:
        describe(args, model)
        if args.benchmark:
            return benchmark(args, trainer, *data)
        fit(args, trainer, first_step, *data)
    except UnreadableImage as error:  # comes out of a reader with the reader's traceback before it
        tell = dist.rank % dist.tensor_parallel_size == 0  # all shards of a replica read the file
        fail(str(error).strip().splitlines()[-1].split("UnreadableImage: ")[-1], tell)
    except OSError as error:  # a full disk
        fail(error, code=1)
    except BaseException as error:
        if "DataLoader worker" in str(error):
            fail(f"a process that reads images has died: {error}", code=1)
        traceback.print_exc()
        fail(f"rank {dist.rank} stopped with {type(error).__name__}", code=1)


if __name__ == "__main__":
    main()
