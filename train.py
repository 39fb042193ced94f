# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer on synthetic images or on folders of images, on any mesh.

python train.py                                         # one process
python train.py --data-parallel 2 --pipeline-parallel 2 # four processes
python train.py --data DIR --model vit_small_patch16_224 --epochs 300 --output-dir out

Part 1 is a run, from its steps in `main` to its figures. Part 2 is what runs of days and a command
need: folders of images, checkpoints, files, flags, processes. `run` there starts your own classes.
"""

import functools
import math
import time

import numpy as np

from vit3d import VisionTransformer, batch_to_global, clip_grad_norm, dist, flow, full_array, nn
from vit3d import require, require_equal_copies, set_pipeline_stage_id
from oneflow.optim import lr_scheduler
from oneflow.utils.data import DataLoader, Dataset

# Part 1. A run ------------------------------------------------------------------------------------


def main(args, model_class, trainer_class, data_set_class, score):
    """One run; each rank runs all of it. `run`, at the end, says what the classes must have."""
    # the mesh and the data
    mesh = (args.data_parallel, args.tensor_parallel, args.pipeline_parallel)
    dist.setup(*mesh, args.depth, args.shard_params, args.sequence_parallel)
    train_set, val_set = open_data_sets(data_set_class, args)  # sets args.images, args.steps, ...
    log = Log(args)
    path, arrays, record = read_start(args)  # --resume or --init-from: its file, weights, flags
    require_alike(args, (train_set, val_set), record)

    # the model, and what it goes on from
    flow.manual_seed(args.seed)  # all ranks draw the same weights
    mixup = new_mixup(args)
    model = model_class(**model_options(args))
    require_classes((train_set, val_set), model, score)
    log.describe(model, (train_set, val_set))
    if args.eval_only:
        step = load_initial_weights(model, path, arrays, record, args)
        return log.add(dict(step=step, **evaluate(model, val_set, args, score)))
    trainer = trainer_class(model, args, args.steps)
    steps_made = load_start(trainer, path, arrays, record, args)
    del arrays  # with Adam's states three times the weights

    # the loop
    flow.manual_seed(args.seed + steps_made)  # the masks of dropout
    keys = training_keys(args.images, args.batch_size, args, steps_made, args.steps)
    batches = load_batches(train_set, keys, args, mixup)
    log.start(steps_made, record)
    if log.is_due(steps_made, args.eval_every):  # a run killed while validating
        log.add(dict(step=steps_made, **evaluate(model, val_set, args, score)))
    for step, batch in enumerate(batches, steps_made + 1):
        loss, lr = trainer.step(*batch)
        log.add_step(step, loss, lr, trainer.grad_norm)
        saves = args.output_dir and log.is_due(step, args.save_every)
        validates = log.is_due(step, args.eval_every)
        if step == steps_made + 1 or saves or validates:
            require_equal_copies(model)  # before a wrong one is saved
        if saves:
            record = dict(vars(args), step=step, metrics_bytes=log.sync())
            save_checkpoint(trainer, record, checkpoint_path(args))
        if validates:
            log.add(dict(step=step, **evaluate(model, val_set, args, score)))
        log.start_clock()  # saving and validating do not count for images_per_s


class TrainGraph(nn.Graph):
    """Forward, backward and update of one step, in micro-batches, as one static graph."""

    def __init__(self, trainer, args):
        super().__init__()
        of_engine = type(trainer.optimizer).__module__.startswith("oneflow.")
        require(of_engine, "a graph knows the engine's own optimizers alone: give --eager")
        self.model = trainer.model
        self.add_optimizer(trainer.optimizer, lr_sch=trainer.scheduler)
        self.config.set_gradient_accumulation_steps(args.accumulation_steps)
        self.config.allow_fuse_model_update_ops(True)  # clipping is a part of each weight's update
        if dist.device_type == "cpu":
            # A CPU has no NCCL and casts to no half precision. To look for them takes time.
            flow.boxing.nccl.enable_use_compute_stream(False)
            self.config.proto.do_parallel_cast_before_widening_type_cast = False
        for block in self.model.blocks:
            block.to(nn.graph.GraphModule).activation_checkpointing = args.activation_checkpoint
        set_pipeline_stage_id(self.model)
        for parameter in trainer.model.parameters():
            parameter.grad = None  # a graph does not train a weight with a gradient of eager mode

    def build(self, images, *targets):
        """Compiled at the first call. Each call returns a loss for each micro-batch."""
        losses = self.model(images, *targets)["losses"]
        losses.backward()
        return losses

    def _generate_config_proto(self):
        # A global norm needs one group, as the engine clips each group by a norm of its own. It
        # calls this when it compiles: both groups are joined, and the names of the second are
        # excluded from weight decay.
        super()._generate_config_proto()
        groups = self.config.proto.train_conf.optimizer_conf
        rates = {group.base_learning_rate for group in groups}
        cure = "README, 'Where a PyTorch habit goes wrong'"
        error_message = f"a graph here takes two groups of one rate: {cure}"
        require(len(groups) == 2 and len(rates) == 1, error_message)
        decay, no_decay = groups
        decay.variable_op_names.extend(no_decay.variable_op_names)
        if decay.HasField("weight_decay_conf"):  # SGD has no such field
            patterns = [f"^{name}$" for name in no_decay.variable_op_names]
            decay.weight_decay_conf.excludes.pattern.extend(patterns)
        del groups[-1]


class Trainer:
    """Model, AdamW, warm-up and then cosine. Biases, norms, tokens and positions do not decay.

    In place of AdamW a graph takes SGD, Adam, Adagrad, Adadelta and RMSprop, and no schedule by a
    lambda. Eager mode takes any optimizer but LAMB, which never moves a split weight.
    """

    grad_norm = None  # of the last step before clipping, in eager mode; a graph does not tell it

    def __init__(self, model, args, steps):
        self.model = model.train()
        self.args = args
        # Only clipping makes a graph's update wait for all gradients. 1e9 clips nothing.
        clip = dict(clip_grad_max_norm=args.clip_grad or 1e9, clip_grad_norm_type=2.0)
        decay = dict(params=[], weight_decay=args.weight_decay, **clip)
        no_decay = dict(params=[], weight_decay=0.0, **clip)
        for name, parameter in model.named_parameters():
            has_decay = parameter.ndim > 1 and name not in model.no_weight_decay()
            group = decay if has_decay else no_decay
            group["params"].append(parameter)
        self.optimizer = flow.optim.AdamW([decay, no_decay], lr=args.lr)
        warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps
        require(warmup < steps, f"--warmup-steps {warmup} must be below {steps} steps")
        self.scheduler = lr_scheduler.CosineDecayLR(self.optimizer, steps - warmup)
        if warmup:
            options = dict(warmup_factor=1 / warmup, warmup_iters=warmup, warmup_prefix=True)
            self.scheduler = lr_scheduler.WarmUpLR(self.scheduler, **options)

    @functools.cached_property
    def graph(self):
        """The step as a graph; None in eager mode. It is made when the optimizer is settled."""
        return None if self.args.eager else TrainGraph(self, self.args)

    def step(self, *batch):
        """Train on a replica's arrays, images first -> mean loss of all replicas' images, rate."""
        lr = self.optimizer.param_groups[0]["lr"]
        losses = self.graph(*self.to_mesh(*batch)) if self.graph else self.eager_step(*batch)
        self.scheduler.step()  # sets the rate of eager mode, and `lr`; a graph has its own
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
        self.grad_norm = clip_grad_norm(self.model.parameters(), self.args.clip_grad or 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


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


def training_keys(length, batch_size, args, steps_made, last_step):
    """Yield a replica's keys of each step. Micro-batch i has the same images on every mesh."""
    replica, _, _ = dist.get_coordinates()
    for step in range(steps_made, last_step):
        epoch, position = divmod(step, length // batch_size)
        if step == steps_made or position == 0:  # a run can start within an epoch
            order = np.random.default_rng([args.seed, epoch]).permutation(length)
        batch = order[position * batch_size :][:batch_size]
        # (batch,) -> (micro-batches, replicas, images) -> (micro-batches * images,)
        batch = batch.reshape(args.accumulation_steps, dist.data_parallel_size, -1)
        yield [(epoch, int(index)) for index in batch[:, replica].flatten()]


def load_batches(data_set, keys, args, mixup=None):
    """Numpy batches for lists of keys: images (b, 3, h, w), labels (b,) or, mixed, (b, classes)."""
    # A data set may seed flow for each image, as FolderImages in part 2 does. Here it would repeat
    # the masks of dropout, so all but SyntheticImages are read in other processes.
    workers = 0 if isinstance(data_set, SyntheticImages) else args.workers
    require_shared_memory(workers)
    return DataLoader(
        data_set, batch_sampler=keys, num_workers=workers,
        collate_fn=lambda samples: make_batch(samples, args.seed, mixup),
    )


def score(logits, targets):
    """What `evaluate` averages: name -> a number an image. The first of equal logits is best."""
    logits = logits.astype(np.float64)
    loss = np.logaddexp.reduce(logits, 1) - logits[np.arange(len(targets)), targets]
    best = np.argsort(-logits, 1, kind="stable")[:, :5]
    hits = (best == targets[:, None]) & ~np.isnan(loss[:, None])  # NaN is never right
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
    scores = []
    told = time.monotonic()
    model.eval()
    with flow.no_grad():
        for batch, (images, _) in zip(batches, load_batches(data_set, keys, args)):
            logits = full_array(model(batch_to_global(images, 0))["prediction_scores"])
            scores.append(score(logits, targets[batch.flatten()]))
            lengths = {np.shape(values)[:1] for values in scores[-1].values()}
            require(lengths == {(batch.size,)}, "score must give a number for each image")
            if time.monotonic() - told > SECONDS_OF_SILENCE:
                told = time.monotonic()
                say(f"validating: {len(scores)} of {len(batches)} batches")
    model.train()
    means = {}
    for name in scores[0]:
        values = np.concatenate([part[name] for part in scores])
        means[name] = float(values[:length].mean())  # without what filled the last batch
    return dict(means, images=length)


# Part 2. What runs of days and a command need -----------------------------------------------------

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import random
import re
import signal
import socket
import sys
import warnings
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from subprocess import Popen

from PIL import Image
from safetensors.numpy import load_file

from vit3d import B, MODELS, TASKS, UsageError, distribute, draw_mesh, load_timm_state_dict
from vit3d import load_weights, of_all_ranks, resize_pos_embed

# flowvision warns of an argument that it passes itself.
warnings.filterwarnings("ignore", "Argument interpolation")

# Data: an image and its changes depend on seed and key, and not on the mesh


class FolderImages(Dataset):
    """Images in ImageNet's layout, DIR/SPLIT/CLASS/*, augmented for training."""

    ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif")
    ENDINGS += (".avif", ".gif")
    # What systems put into folders: .ipynb_checkpoints, ._0.jpg, @eaDir with real thumbnails.
    OF_A_SYSTEM = re.compile("/([.@]|__MACOSX(/|$))")

    def __init__(self, split, img_size, args):
        from flowvision.data import create_transform  # flowvision takes 0.3 s: where it is used

        self.root = str(args.data / split)
        self.seed = args.seed
        self.left_out = Counter()  # of files by ending, of folders by name
        is_training = split == "train" and not args.no_augment
        try:
            self.classes = self.find_classes()
            self.samples = list(self.find_images())
            self.transform = create_transform(
                img_size, is_training=is_training, color_jitter=None, re_mode="pixel",
                auto_augment=args.rand_augment, re_prob=args.random_erasing, mean=args.mean,
                std=args.std, crop_pct=args.crop_pct, interpolation=args.interpolation,
            )
        except (OSError, ValueError, AssertionError) as error:  # folders, the policy
            policy = f", --rand-augment {args.rand_augment}" if args.rand_augment else ""
            raise UsageError(f"{self.root}{policy}: {error}") from None
        self.targets = [target for _, target in self.samples]
        self.files = [path[len(self.root) :] for path, _ in self.samples]  # for `require_alike`
        empty = set(range(len(self.classes))) - set(self.targets)
        names = ", ".join(self.classes[i] for i in sorted(empty))
        require(not empty, f"{self.root}: no image in {names:.300}")
        error_message = f"{self.root}/CLASS/* must be two classes or more, not {self.classes}"
        require(len(self.classes) > 1, error_message)

    def find_classes(self):
        names = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        classes = [name for name in names if not self.OF_A_SYSTEM.match(f"/{name}")]
        self.left_out.update(f"{name}/" for name in set(names) - set(classes))
        return classes

    def find_images(self):
        """Yield (path, class) of each image, in an order that is the same on all machines."""

        def refuse(error):  # a folder that cannot be read: `os.walk` would pass over it
            raise error

        for target, name in enumerate(self.classes):
            walk = os.walk(os.path.join(self.root, name), onerror=refuse, followlinks=True)
            for folder, _, files in sorted(walk):
                for path in (os.path.join(folder, file) for file in sorted(files)):
                    is_of_system = self.OF_A_SYSTEM.search(path, len(self.root))  # below root
                    if path.lower().endswith(self.ENDINGS) and not is_of_system:
                        yield path, target
                    else:
                        self.left_out[Path(path).suffix or Path(path).name] += 1

    def __getitem__(self, key):
        """(epoch, index) -> the key, the image, its class."""
        path, target = self.samples[key[1]]
        for set_seed in (random.seed, np.random.seed, flow.manual_seed):  # transforms draw from all
            set_seed(zlib.crc32(repr([self.seed, *key]).encode()))
        try:
            require(os.path.isfile(path), "it is no file")  # to read a pipe would never end
            with Image.open(path) as image:
                # `convert` makes 16 bits white (I, I;16) and floats black (F).
                require(image.mode[0] not in "IF", f"mode {image.mode} is not of 8 bits")
                return key, self.transform(image.convert("RGB")).numpy(), target
        except Exception as error:  # decoders raise many kinds
            raise UsageError(f"{path} cannot be read as an image: {error}") from None


def open_data_sets(data_set_class, args):
    """The images to train and to validate.

    It sets what follows from them in `args`: classes, num_classes, batch_size, images, steps and
    save_every.
    """
    if data_set_class is None:
        data_set_class = FolderImages if args.data else SyntheticImages
    val_set = data_set_class("val", args.img_size, args)
    train_set = val_set if args.eval_only else data_set_class("train", args.img_size, args)
    names = [set(map(str, data_set.classes)) for data_set in (train_set, val_set)]
    differing = sorted(names[0] ^ names[1])
    error_message = f"train and val have other classes: {', '.join(differing):.300}"
    require(list(train_set.classes) == list(val_set.classes), error_message)
    args.classes = list(map(str, val_set.classes))
    args.num_classes = args.num_classes or len(args.classes)
    error_message = f"--num-classes {args.num_classes} is below {len(args.classes)} classes"
    require(args.num_classes >= len(args.classes), error_message)
    args.batch_size = args.data_parallel * args.accumulation_steps * args.micro_batch_size
    args.images = 0 if args.eval_only else len(train_set.targets)
    steps_an_epoch = args.images // args.batch_size
    error_message = f"a batch of {args.batch_size} is more than {args.images} images"
    require(steps_an_epoch or args.eval_only, error_message)
    args.steps = args.epochs * steps_an_epoch if args.epochs else (args.steps or 200)
    args.save_every = args.save_every or max(steps_an_epoch, 100)
    return train_set, val_set


def require_classes(data_sets, model, score_function):
    """Raise UsageError for a target that is no class: the engine's loss would leave it out.

    A loss or a score of your own may know what such a target means.
    """
    losses = ("CrossEntropyLoss", "SoftTargetCrossEntropy")
    if score_function is not score or type(model.loss_func).__name__ not in losses:
        return
    for data_set in data_sets:
        targets = np.array(data_set.targets)
        classes = len(data_set.classes)
        others = targets[(targets < 0) | (targets >= classes)]
        error_message = f"target {others[:1].tolist()} is not one of the classes 0 to {classes - 1}"
        require(len(others) == 0, error_message)


def has_soft_labels(args):
    return bool(args.mixup or args.cutmix or args.label_smoothing)


def new_mixup(args):
    """What mixes pairs of images and makes their labels soft; None if nothing is asked for."""
    if not has_soft_labels(args):
        return None
    from flowvision.data import Mixup

    prob = float(args.mixup > 0 or args.cutmix > 0)  # smoothing alone mixes nothing
    smoothing = dict(label_smoothing=args.label_smoothing, num_classes=args.num_classes)
    return Mixup(args.mixup, args.cutmix, prob=prob, **smoothing)


def make_batch(samples, seed, mixup):
    """[(key, image, target)] -> images (b, 3, h, w), labels (b,) or, mixed, (b, classes)."""
    keys, images, labels = zip(*samples)
    images = np.stack(images)
    labels = np.array(labels)
    if mixup is None:
        return images, labels
    # Neighbours are mixed in pairs, each pair by a draw of its own: the mesh does not matter.
    pairs = []
    for i in range(0, len(samples), 2):
        np.random.seed(zlib.crc32(repr([seed, *keys[i], "mix"]).encode()))
        pairs.append(mixup(flow.tensor(images[i : i + 2]), flow.tensor(labels[i : i + 2])))
    return [np.concatenate([t.numpy() for t in part]) for part in zip(*pairs)]


def require_shared_memory(workers):
    can_share = os.access("/dev/shm", os.W_OK) or not workers
    require(can_share, "/dev/shm is not there or not writable: the readers of images share it")


# What ranks agree on and say


def require_alike(args, data_sets, record):
    """Raise UsageError that names what ranks differ in, paths aside. Call it on every rank."""
    values = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    values["device"] = dist.device_type
    values["targets"] = [list(data_set.targets) for data_set in data_sets]
    values["files"] = [getattr(data_set, "files", None) for data_set in data_sets]
    values["the step of the checkpoint"] = record.get("step")
    checksums = of_all_ranks([zlib.crc32(repr(value).encode()) for value in values.values()])
    columns = checksums.T  # (ranks, values) -> (values, ranks)
    names = [name for name, column in zip(values, columns) if len(set(column)) > 1]
    require(not names, f"the ranks differ in {', '.join(names)}")


@contextlib.contextmanager
def named(path):
    """Give an OSError the name of its file. That of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def say(text):
    """Print on rank 0."""
    with named("standard output"):
        if dist.rank == 0:
            print(text)


SECONDS_OF_SILENCE = 10  # from one sign of life in a long validation to the next


class Log:
    """What a run tells: one record per line in metrics.jsonl, and text. Rank 0 alone writes."""

    def __init__(self, args):
        """Open metrics.jsonl, or eval.jsonl with --eval-only, and lock it.

        A process that closes any handle of the file loses the lock, so nothing here may open it
        again. Raises UsageError if another run has the lock.
        """
        self.args = args
        self.file = None
        if args.output_dir is None or dist.rank > 0:
            return
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path = args.output_dir / ("eval.jsonl" if args.eval_only else "metrics.jsonl")
        self.file = open(path, "a+", buffering=1)
        try:
            # Not `flock`: readers of images inherit it and can live longer than the run.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run writes to --output-dir {args.output_dir}") from None
        except OSError as error:
            say(f"{path} knows no locks, so nothing keeps a second run away: {error}")

    def describe(self, model, data_sets):
        """Print what is trained, on what. Call it on every rank."""
        args = self.args
        elements = sum(parameter.numel() for parameter in model.parameters())
        own_elements = sum(parameter.to_local().numel() for parameter in model.parameters())
        held = of_all_ranks([own_elements]).max()
        say(draw_mesh(dist))
        say(f"{elements:,} parameters, {args.batch_size} images a step, {args.steps} steps")
        weights = f"the fullest process holds {4 * held:,} bytes of weights"
        say(f"{weights}, {12 * held:,} with Adam's states")
        images = f"images: {args.images} to train, {len(data_sets[-1].targets)} to validate"
        say(f"{images}; {args.num_classes} classes")
        for data_set in dict.fromkeys(data_sets):  # one if both are the same
            for name, n in getattr(data_set, "left_out", Counter()).most_common(9):
                say(f"left out of {data_set.root}: {n} {name}")
        if args.data and not args.output_dir and not args.eval_only:
            say("nothing is saved, since there is no --output-dir")

    def start(self, steps_made, record):
        """Cut metrics.jsonl to what the checkpoint knew, or to nothing. Start the clock."""
        if self.file:
            size = os.path.getsize(self.file.name)
            kept = record.get("metrics_bytes", size) if steps_made else 0
            if "metrics_bytes" not in record and steps_made:
                say("an older checkpoint: what metrics.jsonl has of later steps stays in it")
            # Whole lines, and not more than it has: that would add zeros.
            kept = os.pread(self.file.fileno(), kept, 0).rfind(b"\n") + 1
            self.file.truncate(kept)
        if steps_made < self.args.steps and not self.args.eager:
            say("compiling the graph: seconds on one process, half a minute on eight")
        self.steps_made = steps_made
        self.start_clock()

    def start_clock(self):
        self.clock = time.perf_counter()

    def is_due(self, step, every):
        """Whether a step is a multiple of `every`, or the last one. Step 0 is never due."""
        is_multiple = every and step % every == 0
        return step > 0 and bool(is_multiple or step == self.args.steps)

    def add_step(self, step, loss, lr, grad_norm):
        """Record a step. Raises UsageError for a loss that is not finite."""
        require(math.isfinite(loss), f"loss {loss} at step {step}: lower --lr")
        now = time.perf_counter()
        record = dict(step=step, loss=loss, lr=lr)
        if grad_norm is not None:
            record["grad_norm"] = grad_norm
        record["images_per_s"] = round(self.args.batch_size / (now - self.clock), 1)
        steps = self.args.steps
        time_left = ""
        interval = min(max(steps // 20, 1), 100)  # about 20 lines, but each 100 steps at least
        is_printed = step == self.steps_made + 1 or step % interval == 0
        if step == self.steps_made + 1:
            self.after_first_step = now
        else:
            seconds = (now - self.after_first_step) / (step - self.steps_made - 1) * (steps - step)
            time_left = f"  left {timedelta(seconds=int(seconds))}"
        self.add(record, time_left, is_printed)

    def add(self, record, end="", is_printed=True):
        """Write a record and, if it is to be printed, its numbers as text."""
        if not self.args.eval_only:
            epoch = record["step"] / (self.args.images // self.args.batch_size)
            record["epoch"] = round(epoch, 2)
        if self.file:
            with named(self.file.name):
                print(json.dumps(record), file=self.file)
        if is_printed:
            text = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
            say("  ".join(f"{k} {v}" for k, v in text.items()) + end)

    def sync(self):
        """Wait until all records are on the disk -> how many bytes they are."""
        if self.file is None:
            return None
        os.fsync(self.file.fileno())
        return os.path.getsize(self.file.name)


# Checkpoints


def checkpoint_path(args):
    return args.output_dir / "checkpoint.npz" if args.output_dir else None


def get_optimizer_state(trainer):
    """Adam's states of each weight, {"optimizer/model.head.bias-m": tensor}, and counters."""
    state = {}
    if trainer.graph:
        # sorted: the engine's order can differ from rank to rank
        for name, tensor in sorted(trainer.graph.state_dict().items()):
            if name != "model":  # the weights
                state[f"optimizer/{name}"] = tensor
        return state
    for name, weight in trainer.model.named_parameters():
        for kind, tensor in trainer.optimizer._state.get(weight, {}).items():
            is_tensor = isinstance(tensor, flow.Tensor)
            require(is_tensor, f"the optimizer's {kind} of {name} must be a tensor to be saved")
            state[f"optimizer/model.{name}-{kind}"] = tensor  # as a graph names it
    return state


def set_optimizer_state(trainer, arrays, step):
    """The inverse, from a checkpoint's arrays. The schedule goes to this step, too."""
    weights = dict(trainer.model.named_parameters())
    state = {}
    for key in sorted(name for name in arrays if name.startswith("optimizer/")):
        name, _, kind = key.removeprefix("optimizer/model.").rpartition("-")
        weight = weights.get(name)
        if weight is None:  # a graph's counter
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
    while trainer.scheduler.last_step < step:
        trainer.scheduler.step()


def save_checkpoint(trainer, record, path):
    """Write checkpoint.npz: it is complete and on the disk, or the one before stays."""
    tensors = {**dict(trainer.model.named_parameters()), **get_optimizer_state(trainer)}
    arrays = {"run/record": json.dumps(record, default=str)}  # str: a Path becomes text
    for name, tensor in tensors.items():
        array = full_array(tensor)  # on all ranks
        require(np.isfinite(array).all(), f"{name} is not finite and is not saved")
        if dist.rank == 0:
            arrays[name] = array
    if dist.rank == 0:
        target = path.resolve()  # a link to a larger disk stays one
        unfinished = target.with_name("unfinished.npz")
        with named(path.parent), open(unfinished, "wb") as file:
            np.savez(file, **arrays)
            os.fsync(file.fileno())  # a power cut after the replacement must not find it empty
        unfinished.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot do that
            os.fsync(folder)  # the new name, too
        os.close(folder)


def read_start(args):
    """What a run goes on from, its own checkpoint or --init-from -> path, arrays, record.

    The record has the arguments of the run that saved the file, {} if it has none.
    """
    path = args.init_from
    checkpoint = checkpoint_path(args)  # it comes before --init-from
    if checkpoint and checkpoint.exists() and not args.eval_only:
        cure = "--resume goes on from it, or take another --output-dir"
        require(args.resume, f"{checkpoint} exists: {cure}")
        path = checkpoint
    if path is None:
        return None, {}, {}
    try:
        load = {".npz": np.load, ".safetensors": load_file}[path.suffix]
        arrays = dict(load(path))
        record = json.loads(str(arrays.pop("run/record", "{}")))
    except Exception as error:  # another form, not there, damaged, bfloat16
        raise UsageError(f"{path} must be a whole .npz or .safetensors file: {error}") from None
    flags = record.pop("flags", {})  # older checkpoints have two inner records
    return path, arrays, {**flags, **record.pop("sizes", {}), **record}


# Names of arguments. OF_TRAINING: what --eval-only has no use for.
SIZES = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes"]
SIZES += ["layer_norm_eps"]
RATES = ["drop_rate", "attn_drop_rate", "drop_path_rate"]
OF_TRAINING = [*RATES, "images", "no_augment", "rand_augment", "random_erasing", "label_smoothing"]
OF_TRAINING += ["mixup", "cutmix", "accumulation_steps", "steps", "epochs", "lr", "warmup_steps"]
OF_TRAINING += ["weight_decay", "clip_grad", "activation_checkpoint", "eager", "eval_every"]
OF_TRAINING += ["save_every", "resume"]


def model_options(args):
    """The arguments of a model class."""
    options = {name: getattr(args, name) for name in (*SIZES, *RATES)}
    options["loss_func"] = None  # the cross entropy
    if has_soft_labels(args):
        from flowvision.loss.cross_entropy import SoftTargetCrossEntropy

        options["loss_func"] = SoftTargetCrossEntropy()
    return options


def compare_with_saved(names, path, record, args):
    """Say what has changed since a file was saved. Raises UsageError if one of `names` has."""
    arguments = json.loads(json.dumps(vars(args), default=str))  # as a checkpoint has them
    for name, now in arguments.items():
        before = record.get(name, now)
        is_told = name != "resume" and not (args.eval_only and name in OF_TRAINING)
        if before == now or not is_told:
            continue
        if name == "classes":  # there may be thousands
            same = set(before) & set(now)
            before = [c for c in before if c not in same]
            now = [c for c in now if c not in same]
            if not before and not now:
                now = "in another order"
        verb = "must not be" if name in names else "is"
        text = f"{path}: {name} was {before} and {verb} {now}"
        require(name not in names, f"{text:.500}")
        say(f"{text:.500}")


def natural_order(name):
    """The key by which timm sorts folders: 1, 2, 10. Here they are sorted as text: 1, 10, 2."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def load_initial_weights(model, path, arrays, record, args):
    """Load weights alone, ours or timm's, without a head for other classes. -> their step"""
    compare_with_saved(("num_heads", "layer_norm_eps"), path, record, args)
    is_known = any(name.startswith("blocks.0.") for name in arrays)
    first_name = next(iter(arrays), "")
    require(is_known, f"{path}: neither our names nor timm's, as in {first_name:.100}")
    is_timm = "blocks.0.attn.qkv.weight" in arrays
    if is_timm and args.layer_norm_eps == 1e-5:
        say(f"{path}: weights of timm want --layer-norm-eps 1e-6; README has the other flags")
    head_rows = args.num_classes  # of a model of your own that has another head
    if "head.weight" in dict(model.named_parameters()):
        head_rows = len(arrays.get("head.weight", ()))
    reason = ""
    if record.get("classes", args.classes) != args.classes or head_rows != args.num_classes:
        reason = "is for other classes"
    elif "classes" not in record and args.classes != sorted(args.classes, key=natural_order):
        reason = "may have timm's order of classes, such as 1, 2, 10, and here it is 1, 10, 2"
    elif args.eval_only and not record and head_rows != len(args.classes):
        reason = f"has {head_rows} classes, --data {len(args.classes)}"
    may_be_missing = getattr(model, "may_be_missing", ())  # parts of names that your model adds
    if reason:
        require(not args.eval_only, f"{path}: its head {reason}")
        say(f"{path}: its head {reason} and is not loaded")
        arrays = {name: arrays[name] for name in arrays if not name.startswith("head.")}
        may_be_missing = (*may_be_missing, "head.")
    if is_timm:
        load_timm_state_dict(model, arrays, may_be_missing)
    else:
        if "pos_embed" in arrays:
            arrays["pos_embed"] = resize_pos_embed(arrays["pos_embed"], model)
        load_weights(model, arrays, may_be_missing)
    return record.get("step", 0)


def load_start(trainer, path, arrays, record, args):
    """Load what `read_start` found. -> the steps that the run has made"""
    args.optimizer = type(trainer.optimizer).__name__  # for the checkpoints to come, too
    if path is None:
        return 0
    if path != checkpoint_path(args):  # it is --init-from
        load_initial_weights(trainer.model, path, arrays, record, args)
        return 0
    fixed = [*SIZES, "batch_size", "steps", "eager", "classes", "optimizer"]
    compare_with_saved(fixed, path, record, args)
    load_weights(trainer.model, arrays)
    set_optimizer_state(trainer, arrays, record["step"])
    return record["step"]


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


def user_path(text):
    """A type for `add_argument`: in --flag=~/x the shell leaves the ~ as it is."""
    return Path(os.path.expanduser(text))


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def parse_arguments(argv=None, has_own_data=False):
    """The command line. Raises UsageError for what cannot go together."""
    parser = argparse.ArgumentParser(description="Train. In brackets: what is taken by default.")
    parser.error = lambda message: require(False, message)  # `end` tells it as other mistakes
    count = number(int, 1)
    rate = number(float, 0)
    probability = number(float, 0, 1)
    rgb = dict(nargs=3, metavar=("R", "G", "B"))
    add = parser.add_argument
    add("--data-parallel", type=count, default=1, help="replicas, with a share of a batch each")
    add("--tensor-parallel", type=count, default=1, help="ranks that share each layer")
    add("--pipeline-parallel", type=count, default=1, help="stages, with some layers each")
    add("--shard-params", action="store_true", help="weights split over replicas (ZeRO-3)")
    add("--sequence-parallel", action="store_true", help="tokens split between layers")
    add("--model", choices=MODELS, metavar="NAME", help="(a small one) " + ", ".join(MODELS))
    add("--img-size", type=count, help="height and width of images (that of the model)")
    add("--patch-size", type=count, help="side of a patch")
    add("--embed-dim", type=count, help="features of a token")
    add("--depth", type=count, help="blocks")
    add("--num-heads", type=count, help="attention heads")
    add("--num-classes", type=count, help="outputs (as many as the data have classes)")
    add("--layer-norm-eps", type=rate, default=1e-5, help="1e-5: LiBai, 1e-6: timm")
    add("--data", type=user_path, metavar="DIR", help="it has train/CLASS/*, val/CLASS/*")
    add("--no-augment", action="store_true", help="train on images as validated: resized, cropped")
    mean_help = "of the colours, which lie in 0 to 1 (%(default)s)"
    add("--mean", type=probability, default=[0.485, 0.456, 0.406], help=mean_help, **rgb)
    std = number(float, 1e-6, 1)
    add("--std", type=std, default=[0.229, 0.224, 0.225], help="of the colours", **rgb)
    share = number(float, 0.01, 1)
    add("--crop-pct", type=share, default=0.875, help="shown of an image's side (%(default)s)")
    kinds = ("bilinear", "bicubic")
    add("--interpolation", choices=kinds, default="bilinear", help="when resized (%(default)s)")
    add("--rand-augment", metavar="POLICY", help="such as rand-m9-mstd0.5-inc1")
    add("--random-erasing", type=probability, default=0.0, help="probability (%(default)s)")
    add("--label-smoothing", type=probability, default=0.0, help="share (%(default)s)")
    add("--mixup", type=rate, default=0.0, metavar="ALPHA", help="0: none")
    add("--cutmix", type=rate, default=0.0, metavar="ALPHA", help="0: none")
    add("--drop-rate", type=probability, default=0.0, help="of activations (%(default)s)")
    add("--attn-drop-rate", type=probability, default=0.0, help="of attention (%(default)s)")
    add("--drop-path-rate", type=probability, default=0.0, help="of layers (%(default)s)")
    add("--workers", type=count, default=2, help="readers of each process (%(default)s)")
    add("--micro-batch-size", type=count, default=32, help="of a replica (%(default)s)")
    add("--accumulation-steps", type=count, default=1, help="micro-batches (%(default)s)")
    add("--steps", type=count, help="optimizer steps (those of --epochs, or 200)")
    add("--epochs", type=count, help="passes over the training images")
    add("--lr", type=rate, default=1e-3, help="highest learning rate (%(default)s)")
    add("--warmup-steps", type=number(int, 0), help="(a tenth of all steps)")
    add("--weight-decay", type=rate, default=0.05, help="of matrices (%(default)s)")
    add("--clip-grad", type=rate, default=1.0, help="highest norm; 0: none (%(default)s)")
    add("--activation-checkpoint", action="store_true", help="recompute blocks (graph)")
    add("--eager", action="store_true", help="no nn.Graph: starts at once, slower steps")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of weights, masks, order, images")
    add("--eval-every", type=count, help="steps from one validation to the next")
    add("--eval-only", action="store_true", help="no training, only --init-from")
    add("--output-dir", type=user_path, help="where metrics.jsonl and checkpoint.npz go")
    add("--save-every", type=count, help="steps between checkpoints (an epoch, at least 100)")
    add("--resume", action="store_true", help="go on from --output-dir, if it has a checkpoint")
    add("--init-from", type=user_path, metavar="FILE", help="ours or timm's, .npz or .safetensors")
    args = parser.parse_args(argv)

    # A flag without effect is refused. For each need: is it met, and which arguments have it?
    of_images = ["no_augment", "mean", "std", "crop_pct", "interpolation", "rand_augment"]
    of_images += ["random_erasing", "workers"]
    needs = {
        "--data": (args.data or has_own_data, of_images),
        "augmentation, so no --no-augment": (
            not args.no_augment, ["rand_augment", "random_erasing"],
        ),
        "--output-dir": (args.output_dir, ["resume", "save_every"]),
        "--init-from": (args.init_from, ["eval_only"]),
        "a graph, so no --eager": (not args.eager, ["activation_checkpoint"]),
        "--data-parallel 2 or more": (args.data_parallel > 1, ["shard_params"]),
        "--tensor-parallel 2 or more": (args.tensor_parallel > 1, ["sequence_parallel"]),
    }
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    # Told, not refused, since --eval-only is often put behind the command of a training run.
    useless = [name for name in given if args.eval_only and name in OF_TRAINING]
    processes = args.data_parallel * args.tensor_parallel * args.pipeline_parallel
    if useless and dist.world_size == processes:  # not before ranks are started
        say(f"no training, so no use for: {', '.join(map(flag_of, useless))}")
    for need, (is_met, names) in needs.items():
        flags = [flag_of(name) for name in given if name in names and name not in useless]
        require(is_met or not flags, f"{', '.join(flags)}: needs {need}")
    require(not (args.steps and args.epochs), "--steps and --epochs: give one of them")
    is_even = args.micro_batch_size % 2 == 0
    error_message = "--mixup, --cutmix, --label-smoothing: --micro-batch-size must be even"
    require(is_even or args.eval_only or not has_soft_labels(args), error_message)
    small = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)
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
    mimalloc = [f"{folder}/cmeel.prefix/lib/libmimalloc.so" for folder in sys.path]
    environment.setdefault("LD_PRELOAD", ":".join(filter(os.path.exists, mimalloc)))
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
        process.wait()  # now its lock is free
    code = next(filter(None, codes), 0)
    if code < 0:
        print(f"train.py: a process ended by {signal.Signals(-code).name}", file=sys.stderr)
    return code if code >= 0 else 128 - code  # as a shell has it


