# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer on synthetic images or on folders of images, on any mesh.

python train.py                                         # one process
python train.py --data-parallel 2 --pipeline-parallel 2 # four processes
python train.py --data DIR --model vit_small_patch16_224 --epochs 300 --output-dir out

Part 1 is the run: steps, images, figures. Part 2 is what days and a command need: folders of
images, a log, checkpoints, flags, processes. `run`, its end, trains classes of your own.
"""

import functools
import math
import time
from multiprocessing import get_context

import numpy as np

from vit3d import VisionTransformer, batch_to_global, clip_grad_norm, dist, flow, full_array, nn
from vit3d import require, require_equal_copies, set_pipeline_stage_id
from oneflow.optim import SGD, Adagrad, Adam, AdamW, RMSprop, lr_scheduler
from oneflow.utils.data import DataLoader, Dataset

# Part 1. A run ------------------------------------------------------------------------------------


def main(args, model_class, trainer_class, data_set_class, score):
    """One run; each rank runs all of it. `run`, at the end, says what the classes must have."""
    mesh = (args.data_parallel, args.tensor_parallel, args.pipeline_parallel)
    dist.setup(*mesh, args.depth, args.shard_params, args.sequence_parallel)
    # It adds to args what follows from the data: images, batch_size, steps, save_every, ...
    train_set, val_set, args = open_data_sets(data_set_class, args, score)
    flow.manual_seed(args.seed)  # all ranks draw the same weights
    model = model_class(**model_options(args))
    trainer = trainer_class(model, args, args.steps)
    start = load(trainer, args)  # weights and optimizer from a file; the steps it has made, or 0
    log = Log(model, args, start)  # prints, and writes metrics.jsonl
    flow.manual_seed(args.seed + start)  # the masks of dropout
    keys = training_keys(args, start)
    batches = load_batches(train_set, keys, args, is_training=True)
    step = start
    while True:
        is_last = step == args.steps
        saves = args.output_dir and step > start and (is_last or step % args.save_every == 0)
        validates = is_last or (step > 0 and args.eval_every and step % args.eval_every == 0)
        if step == start + 1 or saves or validates:
            require_equal_copies(model)  # of a weight, on the ranks that hold it
        if saves:
            save_checkpoint(trainer, step)
        if validates:
            log.add(dict(step=step, **evaluate(model, val_set, args, score)))
        if is_last:
            return
        clock = time.perf_counter()  # saving and validating do not count for images_per_s
        loss, lr = trainer.step(*next(batches))
        step += 1
        log.add_step(step, loss, lr, time.perf_counter() - clock, trainer)


class Trainer:
    """Model, AdamW, warm-up and then cosine. Biases, norms, tokens and positions do not decay.

    A trainer of your own can set another `optimizer` and `scheduler` after `super().__init__`. LAMB
    never moves a split weight in eager mode. A graph takes no LambdaLR.
    """

    grad_norm = None  # the norm before clipping, in eager mode; a graph does not tell it

    def __init__(self, model, args, steps):
        self.model = model.train()
        self.args = args
        self.weights = dict(model.named_parameters())
        self.no_gradient = []  # names of weights that require a gradient and get none
        vectors = {name for name, p in self.weights.items() if p.ndim <= 1}
        self.no_decay = vectors | set(model.no_weight_decay())
        # Only clipping makes a graph's update wait for all gradients. 1e9 clips nothing.
        group = dict(clip_grad_max_norm=args.clip_grad or 1e9, clip_grad_norm_type=2.0)
        # One group, as a graph clips each group by its own norm. So TrainGraph excludes the names
        # without decay, and in eager mode `eager_step` decays the others, the optimizer none.
        group["weight_decay"] = 0 if args.eager else args.weight_decay
        self.adamw = AdamW([dict(params=self.weights.values(), **group)], lr=args.lr)
        self.optimizer = self.adamw
        warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps
        fits = warmup < steps or steps == 0  # 0: it only validates
        require(fits, f"--warmup-steps {warmup} must be below {steps} steps")
        self.scheduler = lr_scheduler.CosineDecayLR(self.optimizer, max(steps - warmup, 1))
        if warmup:
            options = dict(warmup_factor=1 / warmup, warmup_iters=warmup, warmup_prefix=True)
            self.scheduler = lr_scheduler.WarmUpLR(self.scheduler, **options)

    @functools.cached_property
    def graph(self):
        """The step as a graph; None in eager mode. It is made at its first use."""
        return None if self.args.eager else TrainGraph(self, self.args)

    def step(self, *batch):
        """Train on a replica's arrays, images first -> mean loss of all replicas' images, rate."""
        lr = self.optimizer.param_groups[0]["lr"]
        losses = self.graph(*self.to_mesh(*batch)) if self.graph else self.eager_step(*batch)
        self.scheduler.step()  # sets `lr` for eager mode; a graph computes its own from the step
        return float(full_array(losses).mean()), lr

    def to_mesh(self, images, *targets):
        """Images to the first stage, the others, such as labels, to the last."""
        return batch_to_global(images, 0), *(batch_to_global(array, -1) for array in targets)

    def eager_step(self, *batch):
        n = self.args.accumulation_steps
        total = 0
        for micro_batch in zip(*(np.split(array, n) for array in batch)):
            losses = self.model(*self.to_mesh(*micro_batch))["losses"] / n
            losses.backward()
            total = total + losses.detach()
        named = self.weights.items()
        self.no_gradient = [name for name, p in named if p.requires_grad and p.grad is None]
        self.grad_norm = clip_grad_norm(self.weights.values(), self.args.clip_grad or 1e9)
        if self.optimizer is self.adamw:
            kept = 1 - self.adamw.param_groups[0]["lr"] * self.args.weight_decay
            for name, p in named:
                if p.grad is not None and name not in self.no_decay:
                    p.data.mul_(kept)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


class TrainGraph(nn.Graph):
    """Forward, backward and update of one step, in micro-batches, as one static graph."""

    def __init__(self, trainer, args):
        super().__init__()
        # A subclass of SGD would train as SGD. Two groups would be clipped by two norms.
        is_known = type(trainer.optimizer) in (SGD, Adagrad, Adam, AdamW, RMSprop)
        clips = ["clip_grad_max_norm" in group for group in trainer.optimizer.param_groups]
        kinds = "SGD, Adagrad, Adam, AdamW or RMSprop, with one group and its clip_grad_max_norm"
        require(is_known and clips == [True], f"a graph takes {kinds}; others need --eager")
        # No reference to the trainer: each rank would free that cycle at another time, and hang.
        self.model = trainer.model
        self.weights = trainer.weights
        self.no_gradient = trainer.no_gradient  # the list itself: `build` extends it
        self.no_decay = trainer.no_decay if trainer.optimizer is trainer.adamw else ()
        self.add_optimizer(trainer.optimizer, lr_sch=trainer.scheduler)
        self.config.set_gradient_accumulation_steps(args.accumulation_steps)
        self.config.allow_fuse_model_update_ops(True)  # one operator clips, decays and updates
        for block in self.model.blocks:
            block.to(nn.graph.GraphModule).activation_checkpointing = args.activation_checkpoint
        set_pipeline_stage_id(self.model)
        for parameter in self.weights.values():
            parameter.grad = None  # a graph would not train a weight that has an eager gradient

    def build(self, images, *targets):
        """Run once, to be compiled. Each call of the graph returns a loss for each micro-batch."""
        losses = self.model(images, *targets)["losses"]
        losses.backward()
        named = self.weights.items()
        self.no_gradient += [name for name, p in named if p.requires_grad and p.grad is None]
        return losses

    def _generate_config_proto(self):  # the engine calls it: the place to exclude names from decay
        super()._generate_config_proto()
        if self.no_decay:
            (group,) = self.config.proto.train_conf.optimizer_conf
            patterns = [f"^model.{name}$" for name in self.no_decay]
            group.weight_decay_conf.excludes.pattern.extend(patterns)


class SyntheticImages(Dataset):
    """Class-dependent patterns of 4 x 4 cells under noise, (3, img_size, img_size)."""

    def __init__(self, split, img_size, args):
        self.split = split
        self.img_size = img_size
        self.seed = args.seed
        num_classes = args.num_classes or 10
        self.classes = list(range(num_classes))
        self.targets = np.arange(4096 if split == "train" else 1000) % num_classes
        self.patterns = np.random.default_rng(args.seed).standard_normal((num_classes, 3, 4, 4))

    def __getitem__(self, key):
        """(epoch, index) -> the key, the image, its class."""
        _, index = key
        cells = np.arange(self.img_size) * 4 // self.img_size
        pattern = self.patterns[self.targets[index]]
        image = 0.5 * pattern[:, cells][:, :, cells]  # (3, 4, 4) -> (3, img_size, img_size)
        rng = np.random.default_rng([self.seed, self.split == "val", index])
        image = (image + rng.standard_normal(image.shape)).astype(np.float32)
        return key, image, self.targets[index]


def training_keys(args, start):
    """Yield a replica's keys of each step. Micro-batch i has the same images on every mesh."""
    replica, _, _ = dist.get_coordinates()
    for step in range(start, args.steps):
        epoch, position = divmod(step, args.images // args.batch_size)
        if step == start or position == 0:  # a run can start within an epoch
            order = np.random.default_rng([args.seed, epoch]).permutation(args.images)
        batch = order[position * args.batch_size :][: args.batch_size]
        # (batch,) -> (micro-batches, replicas, images) -> (micro-batches * images,)
        batch = batch.reshape(args.accumulation_steps, dist.data_parallel_size, -1)
        yield [(epoch, int(index)) for index in batch[:, replica].flatten()]


def load_batches(data_set, keys, args, is_training=False):
    """Iterate over numpy batches: images (b, 3, h, w), labels (b,) or, mixed, (b, classes)."""
    # A data set may seed flow for each image, as FolderImages does. In this process that would seed
    # the masks of dropout, too. So all but SyntheticImages are read in other processes.
    workers = 0 if isinstance(data_set, SyntheticImages) else args.workers
    mixup = new_mixup(args) if is_training else None
    loader = DataLoader(
        data_set, batch_sampler=keys, multiprocessing_context=get_context("fork"),
        num_workers=workers, worker_init_fn=start_reader,
        collate_fn=lambda samples: make_batch(samples, data_set, args, mixup),
    )
    return iter(loader)


def score_classes(logits, targets):
    """Name -> one number for each image, for `evaluate`. The first of equal logits is best."""
    logits = logits.astype(np.float64)
    loss = np.logaddexp.reduce(logits, 1) - logits[np.arange(len(targets)), targets]
    best = np.argsort(-logits, 1, kind="stable")[:, :5]
    hits = (best == targets[:, None]) & ~np.isnan(loss[:, None])  # NaN counts as wrong
    return dict(val_loss=loss, top1=hits[:, 0], top5=hits.any(1))


def evaluate(model, data_set, args, score):
    """The means of what `score` returns, over all images, each counted once."""
    targets = np.array(data_set.targets)
    replica, _, _ = dist.get_coordinates()
    length = len(targets)
    rows = math.ceil(length / (dist.data_parallel_size * args.micro_batch_size))
    # The last batch is filled up with images that are counted already.
    batches = np.resize(np.arange(length), (rows, dist.data_parallel_size, args.micro_batch_size))
    keys = [[(0, int(index)) for index in batch[replica]] for batch in batches]
    arrays = load_batches(data_set, keys, args)
    scores = []
    modes = [(module, module.training) for module in model.modules()]  # some may be in eval mode
    model.eval()
    with flow.no_grad():
        for batch in batches:
            images, _ = next(arrays)
            logits = full_array(model(batch_to_global(images, 0))["prediction_scores"])
            scores.append(score(logits, targets[batch.flatten()]))
    for module, mode in modes:
        module.training = mode
    means = {}
    for name in scores[0]:
        shapes = {np.shape(part[name]) for part in scores}
        fits = shapes == {(batches[0].size,)} and name not in ("step", "loss", "images")
        require(fits, f"score must give a number for each image, not {name} of shape {shapes}")
        values = np.concatenate([part[name] for part in scores])
        means[name] = float(values[:length].mean())  # without what filled the last batch
    return dict(means, images=length)


# Part 2. What runs of days and a command need -----------------------------------------------------

import argparse
import contextlib
import ctypes
import fcntl
import glob
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import warnings
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path
from subprocess import Popen

from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vit3d import B, MODELS, UsageError, distribute, draw_mesh, load_timm_state_dict, load_weights
from vit3d import require_alike, resize_pos_embed

# flowvision warns of an argument that it passes itself.
warnings.filterwarnings("ignore", "Argument interpolation")

# Data: an image and its changes depend on seed and key, and not on the mesh


class FolderImages(Dataset):
    """Images in ImageNet's layout, DIR/SPLIT/CLASS/*, augmented for training."""

    ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif")
    ENDINGS += (".avif", ".gif")

    def __init__(self, split, img_size, args):
        from flowvision.data import create_transform  # flowvision takes 0.3 s: where it is used

        self.root = str(args.data / split)
        self.seed = args.seed
        # Hidden folders are no classes. `glob` leaves out .name, this line @eaDir and __MACOSX.
        paths = glob.glob("*/**/*", root_dir=self.root, recursive=True)
        paths = [path for path in paths if not re.search("(^|/)(@|__MACOSX/)", path)]
        self.files = sorted(path for path in paths if path.lower().endswith(self.ENDINGS))
        folders = [path.partition("/")[0] for path in self.files]
        self.classes = sorted(set(folders))
        found = f"{len(folders)} images of the classes {self.classes}"
        require(len(self.classes) > 1, f"{self.root}/CLASS/*: {found}, and two classes are needed")
        numbers = {name: i for i, name in enumerate(self.classes)}
        self.targets = [numbers[name] for name in folders]
        is_training = split == "train" and not args.no_augment
        try:
            self.transform = create_transform(
                img_size, is_training=is_training, color_jitter=None, re_mode="pixel",
                auto_augment=args.rand_augment, re_prob=args.random_erasing, mean=args.mean,
                std=args.std, crop_pct=args.crop_pct, interpolation=args.interpolation,
            )
        except (ValueError, AssertionError) as error:  # an unknown policy
            raise UsageError(f"--rand-augment {args.rand_augment}: {error}") from None

    def __getitem__(self, key):
        """(epoch, index) -> the key, the image, its class."""
        path = os.path.join(self.root, self.files[key[1]])
        for set_seed in (random.seed, np.random.seed, flow.manual_seed):  # transforms draw from all
            set_seed(zlib.crc32(repr([self.seed, *key]).encode()))
        try:
            require(os.path.isfile(path), "it is no file")  # to read a pipe would never end
            with Image.open(path) as image:
                # `convert` makes 16 bits white (I, I;16) and floats black (F).
                require(image.mode[0] not in "IF", f"mode {image.mode} is not of 8 bits")
                return key, self.transform(image.convert("RGB")).numpy(), self.targets[key[1]]
        except Exception as error:  # decoders raise many kinds
            raise UsageError(f"{path} cannot be read as an image: {error}") from None


def open_data_sets(data_set_class, args, score):
    """-> the images to train and to validate, and `args` with all that follows from them"""
    if data_set_class is None:
        data_set_class = FolderImages if args.data else SyntheticImages
    val_set = data_set_class("val", args.img_size, args)
    train_set = val_set if args.steps == 0 else data_set_class("train", args.img_size, args)
    differing = sorted({*map(str, train_set.classes)} ^ {*map(str, val_set.classes)})
    names = ", ".join(differing) or "in another order"
    is_same = list(train_set.classes) == list(val_set.classes)
    require(is_same, f"train and val have other classes: {names:.300}")
    shapes = [look_at(data_set, score) for data_set in (train_set, val_set)]
    require(shapes[0] == shapes[1], f"images to train are {shapes[0]}, to validate {shapes[1]}")

    args = argparse.Namespace(**vars(args))
    args.own_score = score is not score_classes
    args.classes = list(map(str, val_set.classes))
    classes = len(args.classes)
    args.num_classes = args.num_classes or classes
    require(args.num_classes >= classes, f"--num-classes {args.num_classes} is below {classes}")
    args.batch_size = args.data_parallel * args.accumulation_steps * args.micro_batch_size
    args.val_images = len(val_set.targets)
    args.images = 0 if args.steps == 0 else len(train_set.targets)
    steps_an_epoch = args.images // args.batch_size
    is_enough = steps_an_epoch > 0 or args.steps == 0
    require(is_enough, f"a batch of {args.batch_size} is more than {args.images} images")
    if args.steps is None:
        args.steps = args.epochs * steps_an_epoch if args.epochs else 200
    args.save_every = args.save_every or max(steps_an_epoch, 100)

    values = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    values["device"] = dist.device_type
    values["targets"] = [list(data_set.targets) for data_set in (train_set, val_set)]
    values["files"] = [getattr(data_set, "files", None) for data_set in (train_set, val_set)]
    require_alike(values)
    return train_set, val_set, args


def look_at(data_set, score):
    """The shape of an image. Raises UsageError for images or targets that do not fit.

    The engine's loss leaves out a target that is no class. With a score of your own targets may be
    anything.
    """
    kind = type(data_set).__name__
    targets = np.array(data_set.targets)
    require(len(targets) > 0, f"{kind}: no images")
    _, image, target = data_set[0, 0]
    found = f"{kind}: an image is {image.dtype} of shape {image.shape}"
    is_image = image.dtype == np.float32 and image.ndim == 3
    require(is_image, f"{found} and must be float32, (channels, height, width)")
    if score is score_classes:
        last = len(data_set.classes) - 1
        found = f"{kind}: targets are {targets.dtype} of shape {targets.shape}"
        is_class = targets.ndim == 1 and targets.dtype.kind in "iu"
        require(is_class, f"{found} and must be classes, one for each image")
        others = targets[(targets < 0) | (targets > last)].tolist()
        require(not others, f"target {others[:1]} is not one of the classes 0 to {last}")
        same = np.array_equal(target, targets[0])
        require(same, f"{kind}: image 0 has the target {target}, and in `targets` {targets[0]}")
    return image.shape


def new_mixup(args):
    """What mixes pairs of images and makes their labels soft; None if nothing is asked for."""
    if args.steps == 0 or not (args.mixup or args.cutmix or args.label_smoothing):
        return None
    from flowvision.data import Mixup

    is_even = args.micro_batch_size % 2 == 0
    require(is_even, "--mixup, --cutmix, --label-smoothing: --micro-batch-size must be even")
    prob = float(args.mixup > 0 or args.cutmix > 0)  # smoothing alone mixes nothing
    smoothing = dict(label_smoothing=args.label_smoothing, num_classes=args.num_classes)
    return Mixup(args.mixup, args.cutmix, prob=prob, **smoothing)


def start_reader(_):
    """Leave Ctrl-C to the run, which may ignore it, and end with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As in `launch`. At SIGTERM the engine's handler frees the reader's shared memory.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def make_batch(samples, data_set, args, mixup):
    """[(key, image, target)] -> images (b, 3, h, w), labels (b,) or, mixed, (b, classes)."""
    keys, images, labels = zip(*samples)
    for key, image in zip(keys, images):
        same = image.shape == images[0].shape
        require(same, f"image {key} is {image.shape}, and another one {images[0].shape}")
    images = np.stack(images)
    labels = np.array(labels)
    if not args.own_score:  # `look_at` has seen that all of `targets` are classes
        same = np.array_equal(labels, [data_set.targets[index] for _, index in keys])
        require(same, f"images {keys} have the targets {labels}, others than in `targets`"[:500])
        labels = labels.astype(np.int64)  # the engine's loss takes no uint8
    if mixup is None:
        return images, labels
    # Neighbours are mixed in pairs, each pair by a draw of its own: the mesh does not matter.
    pairs = []
    for i in range(0, len(samples), 2):
        np.random.seed(zlib.crc32(repr([args.seed, *keys[i], "mix"]).encode()))
        pairs.append(mixup(flow.tensor(images[i : i + 2]), flow.tensor(labels[i : i + 2])))
    return [np.concatenate([t.numpy() for t in part]) for part in zip(*pairs)]


# What a run tells


def say(text):
    """Print on rank 0, at once. A reader that has gone, such as `head`, does not end a run."""
    try:
        if dist.rank == 0:
            print(text, flush=True)
    except OSError:
        sys.stdout = None


class Log:
    """What a run tells: text, and one record a line in metrics.jsonl. Rank 0 alone writes."""

    def __init__(self, model, args, start):
        """Print what is trained. Cut from metrics.jsonl what came after the step `start`."""
        self.args = args
        self.start = start
        self.file = None
        if args.output_dir and dist.rank == 0:
            self.open()
            if args.steps:
                is_new = args.resume or os.fstat(self.file.fileno()).st_size == 0
                require(is_new, f"{self.file.name} exists: --resume, or take another --output-dir")
                self.cut()
        elements = sum(parameter.numel() for parameter in model.parameters())
        say(draw_mesh(dist))
        say(f"{elements:,} parameters, {args.batch_size} images a step, {args.steps} steps")
        images = f"images: {args.images} to train, {args.val_images} to validate"
        say(f"{images}; {args.num_classes} classes")
        if args.data and args.steps and not args.output_dir:
            say("nothing is saved, since there is no --output-dir")
        if start < args.steps and not args.eager:
            say("compiling the graph: seconds on one process, half a minute on eight")

    def open(self):
        """Open metrics.jsonl and lock it. Raises UsageError if another run has the lock."""
        folder = self.args.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        # A process that closes any handle of the file loses the lock, so there is just this one.
        self.file = open(folder / "metrics.jsonl", "a+b")
        try:
            # Not `flock`: readers of images inherit it and can live longer than the run.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run writes to --output-dir {folder}") from None
        except OSError as error:
            say(f"{folder} knows no locks, so nothing keeps a second run away: {error}")

    def cut(self):
        self.file.seek(0)
        kept = 0
        for line in self.file:
            record = re.match(rb'{"step": (\d+), ("loss")?', line)
            # (step, is it a validation?) The validation of the step `start` is made again.
            is_later = record and (int(record[1]), not record[2]) > (self.start, False)
            if is_later or not line.endswith(b"\n"):
                break
            kept += len(line)
        self.file.truncate(kept)

    def add_step(self, step, loss, lr, seconds, trainer):
        """Record a step. Raises UsageError for a loss that is not finite."""
        require(math.isfinite(loss), f"loss {loss} at step {step}: lower --lr")
        record = dict(step=step, loss=loss, lr=lr)
        if trainer.grad_norm is not None:
            record["grad_norm"] = trainer.grad_norm
        record["images_per_s"] = round(self.args.batch_size / seconds, 1)
        steps = self.args.steps
        interval = min(max(steps // 20, 1), 100)  # about 20 lines, but each 100 steps at least
        later_steps = step - self.start - 1  # those after the first one, which compiles
        if later_steps:
            left = (time.perf_counter() - self.clock) / later_steps * (steps - step)
            end = f"  left {timedelta(seconds=int(left))}"
            self.add(record, end, step % interval == 0)
            return
        self.clock = time.perf_counter()
        if trainer.no_gradient:
            say(f"no gradient: {', '.join(trainer.no_gradient):.500}")
        self.add(record)

    def add(self, record, end="", is_printed=True):
        """Write a record and, if it is to be printed, its numbers as text."""
        if self.args.images:
            steps_an_epoch = self.args.images // self.args.batch_size
            record["epoch"] = round(record["step"] / steps_an_epoch, 2)
        if self.file:
            name = Path(self.file.name)
            if not name.exists() or not os.path.samestat(name.stat(), os.fstat(self.file.fileno())):
                self.open()  # someone has moved or replaced the file
            text = json.dumps(record, default=lambda number: number.item())  # numpy's numbers
            self.file.write(f"{text}\n".encode())
            self.file.flush()
        if is_printed:
            text = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
            say("  ".join(f"{k} {v}" for k, v in text.items()) + end)


# Checkpoints

SIZES = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes"]
SIZES += ["layer_norm_eps"]


def model_options(args):
    """The arguments of a model class."""
    rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")
    return {name: getattr(args, name) for name in (*SIZES, *rates)}


def get_record(trainer, step):
    """What a checkpoint knows of its run, as JSON has it: arguments, step, optimizer."""
    record = dict(vars(trainer.args), step=step, optimizer=type(trainer.optimizer).__name__)
    return json.loads(json.dumps(record, default=str))  # str: a Path becomes text


def get_optimizer_state(trainer):
    """Adam's states of each weight, {"optimizer/model.head.bias-m": tensor}, and counters."""
    state = {}
    if trainer.graph:
        # sorted: the engine's order can differ from rank to rank
        for name, tensor in sorted(trainer.graph.state_dict().items()):
            if name != "model":  # the weights
                state[f"optimizer/{name}"] = tensor
        return state
    for name, weight in trainer.weights.items():
        for kind, tensor in trainer.optimizer._state.get(weight, {}).items():
            state[f"optimizer/model.{name}-{kind}"] = tensor  # as a graph names it
    return state


def set_optimizer_state(trainer, arrays, step):
    """The inverse, from a checkpoint's arrays. The schedule goes to this step, too."""
    state = {}
    for key in sorted(name for name in arrays.keys() if name.startswith("optimizer/")):
        name, _, kind = key.removeprefix("optimizer/model.").rpartition("-")
        weight = trainer.weights.get(name)
        if weight is None:  # a graph's counter of steps
            placement = dist.get_layer_placement(0)
            sbp = dist.get_nd_sbp([B, B])
        else:
            placement = weight.placement
            sbp = weight.sbp
        tensor = distribute(flow.tensor(arrays[key]), placement, sbp)
        state[key.removeprefix("optimizer/")] = tensor
        if not trainer.graph:
            trainer.optimizer._state[weight][kind] = tensor
    if trainer.graph:
        trainer.graph.load_state_dict(state)
    trainer.optimizer._state["step"] = step  # for Adam's bias correction in eager mode
    if isinstance(trainer.scheduler, lr_scheduler.ReduceLROnPlateau):
        say("ReduceLROnPlateau begins anew, since it goes by losses that are gone")
        return
    while trainer.scheduler.last_step < step:
        trainer.scheduler.step()


def save_checkpoint(trainer, step):
    """Write checkpoint.npz, one array at a time. It is whole, or the one before stays."""
    unfinished = trainer.args.output_dir / "unfinished.npz"
    writes = dist.rank == 0
    with zipfile.ZipFile(unfinished, "w") if writes else contextlib.nullcontext() as archive:

        def write(name, array):
            if writes:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array)

        for name, tensor in {**trainer.weights, **get_optimizer_state(trainer)}.items():
            array = full_array(tensor)  # on all ranks
            require(np.isfinite(array).all(), f"{name} is not finite and is not saved")
            write(name, array)
        write("run/record", np.array(json.dumps(get_record(trainer, step))))
    if writes:
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave an empty checkpoint.npz
        unfinished.replace(unfinished.with_name("checkpoint.npz"))


