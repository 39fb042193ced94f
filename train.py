# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer on synthetic images or on folders of images, on any mesh.

python train.py                                         # one process
python train.py --data-parallel 2 --pipeline-parallel 2 # four processes
python train.py --data DIR --model vit_small_patch16_224 --epochs 300 --output-dir out

`main`, at the end, is a whole run. What it calls stands above it, in its order.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from subprocess import Popen

# srun, mpirun and others set one of these to the number of tasks, which `__main__` looks at. The
# engine overwrites WORLD_SIZE when it is imported, so they are read here.
TASK_COUNTS = "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"
TASKS = {name: os.environ[name] for name in TASK_COUNTS if name in os.environ}

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from vit3d import MODELS, B, S, UsageError, VisionTransformer, batch_to_global, dist, distribute
from vit3d import draw_mesh, flow, full_array, load_timm_state_dict, load_weights, nn, require
from vit3d import resize_pos_embed, set_pipeline_stage_id, weights_held
from flowvision import datasets
from flowvision.data import Mixup, create_transform
from flowvision.loss.cross_entropy import SoftTargetCrossEntropy
from oneflow.optim import lr_scheduler
from oneflow.utils.data import DataLoader, Dataset

warnings.filterwarnings("ignore", "Argument interpolation")  # flowvision's, of its own call

# 1. Data: a sample's key is (epoch, index), its image depends on seed, split and key ----


class SyntheticImages(Dataset):
    """Class-dependent patterns of 4 x 4 cells under noise, (3, img_size, img_size)."""

    def __init__(self, split, img_size, args):
        self.split, self.img_size, self.seed = split, img_size, args.seed
        num_classes = args.num_classes or 10
        self.classes = list(range(num_classes))
        self.targets = np.arange(4096 if split == "train" else 1000) % num_classes
        self.patterns = np.random.default_rng(args.seed).standard_normal((num_classes, 3, 4, 4))

    def __getitem__(self, key):
        """(epoch, index) -> the key, the image, its class."""
        _, index = key
        cells = np.arange(self.img_size) * 4 // self.img_size
        # (3, 4, 4) -> (3, img_size, img_size)
        image = 0.5 * self.patterns[self.targets[index]][:, cells][:, :, cells]
        rng = np.random.default_rng([self.seed, self.split == "val", index])
        image = (image + rng.standard_normal(image.shape)).astype(np.float32)
        return key, image, self.targets[index]


class FolderImages(datasets.ImageFolder):
    """Images in ImageNet's layout, DIR/SPLIT/CLASS/*; items as above, augmented for training."""

    ENDINGS = (*datasets.folder.IMG_EXTENSIONS, ".jfif", ".avif", ".gif")
    # What systems put into folders: .ipynb_checkpoints, ._0.jpg, @eaDir with real thumbnails.
    OF_A_SYSTEM = re.compile("/([.@]|__MACOSX(/|$))")

    def __init__(self, split, img_size, args):
        root, self.seed = str(args.data / split), args.seed
        is_training = split == "train" and not args.no_augment
        self.left_out = Counter()  # of files by ending, of folders by name
        try:
            super().__init__(root, is_valid_file=lambda path: True)  # `make_dataset` chooses
            self.transform = create_transform(
                img_size, is_training=is_training, color_jitter=None, re_mode="pixel",
                auto_augment=args.rand_augment, re_prob=args.random_erasing, mean=args.mean,
                std=args.std, crop_pct=args.crop_pct, interpolation=args.interpolation,
            )
        except (OSError, ValueError, AssertionError) as error:  # of folders, of the policy
            raise UsageError(f"{root}, --rand-augment {args.rand_augment}: {error}") from None
        self.files = [path[len(root) :] for path, _ in self.samples]  # alike on all ranks
        empty = set(range(len(self.classes))) - set(self.targets)
        names = ", ".join(self.classes[i] for i in sorted(empty))
        require(not empty, f"{root}: no image in {names:.300}")
        error_message = f"{root}/CLASS/* must be two classes or more, not {self.classes}"
        require(len(self.classes) > 1, error_message)

    def find_classes(self, root):
        names, _ = super().find_classes(root)
        classes = [name for name in names if not self.OF_A_SYSTEM.match(f"/{name}")]
        self.left_out.update(f"{name}/" for name in set(names) - set(classes))
        return classes, {name: i for i, name in enumerate(classes)}

    def make_dataset(self, root, *more):
        samples = []
        for path, target in super().make_dataset(root, *more):
            if path.lower().endswith(self.ENDINGS) and not self.OF_A_SYSTEM.search(path, len(root)):
                samples.append((path, target))
            else:
                self.left_out[Path(path).suffix or Path(path).name] += 1
        return samples

    def __getitem__(self, key):
        path, target = self.samples[key[1]]
        for set_seed in (random.seed, np.random.seed, flow.manual_seed):  # transforms draw from all
            set_seed(zlib.crc32(repr([self.seed, *key]).encode()))
        try:
            with Image.open(path) as image:
                # `convert` makes 16 bits white (I, I;16) and floats black (F).
                require(image.mode[0] not in "IF", f"mode {image.mode} is not of 8 bits")
                return key, self.transform(image.convert("RGB")).numpy(), target
        except Exception as error:  # decoders raise many kinds
            raise UsageError(f"{path} cannot be read as an image: {error}") from None