def end(kind, error, trace):
    """The `sys.excepthook` of a run: tell a mistake in one sentence, and end this rank.

    The exit code is 2 for a user's mistake, else 1.
    """
    try:
        time.sleep(min(dist.rank, 9))  # all meet a mistake: rank 0 tells it first
        if isinstance(error, (UsageError, OSError)):
            # What comes from a reader's process has its traceback in front.
            text = str(error).rpartition("UsageError: ")[2].strip()
            print(f"train.py: {text}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
    finally:
        # The engine's own end would wait for the other ranks.
        os._exit(2 if isinstance(error, UsageError) else 1)


def run(model=VisionTransformer, trainer=Trainer, data_set=None, score=score):
    """Train as the command line says, with classes of your own. It starts the ranks, too.

    model: a class that takes the arguments of VisionTransformer. It has `blocks`, `loss_func` and
        `no_weight_decay()`. `forward` returns {"losses": scalar} in training when it is given
        labels, else {"prediction_scores": (b, num_classes)}. It may have `may_be_missing`, parts of
        the names of weights that --init-from need not have. It may have
        `zero_gradient_at_first`, parts of the names of weights whose gradient is 0 in the first
        step, as that of an adapter's first matrix while the second is 0.
    trainer: a class that inherits from Trainer.
    data_set: a class, data_set(split, img_size, args) for the splits "train" and "val". It has
        `classes`, `targets` and `self[epoch, index]`, which is ((epoch, index), image, target). An
        image is float32, (channels, height, width), and depends on nothing but epoch, index, split
        and seed. None: FolderImages with --data, else SyntheticImages.
    score: a function as `score` above. Give one where targets are not classes.
    """
    sys.excepthook = end
    with contextlib.suppress(AttributeError):  # closed, or Jupyter's
        # A line is written at once. A name that is not UTF-8 is printed with escapes.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    # Ctrl-C ends a process at once: the engine's own handler is replaced. Where it is ignored, as
    # in `COMMAND &` of a script, it stays so. (`getsignal` gives what was at the start.)
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    args = parse_arguments(has_own_data=data_set is not None)
    processes = args.data_parallel * args.tensor_parallel * args.pipeline_parallel
    untold = [f"{name} is {n}" for name, n in TASKS.items() if n != "1" and dist.world_size == 1]
    cure = "this task was not told its rank: README has lines for srun and mpirun"
    require(not untold, f"{', '.join(untold)}, and {cure}")
    if processes > 1 and dist.world_size == 1:
        require(sys.argv[0] != "-", "ranks read no program from standard input: give them a file")
        sys.exit(launch(processes, [sys.executable, *sys.orig_argv[1:]]))
    main(args, model, trainer, data_set, score)


if __name__ == "__main__":
    run()