def load(trainer, args):
    """Load the run's own checkpoint or, where there is none, --init-from. -> the steps made

    An .npz is read array by array. Raises UsageError for a file that is damaged or does not fit.
    """
    path = args.init_from
    checkpoint = args.output_dir and args.output_dir / "checkpoint.npz"
    resumes = bool(checkpoint) and checkpoint.exists()
    if resumes:
        path = checkpoint
        cure = "--resume goes on from it, or take another --output-dir"
        require(args.resume, f"{path} exists: {cure}")
    try:
        readers = {".npz": np.load, ".safetensors": load_file}
        arrays = readers[path.suffix](path) if path else {}
        has_record = "run/record" in arrays.keys()
        record = json.loads(str(arrays["run/record"])) if has_record else {}
        require_alike({"the step of the checkpoint": record.get("step")})
        if not path:
            require(args.steps, "--steps 0 validates weights: give --init-from")
            return 0
        fixed = ["num_heads", "layer_norm_eps"]  # the weights' shapes do not show these
        if resumes:
            fixed = [*SIZES, "batch_size", "steps", "eager", "classes", "optimizer"]
        for name, now in get_record(trainer, record.get("step")).items():
            before = record.get(name, now)
            if before != now and name != "resume":
                verb = "must not be" if name in fixed else "is"
                text = f"{path}: {name} was {before!s:.200} and {verb} {now!s:.200}"
                require(name not in fixed, text)
                if resumes:
                    say(text)
        if resumes:
            load_weights(trainer.model, arrays)
            set_optimizer_state(trainer, arrays, record["step"])
            return record["step"]
        arrays = {name: arrays[name] for name in arrays.keys() if "/" not in name}
        load_initial_weights(trainer.model, arrays, record, path, args)
        return 0
    except UsageError:
        raise
    except (OSError, EOFError, LookupError, ValueError, AttributeError, TypeError, zlib.error,
            zipfile.BadZipFile, SafetensorError) as error:  # TypeError: bfloat16
        raise UsageError(f"{path} must be a whole .npz or .safetensors file: {error}") from None