def training_keys(length, batch_size, args, first_step, last_step):
    """Yield this replica's keys of each step. Micro-batch i is the same on each mesh."""
    replica, _, _ = dist.get_coordinates()
    for step in range(first_step, last_step):
        epoch, position = divmod(step, length // batch_size)
        if step == first_step or position == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(length)
        batch = order[position * batch_size :][:batch_size]
        # (batch,) -> (micro-batches, replicas, images) -> (micro-batches * images,)
        batch = batch.reshape(args.accumulation_steps, dist.data_parallel_size, -1)
        yield [(epoch, int(index)) for index in batch[:, replica].flatten()]


def load_batches(data_set, keys, args, mixup=None):
    """Numpy batches, images (b, 3, h, w) and labels (b,), for lists of keys.

    With mixup, labels are (b, num_classes). Neighbours are mixed in pairs, each pair by
    a draw of its own, so that all ranks and meshes see the same mix.
    """

    def collate(samples):
        sample_keys, images, labels = zip(*samples)
        images, labels = np.stack(images), np.array(labels)
        if mixup is None:
            return images, labels
        pairs = []
        for i in range(0, len(samples), 2):
            np.random.seed(zlib.crc32(repr([args.seed, *sample_keys[i], "mix"]).encode()))
            pairs.append(mixup(flow.tensor(images[i : i + 2]), flow.tensor(labels[i : i + 2])))
        return [np.concatenate([t.numpy() for t in part]) for part in zip(*pairs)]
    # A data set may seed flow for each image, as FolderImages does. Here that would repeat the
    # masks of dropout, so all but SyntheticImages are read in other processes.
    workers = 0 if isinstance(data_set, SyntheticImages) else args.workers
    can_share = os.access("/dev/shm", os.W_OK) or not workers
    require(can_share, "/dev/shm is not there or not writable: the readers of images share it")
    return DataLoader(data_set, batch_sampler=keys, num_workers=workers, collate_fn=collate)


# 2. The step --------------------------------------------------------------------------


class TrainGraph(nn.Graph):
    """Forward, backward and update of one step, in micro-batches, as one static graph."""

    def __init__(self, trainer, args):
        super().__init__()
        self.model = trainer.model
        self.add_optimizer(trainer.optimizer, lr_sch=trainer.scheduler)
        self.config.set_gradient_accumulation_steps(args.accumulation_steps)
        for block in self.model.blocks:
            block.to(nn.graph.GraphModule).activation_checkpointing = args.activation_checkpoint
        set_pipeline_stage_id(self.model)

    def _generate_config_proto(self):
        # The engine clips each group of parameters by its own norm. A global norm needs one group:
        # this joins both, and names the variables that have no weight decay.
        super()._generate_config_proto()
        groups = self.config.proto.train_conf.optimizer_conf
        rates = {group.base_learning_rate for group in groups}
        error_message = "a graph here takes two groups of one rate: README, 'Rules of the engine'"
        require(len(groups) == 2 and len(rates) == 1, error_message)
        decay, no_decay = groups
        decay.variable_op_names.extend(no_decay.variable_op_names)
        if decay.HasField("weight_decay_conf"):  # SGD has no such field
            patterns = [f"^{name}$" for name in no_decay.variable_op_names]
            decay.weight_decay_conf.excludes.pattern.extend(patterns)
        del groups[-1]

    def build(self, images, *targets):
        losses = self.model(images, *targets)["losses"]
        losses.backward()
        return losses


class Trainer:
    """Model, AdamW without decay of biases, norms and embeddings, warm-up and then cosine.

    A graph takes SGD, Adam, AdamW, Adagrad, Adadelta and RMSprop, too, and no schedule by a lambda.
    LAMB is wrong where weights are split, since it takes the norm of a rank's slice.
    """

    def __init__(self, model, args, steps):
        self.model, self.args = model.train(), args
        # A graph's update must wait for all gradients: their norm does. 1e9 clips nothing.
        clip = dict(clip_grad_max_norm=args.clip_grad or 1e9, clip_grad_norm_type=2.0)
        decay = dict(params=[], weight_decay=args.weight_decay, **clip)
        no_decay = dict(params=[], weight_decay=0.0, **clip)
        for name, parameter in model.named_parameters():
            has_decay = parameter.ndim > 1 and name not in model.no_weight_decay()
            (decay if has_decay else no_decay)["params"].append(parameter)
        self.optimizer = flow.optim.AdamW([decay, no_decay], lr=args.lr)
        warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps
        require(warmup < steps, f"--warmup-steps {warmup} must be below {steps} steps")
        self.scheduler = lr_scheduler.CosineDecayLR(self.optimizer, steps - warmup)
        if warmup:
            linear = dict(warmup_factor=1 / warmup, warmup_iters=warmup, warmup_prefix=True)
            self.scheduler = lr_scheduler.WarmUpLR(self.scheduler, **linear)
        self.graph = None if args.eager else TrainGraph(self, args)

    def step(self, *batch):
        """Train on a replica's batch, numpy arrays, images first -> mean loss, learning rate."""
        lr = self.optimizer.param_groups[0]["lr"]
        losses = self.graph(*self.to_mesh(*batch)) if self.graph else self.eager_step(*batch)
        self.scheduler.step()  # for eager mode and `lr`; a graph computes the same rate itself
        return float(full_array(losses).mean()), lr

    def to_mesh(self, images, *targets):
        """Images to the first stage, the others, such as labels, to the last."""
        return batch_to_global(images, 0), *(batch_to_global(array, -1) for array in targets)

    def eager_step(self, *batch):
        n, total = self.args.accumulation_steps, 0
        for micro_batch in zip(*(np.split(array, n) for array in batch)):
            losses = self.model(*self.to_mesh(*micro_batch))["losses"] / n
            losses.backward()
            total = total + losses.detach()
        nn.utils.clip_grad_norm_(list(self.model.parameters()), self.args.clip_grad or 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


# 3. What the ranks agree on and say ---------------------------------------------------


def all_ranks():
    return flow.placement("cpu", list(range(dist.world_size)))


def require_alike(values):
    """Raise UsageError that names what is not the same on all ranks. Call it on every rank."""
    checksums = [[zlib.crc32(repr(value).encode()) for value in values.values()]]
    checksums = flow.tensor(checksums).to_global(placement=all_ranks(), sbp=S(0))
    columns = full_array(checksums).T  # (ranks, values) -> (values, ranks)
    names = [name for name, column in zip(values, columns) if len(set(column)) > 1]
    require(not names, f"the ranks differ in {', '.join(names)}")


def of_rank_0(number):
    """The number that rank 0 has, on every rank."""
    return full_array(flow.tensor([number]).to_global(placement=all_ranks(), sbp=B))[0]


def say(text):
    """Print on rank 0."""
    try:
        if dist.rank == 0:
            print(text)
    except OSError as error:  # a closed pipe, a full disk
        error.filename = "standard output"
        raise


# 4. Evaluation and checkpoints --------------------------------------------------------

SECONDS_OF_SILENCE = 10  # from one sign of life in a long validation to the next


def score(logits, targets):
    """What `evaluate` averages: arrays (b,) by name. Of equal logits the first class is the best.

    Where targets are not classes (several labels an image, numbers) replace this function alone.
    """
    logits = logits.astype(np.float64)
    loss = np.logaddexp.reduce(logits, 1) - logits[np.arange(len(targets)), targets]
    best = np.argsort(-logits, 1, kind="stable")[:, :5]
    hits = (best == targets[:, None]) & ~np.isnan(loss[:, None])  # NaN is wrong
    return dict(val_loss=loss, top1=hits[:, 0], top5=hits.any(1))


def evaluate(model, data_set, args):
    """The means of what `score` returns, over all images, each counted once."""
    targets, (replica, _, _) = np.array(data_set.targets), dist.get_coordinates()
    length, images_a_batch = len(targets), dist.data_parallel_size * args.micro_batch_size
    # The last batch is filled up with images that are counted already.
    filled = np.arange(-(-length // images_a_batch) * images_a_batch) % length
    batches = filled.reshape(-1, dist.data_parallel_size, args.micro_batch_size)
    keys = [[(0, int(index)) for index in batch[replica]] for batch in batches]
    scores, told = [], time.monotonic()
    model.eval()
    with flow.no_grad():
        for batch, (images, _) in zip(batches, load_batches(data_set, keys, args)):
            logits = full_array(model(batch_to_global(images, 0))["prediction_scores"])
            scores.append(score(logits, targets[batch.flatten()]))
            if time.monotonic() - told > SECONDS_OF_SILENCE:
                told = time.monotonic()
                say(f"validating: {len(scores)} of {len(batches)} batches")
    model.train()
    means = {}
    for name in scores[0]:
        values = np.concatenate([part[name] for part in scores])
        means[name] = float(values[:length].mean())
    return dict(means, images=length)


def get_optimizer_state(trainer):
    """Adam's states of each weight, as {"model.head.bias-m": tensor}, and a graph's counters."""
    if trainer.graph:
        state = trainer.graph.state_dict()
        del state["model"]  # the weights
        return dict(sorted(state.items()))  # the engine's order can differ from rank to rank
    state = {}
    for name, weight in trainer.model.named_parameters():
        for kind, tensor in trainer.optimizer._state[weight].items():
            state[f"model.{name}-{kind}"] = tensor  # as a graph names it
    return state


def set_optimizer_state(trainer, arrays, step):
    """The inverse, from full numpy arrays. The schedule goes to this step, too."""
    weights, state = dict(trainer.model.named_parameters()), {}
    first_stage = dist.get_layer_placement(0), dist.get_nd_sbp([B, B])
    for key in sorted(arrays):
        name, _, kind = key.removeprefix("model.").rpartition("-")
        weight = weights.get(name)  # None for a graph's counters
        where = (weight.placement, weight.sbp) if weight is not None else first_stage
        state[key] = distribute(flow.tensor(arrays[key]), *where)
        if not trainer.graph:
            trainer.optimizer._state[weight][kind] = state[key]
    if trainer.graph:
        trainer.graph.load_state_dict(state)
    trainer.optimizer._state["step"] = step  # for Adam's bias correction in eager mode
    while trainer.scheduler.last_step < step:
        trainer.scheduler.step()


def save_checkpoint(trainer, record, path):
    """Write checkpoint.npz: it is complete and on the disk, or the one before stays."""
    tensors = dict(trainer.model.named_parameters())
    for name, tensor in get_optimizer_state(trainer).items():
        tensors[f"optimizer/{name}"] = tensor
    arrays = {"run/record": json.dumps(record, default=str)}  # str: a Path becomes text
    for name, tensor in tensors.items():
        array = full_array(tensor)  # on all ranks
        require(np.isfinite(array).all(), f"{name} is not finite and is not saved")
        if dist.rank == 0:
            arrays[name] = array
    if dist.rank == 0:
        unfinished = path.with_name("unfinished.npz")
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
            os.fsync(file.fileno())  # a power cut after the replacement must not find it empty
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot do that
            os.fsync(folder)  # the new name, too
        os.close(folder)


def read_arrays(path):
    """A file's arrays by name, and the record of the run that saved it, {} if it has none."""
    try:
        arrays = dict({".npz": np.load, ".safetensors": load_file}[path.suffix](path))
        return arrays, json.loads(str(arrays.pop("run/record", "{}")))
    except Exception as error:  # another form, not there, damaged, bfloat16
        raise UsageError(f"{path} must be a whole .npz or .safetensors file: {error}") from None


def tell_changed_flags(path, record, run):
    for flag, before in record.get("flags", {}).items():
        now = run["flags"].get(flag, before)
        if str(before) != str(now):
            say(f"{path}: {flag} was {before} and is {now}")


def load_initial_weights(model, path, run, args):
    """Load weights alone, ours or timm's, without a head for other classes. -> their step"""
    arrays, record = read_arrays(path)
    tell_changed_flags(path, record, run)
    first_name, sizes = next(iter(arrays), ""), record.get("sizes", run["sizes"])
    is_known = any(name.startswith("blocks.0.") for name in arrays)
    require(is_known, f"{path}: neither our names nor timm's, as in {first_name:.100}")
    for name in ("num_heads", "layer_norm_eps"):  # no shape of a weight tells them
        flag = f"--{name.replace('_', '-')} {sizes[name]}"
        require(sizes[name] == run["sizes"][name], f"{path} was trained with {flag}: give it, too")
    is_timm = "blocks.0.attn.qkv.weight" in arrays
    if is_timm and args.layer_norm_eps == 1e-5:
        say(f"{path}: weights of timm want --layer-norm-eps 1e-6; README has the other flags")
    head_rows = len(arrays.get("head.bias", ()))
    may_be_missing = ()  # parts of names that your model adds, such as ("lora_",)
    same_classes = record.get("classes", run["classes"]) == run["classes"]
    if not same_classes or head_rows != run["sizes"]["num_classes"]:
        require(not args.eval_only, f"{path}: its head is for other classes")
        say(f"{path}: its head is for other classes and is not loaded")
        arrays = {name: arrays[name] for name in arrays if not name.startswith("head.")}
        may_be_missing += ("head.",)
    if args.eval_only and not record:
        classes = len(run["classes"])
        require(head_rows == classes, f"{path}: its head has {head_rows} classes, --data {classes}")
    if is_timm:
        load_timm_state_dict(model, arrays, may_be_missing)
    else:
        if "pos_embed" in arrays:
            arrays["pos_embed"] = resize_pos_embed(arrays["pos_embed"], model)
        load_weights(model, arrays, may_be_missing)
    return record.get("step", 0)


def load_checkpoint(trainer, path, run):
    """Load all that the same run goes on from. -> the step it was saved after"""
    arrays, record = read_arrays(path)
    tell_changed_flags(path, record, run)
    require_alike({f"the step of {path}": record.get("step")})
    for name in ("batch_size", "steps", "sizes", "eager", "classes"):
        before, now = json.dumps(record.get(name)), json.dumps(run[name])
        require(before == now, f"{path}: {name} was {before:.500} and must not be {now:.500}")
    load_weights(trainer.model, arrays)
    state = {k.removeprefix("optimizer/"): arrays[k] for k in arrays if k.startswith("optimizer/")}
    set_optimizer_state(trainer, state, record["step"])
    return record["step"]


# 5. The command -----------------------------------------------------------------------


def number(kind, least, most=math.inf):
    """A type for `add_argument`: an int or a float in this range, and finite."""

    def parse(text):
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} must be finite, from {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # argparse tells it, as in 'invalid float value'
    return parse


def parse_arguments(argv=None):
    """The command line. Raises UsageError for what cannot go together."""
    parser = argparse.ArgumentParser(description="Train; sizes are those of --model.")
    parser.error = lambda message: require(False, message)  # `__main__` tells it
    count, rate, probability = number(int, 1), number(float, 0), number(float, 0, 1)
    rgb = dict(nargs=3, metavar=tuple("RGB"))
    add = parser.add_argument
    add("--data-parallel", type=count, default=1, help="replicas, with a share of a batch each")
    add("--tensor-parallel", type=count, default=1, help="ranks that share each layer")
    add("--pipeline-parallel", type=count, default=1, help="stages, with some layers each")
    add("--shard-params", action="store_true", help="weights split over replicas (ZeRO-3)")
    add("--sequence-parallel", action="store_true", help="tokens split between layers")
    add("--model", choices=MODELS, metavar="NAME", help="(small) " + ", ".join(MODELS))
    add("--img-size", type=count)
    add("--patch-size", type=count)
    add("--embed-dim", type=count)
    add("--depth", type=count)
    add("--num-heads", type=count)
    add("--num-classes", type=count)
    add("--layer-norm-eps", type=rate, default=1e-5, help="1e-5: LiBai, 1e-6: timm")
    add("--data", type=Path, metavar="DIR", help="it has train/CLASS/*, val/CLASS/*")
    add("--no-augment", action="store_true", help="train as validated: resized, cropped")
    add("--mean", type=number(float, -math.inf), default=[0.485, 0.456, 0.406], **rgb)
    add("--std", type=number(float, 1e-6), default=[0.229, 0.224, 0.225], **rgb)
    share = number(float, 0.01, 1)
    add("--crop-pct", type=share, default=0.875, help="shown of an image's side (%(default)s)")
    add("--interpolation", choices=("bilinear", "bicubic"), default="bilinear")
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
    add("--eager", action="store_true", help="short runs: no nn.Graph, grows 13-22 kB a step")
    add("--seed", type=number(int, 0, 2**62), default=0)
    add("--eval-every", type=count, help="steps from one validation to the next")
    add("--eval-only", action="store_true", help="no training, only --init-from")
    add("--output-dir", type=Path, help="where metrics.jsonl and checkpoint.npz go")
    add("--save-every", type=count, help="steps between checkpoints (an epoch, at least 100)")
    add("--resume", action="store_true", help="go on from --output-dir, if it has a checkpoint")
    add("--init-from", type=Path, metavar="FILE", help="ours or timm's, .npz or .safetensors")
    args = parser.parse_args(argv)
    mixes_pairs = args.mixup or args.cutmix or args.label_smoothing
    is_even = args.micro_batch_size % 2 == 0
    error_message = "--mixup, --cutmix, --label-smoothing: --micro-batch-size must be even"
    require(is_even or not mixes_pairs, error_message)
    require(not (args.steps and args.epochs), "--steps and --epochs: give one of them")
    require(not (args.eager and args.activation_checkpoint), "--activation-checkpoint: not --eager")
    require(args.output_dir or not args.resume, "--resume needs --output-dir")
    require(args.init_from or not args.eval_only, "--eval-only needs --init-from")
    return args


def launch(processes, command):
    """Run a command as this many ranks; end all when one ends badly. -> exit code"""
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    # The engine would send even 127.0.0.1 through a proxy.
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(processes))
    environment.setdefault("OMP_NUM_THREADS", "1")  # a rank is one core's arithmetic
    libc, ranks = ctypes.CDLL(None), []
    for rank in map(str, range(processes)):
        environment.update(RANK=rank, LOCAL_RANK=rank)
        # 1 is PR_SET_PDEATHSIG, 9 SIGKILL: the kernel ends a rank when this process has ended.
        ranks.append(Popen(command, env=environment, preexec_fn=lambda: libc.prctl(1, 9)))
    codes = [None]
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


def open_metrics(folder):
    """Open metrics.jsonl and lock it, on rank 0. Raises UsageError if another run has the lock.

    Nothing may open the file again in this process: to close it would free the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # latin-1: `cut_metrics` counts characters, and needs bytes.
    file = open(folder / "metrics.jsonl", "a+", buffering=1, encoding="latin-1")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # `flock` would live on in readers
    except BlockingIOError:
        raise UsageError(f"another run writes to --output-dir {folder}") from None
    except OSError as error:
        say(f"{folder} knows no locks, so nothing keeps a second run away: {error}")
    return file


def cut_metrics(file, last_step):
    """Cut metrics.jsonl after this step, or where it cannot be read. -> is the step validated?"""
    size, is_validated = 0, False
    file.seek(0)
    for line in file:
        try:
            record = json.loads(line)
            is_kept = record["step"] <= last_step
        except (ValueError, KeyError, TypeError):  # a kill or a power cut within the line
            break
        if not is_kept or not line.endswith("\n"):
            break
        size += len(line)
        is_validated |= record["step"] == last_step and "images" in record
    file.truncate(size)
    return is_validated


def report(metrics, record, left=None):
    """A line of metrics.jsonl and, unless `left` is None, one of text that ends with it."""
    if metrics:
        print(json.dumps(record), file=metrics)
    if left is not None:
        text = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
        say("  ".join(f"{k} {v}" for k, v in text.items()) + left)


def main(args):
    """One run; each rank runs all of it. Raises UsageError for a mistake."""
    # the mesh and the data
    small = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)
    sizes = {"img_size": 224, **MODELS.get(args.model, small)}
    sizes.update({name: n for name, n in vars(args).items() if name in sizes and n})
    mesh = args.data_parallel, args.tensor_parallel, args.pipeline_parallel
    dist.setup(*mesh, sizes["depth"], args.shard_params, args.sequence_parallel)
    data_set = FolderImages if args.data else SyntheticImages
    val = data_set("val", sizes["img_size"], args)
    train = val if args.eval_only else data_set("train", sizes["img_size"], args)
    require(train.classes == val.classes, f"--data {args.data}: train and val have other classes")
    num_classes = args.num_classes or len(val.classes)
    require(num_classes >= len(val.classes), f"--num-classes: below {len(val.classes)} folders")
    sizes.update(num_classes=num_classes, layer_norm_eps=args.layer_norm_eps)
    batch_size = args.data_parallel * args.accumulation_steps * args.micro_batch_size
    images = 0 if args.eval_only else len(train.targets)
    per_epoch = images // batch_size
    require(per_epoch or args.eval_only, f"a batch of {batch_size} is more than {images} images")
    steps = args.epochs * per_epoch if args.epochs else args.steps or 200
    flags = {name: value for name, value in vars(args).items() if name != "resume"}
    alike = {name: value for name, value in flags.items() if not isinstance(value, Path)}
    alike.update(device=dist.device_type, classes=val.classes)
    alike.update(targets=[list(train.targets), list(val.targets)])
    alike.update(files=[getattr(split, "files", None) for split in (train, val)])
    require_alike(alike)

    # the model
    mixup, loss_func = None, None
    if args.mixup or args.cutmix or args.label_smoothing:  # all that makes labels soft
        loss_func, prob = SoftTargetCrossEntropy(), float(args.mixup > 0 or args.cutmix > 0)
        smoothing = dict(label_smoothing=args.label_smoothing, num_classes=num_classes)
        mixup = Mixup(args.mixup, args.cutmix, prob=prob, **smoothing)
    flow.manual_seed(args.seed)  # of the initial weights
    rates = {name: flags[name] for name in ("drop_rate", "attn_drop_rate", "drop_path_rate")}
    model = VisionTransformer(**sizes, **rates, loss_func=loss_func)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{draw_mesh(dist)}\n{parameters:,} parameters, {batch_size} images a step, {steps} steps")
    held = max(map(sum, weights_held(mesh, args.shard_params, **sizes)))
    size, what = (4, "weights") if args.eval_only else (12, "weights and Adam's states")
    say(f"the fullest process holds {size * held:,} bytes of {what}")
    say(f"images: {images} to train, {len(val.targets)} to validate; {num_classes} classes")
    for split in dict.fromkeys((train, val)):  # one if both are the same
        for name, n in getattr(split, "left_out", Counter()).most_common(9):
            say(f"left out of {split.root}: {n} {name}")
    if args.data and not args.output_dir and not args.eval_only:
        say("nothing is saved, since there is no --output-dir")

    # the folder of this run, and weights from a file
    metrics = open_metrics(args.output_dir) if args.output_dir and dist.rank == 0 else None
    checkpoint = args.output_dir and args.output_dir / "checkpoint.npz"
    is_saved = checkpoint is not None and checkpoint.exists()
    require_alike({f"whether {checkpoint} exists": is_saved})
    may_write = args.resume or args.eval_only or not is_saved
    cure = "--resume goes on from it, or take another --output-dir"
    require(may_write, f"{checkpoint} exists: {cure}")
    run = dict(batch_size=batch_size, steps=steps, sizes=sizes, eager=args.eager)
    run.update(classes=list(map(str, val.classes)), flags=flags)
    if args.eval_only:
        step = load_initial_weights(model, args.init_from, run, args)
        return report(metrics, dict(step=step, **evaluate(model, val, args)), left="")
    run["flags"]["images"] = images  # a change of it is told
    trainer, first_step = Trainer(model, args, steps), 0
    if is_saved:
        first_step = load_checkpoint(trainer, checkpoint, run)
    elif args.init_from:
        load_initial_weights(model, args.init_from, run, args)
    is_validated = False
    if metrics:
        is_validated = cut_metrics(metrics, first_step if is_saved else -1)

    def validate_if_due(step):
        if step == steps or args.eval_every and step % args.eval_every == 0:
            record = dict(step=step, **evaluate(model, val, args), epoch=round(step / per_epoch, 2))
            report(metrics, record, left="")

    if is_saved and not of_rank_0(is_validated):
        validate_if_due(first_step)  # a kill can have come between a checkpoint and its validation

    # the loop
    flow.manual_seed(args.seed + first_step)  # of the masks
    keys = training_keys(images, batch_size, args, first_step, steps)
    batches = load_batches(train, keys, args, mixup)
    save_every, start = args.save_every or max(per_epoch, 100), time.perf_counter()
    if trainer.graph and first_step < steps:
        say("compiling the graph: seconds on one process, half a minute on eight")
    for step, batch in enumerate(batches, first_step + 1):
        loss, lr = trainer.step(*batch)
        require(math.isfinite(loss), f"loss {loss} at step {step}: lower --lr")
        now = time.perf_counter()
        record = dict(step=step, loss=loss, lr=lr, epoch=round(step / per_epoch, 2))
        record["images_per_s"] = round(batch_size / (now - start), 1)
        left = None
        if step == first_step + 1:
            after_first_step, left = now, ""
        elif step % min(max(steps // 20, 1), 100) == 0:
            seconds = (now - after_first_step) / (step - first_step - 1) * (steps - step)
            left = f"  left {timedelta(seconds=int(seconds))}"
        report(metrics, record, left)
        if args.output_dir and (step == steps or step % save_every == 0):
            save_checkpoint(trainer, dict(run, step=step), checkpoint)
        validate_if_due(step)
        start = time.perf_counter()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # leaves nothing to write at the end
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a process at once
    try:
        args = parse_arguments()
        processes = args.data_parallel * args.tensor_parallel * args.pipeline_parallel
        alone = [f"{name} is {n}" for name, n in TASKS.items() if n != "1" and dist.world_size == 1]
        cure = "this task was not told its rank: README has lines for srun and mpirun"
        require(not alone, f"{', '.join(alone)}, and {cure}")
        if processes > 1 and dist.world_size == 1:
            sys.exit(launch(processes, [sys.executable, *sys.argv]))
        main(args)
    except Exception as error:
        exit_code = 2 if isinstance(error, UsageError) else 1
        try:
            time.sleep(min(dist.rank, 9))  # all meet a mistake: rank 0 tells it first
            text = traceback.format_exc()
            if isinstance(error, UsageError):
                # What comes from a reader's process has its traceback in front.
                text = str(error).rpartition("UsageError: ")[2].strip()
            elif isinstance(error, OSError):  # its text has the name, but a full disk gives none
                error.filename = error.filename or args.output_dir and str(args.output_dir)
                text = str(error)
            print(f"train.py: {text}", file=sys.stderr)
        finally:
            os._exit(exit_code)  # the engine's own end would wait for the other ranks