def load_initial_weights(model, arrays, record, path, args):
    """Load weights under our names or timm's. A head for other classes is left out, and told."""
    may_be_missing = getattr(model, "may_be_missing", ())  # parts of names that your model adds
    has_head = "head.weight" in dict(model.named_parameters())
    rows = len(arrays.get("head.weight", ())) if has_head else args.num_classes
    if rows != args.num_classes or record.get("classes", args.classes) != args.classes:
        text = f"{path}: its head is for other classes and is not loaded"
        require(args.steps, f"{text}, so there is nothing to validate")
        say(text)
        arrays = {name: arrays[name] for name in arrays if not name.startswith("head.")}
        may_be_missing = (*may_be_missing, "head.")
    if "blocks.0.attn.qkv.weight" in arrays:
        if args.layer_norm_eps == 1e-5:
            say(f"{path}: weights of timm want --layer-norm-eps 1e-6; README has the other flags")
        load_timm_state_dict(model, arrays, may_be_missing)
        return
    if "pos_embed" in arrays:
        arrays["pos_embed"] = resize_pos_embed(arrays["pos_embed"], model)
    load_weights(model, arrays, may_be_missing)


# The command


def number(kind, least, most=math.inf):
    """A type for `add_argument`: an int or a float in this range, and finite."""

    def parse(text):
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} must be finite, from {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it, as in 'invalid float value'
    return parse


def parse_arguments(argv=None):
    """The command line, with the sizes of the model. Raises UsageError for a mistake."""
    parser = argparse.ArgumentParser(description="Train. In brackets: what is taken by default.")
    parser.error = lambda message: require(False, message)  # raises UsageError
    count = number(int, 1)
    rate = number(float, 0)
    share = number(float, 0, 1)
    rgb = dict(nargs=3, metavar=("R", "G", "B"))
    path = dict(type=lambda text: Path(text).expanduser())  # in --flag=~/x the shell leaves the ~
    small = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)
    add = parser.add_argument_group("the mesh").add_argument
    add("--data-parallel", type=count, default=1, help="replicas, with a share of a batch each")
    add("--tensor-parallel", type=count, default=1, help="ranks that share each layer")
    add("--pipeline-parallel", type=count, default=1, help="stages, with some layers each")
    add("--shard-params", action="store_true", help="replicas share the weights (ZeRO-3)")
    add("--sequence-parallel", action="store_true", help="tensor ranks share the tokens")
    add = parser.add_argument_group("the model").add_argument
    add("--model", choices=MODELS, metavar="NAME", help="(a small one) " + ", ".join(MODELS))
    for name in ("--img-size", "--patch-size", "--embed-dim", "--depth", "--num-heads"):
        add(name, type=count, help="(that of the model)")
    add("--num-classes", type=count, help="outputs (as many as the data have classes)")
    add("--layer-norm-eps", type=rate, default=1e-5, help="(1e-5, of LiBai) timm's is 1e-6")
    add("--drop-rate", type=share, default=0.0, help="of activations (0)")
    add("--attn-drop-rate", type=share, default=0.0, help="of attention (0)")
    add("--drop-path-rate", type=share, default=0.0, help="of layers (0)")
    add = parser.add_argument_group("images in folders; the others need --data").add_argument
    add("--data", metavar="DIR", help="it has train/CLASS/*, val/CLASS/*", **path)
    add("--mean", type=share, default=[0.485, 0.456, 0.406], help="of colours, 0 to 1", **rgb)
    std = number(float, 1e-6, 1)
    add("--std", type=std, default=[0.229, 0.224, 0.225], help="(ImageNet's, as the mean)", **rgb)
    add("--crop-pct", type=number(float, 0.01, 1), default=0.875, help="of an image's side (0.875)")
    add("--interpolation", choices=("bilinear", "bicubic"), default="bilinear", help="(bilinear)")
    add("--no-augment", action="store_true", help="train on images as they are validated")
    add("--rand-augment", metavar="POLICY", help="such as rand-m9-mstd0.5-inc1; needs augmentation")
    add("--random-erasing", type=share, default=0.0, help="probability (0); needs augmentation")
    add("--workers", type=count, default=2, help="readers of each process (2)")
    add = parser.add_argument_group("a step").add_argument
    add("--micro-batch-size", type=count, default=32, help="images of a replica (32)")
    add("--accumulation-steps", type=count, default=1, help="micro-batches (1)")
    add("--label-smoothing", type=share, default=0.0, help="(0)")
    add("--mixup", type=rate, default=0.0, metavar="ALPHA", help="(0: none)")
    add("--cutmix", type=rate, default=0.0, metavar="ALPHA", help="(0: none)")
    add("--lr", type=rate, default=1e-3, help="highest learning rate (0.001)")
    add("--weight-decay", type=rate, default=0.05, help="of matrices (0.05)")
    add("--clip-grad", type=rate, default=1.0, help="highest norm (1); 0: none")
    add("--eager", action="store_true", help="no nn.Graph: starts at once, slower steps")
    add("--activation-checkpoint", action="store_true", help="recompute blocks; needs a graph")
    add = parser.add_argument_group("the run").add_argument
    add("--steps", type=number(int, 0), help="(200) 0: validate what --init-from loads")
    add("--epochs", type=count, help="passes over the training images, in place of --steps")
    add("--warmup-steps", type=number(int, 0), help="(a tenth of all steps)")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of weights, masks, images (0)")
    add("--eval-every", type=count, help="steps between validations (one at the end)")
    add("--init-from", metavar="FILE", help="ours or timm's, .npz or .safetensors", **path)
    add = parser.add_argument_group("files; the others need --output-dir").add_argument
    add("--output-dir", help="where metrics.jsonl and checkpoint.npz go", **path)
    add("--save-every", type=count, help="steps between checkpoints (an epoch, at least 100)")
    add("--resume", action="store_true", help="go on from a checkpoint there, if there is one")
    args = parser.parse_args(argv)
    require(args.steps is None or not args.epochs, "--steps and --epochs: give one of them")
    sizes = {"img_size": 224, "mlp_ratio": 4.0, **MODELS.get(args.model, small)}
    for name, size in sizes.items():
        if getattr(args, name, None) is None:  # mlp_ratio has no flag
            setattr(args, name, size)
    return args


def launch(processes, command):
    """Run a command as this many ranks; end all when one ends badly. -> exit code"""
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    # The engine would send even 127.0.0.1 through a proxy.
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(processes))
    environment.setdefault("OMP_NUM_THREADS", "1")  # one core for each rank
    # A third of compiling is malloc and free, and mimalloc's are faster.
    paths = [f"{folder}/cmeel.prefix/lib/libmimalloc.so" for folder in sys.path]
    # The loader splits a name at a space or a colon.
    mimalloc = [path for path in paths if os.path.exists(path) and not re.search("[ :]", path)]
    environment.setdefault("LD_PRELOAD", ":".join(mimalloc))
    libc = ctypes.CDLL(None)
    ranks = []
    for rank in map(str, range(processes)):
        environment.update(RANK=rank, LOCAL_RANK=rank)
        # 1 is PR_SET_PDEATHSIG, 9 SIGKILL: the kernel ends a rank when this process has ended.
        ranks.append(Popen(command, env=environment, preexec_fn=lambda: libc.prctl(1, 9)))
    codes = [None]  # of the ranks; None: it runs
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [process.poll() for process in ranks]
    for process in ranks:
        process.kill()
        process.wait()  # now the lock of metrics.jsonl is free
    code = next(filter(None, codes), 0)
    if code < 0:
        print(f"train.py: a process ended by {signal.Signals(-code).name}", file=sys.stderr)
    return code if code >= 0 else 128 - code  # as a shell has it


def wait_unheard(seconds):
    """Wait, and hide what the engine prints meanwhile: that a connection is broken."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    time.sleep(seconds)
    os.dup2(stderr, 2)


def end(error):
    """Tell a mistake in one sentence, and end this rank: code 2 for the user's mistakes, else 1."""
    code = 2 if isinstance(error, UsageError) else 1
    if dist.world_size > 1:
        wait_unheard(min(3 * dist.rank, 9))  # where all ranks have the error, rank 0 tells it
    if isinstance(error, (UsageError, OSError)):
        # A reader of images puts its traceback in front.
        print("train.py:", str(error).rpartition("UsageError: ")[2].strip(), file=sys.stderr)
    else:
        sys.__excepthook__(type(error), error, error.__traceback__)
    if dist.world_size > 1:
        wait_unheard(1)
        os._exit(code)  # the engine's own end would wait for the other ranks
    sys.exit(code)


def run(model=VisionTransformer, trainer=Trainer, data_set=None, score=score_classes):
    """Train as the command line says, with classes of your own. It starts the ranks, too.

    model: a class that takes the arguments of VisionTransformer. It has `blocks`, `loss_func` and
        `no_weight_decay()`. `forward` returns {"losses": scalar} in training when it is given
        labels, else {"prediction_scores": (b, num_classes)}. It may have `may_be_missing`, parts of
        the names of weights that --init-from need not have.
    trainer: a class that inherits from Trainer.
    data_set: a class, data_set(split, img_size, args) for the splits "train" and "val". It has
        `classes`, `targets` and `self[epoch, index]`, which is ((epoch, index), image, target). An
        image is float32, (channels, height, width), and depends on nothing but epoch, index, split
        and seed. None: FolderImages with --data, else SyntheticImages.
    score: a function as `score_classes` above. Give one where targets are not classes.
    """
    try:
        is_main_thread = threading.current_thread() is threading.main_thread()
        require(is_main_thread, "signals end a run, so call it in the main thread")
        # Ctrl-C ends a process at once: the engine's own handler is replaced. Where it is ignored,
        # as in `COMMAND &` of a script, it stays so.
        handler = signal.getsignal(signal.SIGINT)
        is_ignored = handler is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        args = parse_arguments()
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            tasks = os.environ.get(name, "1")
            is_told = tasks == "1" or os.environ["RANK"] != "-1"  # -1, set by vit3d's import: none
            cure = "this task was not told its rank: README has lines for srun and mpirun"
            require(is_told, f"{name} is {tasks}, and {cure}")
        processes = args.data_parallel * args.tensor_parallel * args.pipeline_parallel
        if processes > 1 and dist.world_size == 1:
            is_file = os.path.exists(getattr(sys.modules["__main__"], "__file__", ""))
            require(is_file, "several processes run one program: put yours into a file")
            sys.exit(launch(processes, [sys.executable, *sys.orig_argv[1:]]))
        main(args, model, trainer, data_set, score)
        signal.signal(signal.SIGINT, handler)
    except Exception as error:
        end(error)


if __name__ == "__main__":
    run()
