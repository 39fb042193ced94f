# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer on synthetic images or on folders of images, on any mesh.

python train.py                                         # one process
python train.py --data-parallel 2 --pipeline-parallel 2 # four processes
python train.py --data DIR --model vit_small_patch16_224 --epochs 300 --output-dir out

`main`, at the end, is a whole run. What it calls stands above it, in its order.
"""

import argparse
import ctypes
import json
import math
import os
import random
import signal
import socket
import sys
import time
import traceback
import zlib
from pathlib import Path
from subprocess import Popen

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from vit3d import MODELS, B, S, UsageError, VisionTransformer, batch_to_global, dist, distribute
from vit3d import draw_mesh, flow, full_array, load_timm_state_dict, load_weights, nn, require
from flowvision import datasets
from flowvision.data import Mixup, create_transform
from flowvision.loss.cross_entropy import SoftTargetCrossEntropy
from oneflow.optim import lr_scheduler
from oneflow.utils.data import DataLoader, Dataset

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
        image = 0.5 * self.patterns[self.targets[index]][:, cells][:, :, cells]
        rng = np.random.default_rng([self.seed, self.split == "val", index])
        image = (image + rng.standard_normal(image.shape)).astype(np.float32)
        return key, image, self.targets[index]


class FolderImages(datasets.ImageFolder):
    """Images in ImageNet's layout, DIR/SPLIT/CLASS/*; items as above, augmented for training."""

    def __init__(self, split, img_size, args):
        root, self.seed = str(args.data / split), args.seed
        is_training = split == "train" and not args.no_augment
        try:
            super().__init__(root)
            self.transform = create_transform(
                img_size, is_training=is_training, color_jitter=None, re_mode="pixel",
                auto_augment=args.rand_augment, re_prob=args.random_erasing, mean=args.mean,
                std=args.std, crop_pct=args.crop_pct, interpolation=args.interpolation,
            )
        except (OSError, ValueError, AssertionError) as error:  # of folders, of the policy
            raise UsageError(f"{root}, --rand-augment {args.rand_augment}: {error}") from None

    # Names that begin with a dot are neither classes nor images: .ipynb_checkpoints, ._0.jpg.
    def find_classes(self, root):
        names = [name for name in super().find_classes(root)[0] if name[0] != "."]
        return names, {name: i for i, name in enumerate(names)}

    def make_dataset(self, root, *more):
        samples = super().make_dataset(root, *more)
        return [sample for sample in samples if "/." not in sample[0][len(root) :]]

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
    # FolderImages seeds flow for each image. Here that would repeat the masks of dropout, so its
    # files are read in other processes.
    workers = args.workers if args.data else 0
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
        VisionTransformer.set_pipeline_stage_id(self.model)

    def _generate_config_proto(self):
        # The engine clips each group of parameters by its own norm. A global norm needs one group:
        # this joins both, and names the variables that have no weight decay.
        super()._generate_config_proto()
        groups = self.config.proto.train_conf.optimizer_conf
        rates = {group.base_learning_rate for group in groups}
        error_message = "a graph here takes two groups of one rate: see README 'Make it yours'"
        require(len(groups) == 2 and len(rates) == 1, error_message)
        decay, no_decay = groups
        decay.variable_op_names.extend(no_decay.variable_op_names)
        if decay.HasField("weight_decay_conf"):  # SGD has no such field
            patterns = [f"^{name}$" for name in no_decay.variable_op_names]
            decay.weight_decay_conf.excludes.pattern.extend(patterns)
        del groups[-1]

    def build(self, images, labels):
        losses = self.model(images, labels)["losses"]
        losses.backward()
        return losses


class Trainer:
    """Model, AdamW without decay of biases, norms and embeddings, warm-up and then cosine."""

    def __init__(self, model, args, steps):
        self.model, self.args = model.train(), args
        # A graph's update must wait for all gradients: their norm does. 1e9 clips nothing.
        clip = dict(clip_grad_max_norm=args.clip_grad or 1e9, clip_grad_norm_type=2.0)
        decay = dict(params=[], weight_decay=args.weight_decay, **clip)
        no_decay = dict(params=[], weight_decay=0.0, **clip)
        for name, parameter in model.named_parameters():
            has_decay = parameter.ndim > 1 and name not in model.no_weight_decay()
            (decay if has_decay else no_decay)["params"].append(parameter)
        # Not LAMB where weights are split: it would take the norm of a rank's slice.
        self.optimizer = flow.optim.AdamW([decay, no_decay], lr=args.lr)
        warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps
        require(warmup < steps, f"--warmup-steps {warmup} must be below {steps} steps")
        self.scheduler = lr_scheduler.CosineDecayLR(self.optimizer, steps - warmup)
        if warmup:
            linear = dict(warmup_factor=1 / warmup, warmup_iters=warmup, warmup_prefix=True)
            self.scheduler = lr_scheduler.WarmUpLR(self.scheduler, **linear)
        self.graph = None if args.eager else TrainGraph(self, args)

    def step(self, images, labels):
        """Train on a replica's batch, numpy arrays -> mean loss, learning rate."""
        lr = self.optimizer.param_groups[0]["lr"]
        if self.graph:
            losses = self.graph(batch_to_global(images, 0), batch_to_global(labels, -1))
        else:
            losses = self.eager_step(images, labels)
        self.scheduler.step()  # of eager mode; a graph computes the same rate itself
        return float(full_array(losses).mean()), lr

    def eager_step(self, images, labels):
        n, total = self.args.accumulation_steps, 0
        for image, label in zip(np.split(images, n), np.split(labels, n)):
            losses = self.model(batch_to_global(image, 0), batch_to_global(label, -1))["losses"] / n
            losses.backward()
            total = total + losses.detach()
        nn.utils.clip_grad_norm_(list(self.model.parameters()), self.args.clip_grad or 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


# 3. Evaluation and checkpoints --------------------------------------------------------


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
    length, replicas, size = len(targets), dist.data_parallel_size, args.micro_batch_size
    batches = np.arange(length + -length % (replicas * size)).reshape(-1, replicas, size) % length
    keys = [[(0, int(index)) for index in batch[replica]] for batch in batches]
    scores = []
    model.eval()
    with flow.no_grad():
        for batch, (images, _) in zip(batches, load_batches(data_set, keys, args)):
            logits = full_array(model(batch_to_global(images, 0))["prediction_scores"])
            scores.append(score(logits, targets[batch.flatten()]))
    model.train()
    # The last batch is filled up with images that were counted: [:length] leaves them out.
    means = {k: np.concatenate([part[k] for part in scores])[:length].mean() for k in scores[0]}
    return dict(means, images=length)


def save_checkpoint(trainer, record, path):
    """Write checkpoint.npz: complete, or the one before stays."""
    weights = dict(trainer.model.named_parameters())
    state = trainer.graph.state_dict() if trainer.graph else {}
    state.pop("model", None)  # the weights
    for name, weight in weights.items():  # of eager mode; a graph's optimizer has none
        for kind, tensor in trainer.optimizer._state[weight].items():
            state[f"model.{name}-{kind}"] = tensor  # as a graph names it
    arrays = {"run/record": json.dumps(record)}
    # Sorted: the engine's order can differ on a rank, and `full_array` takes all ranks.
    for name, tensor in [*weights.items(), *sorted(state.items())]:
        array = full_array(tensor)
        require(np.isfinite(array).all(), f"{name} is not finite and is not saved")
        if dist.rank == 0:
            arrays[name if name in weights else f"optimizer/{name}"] = array
    if dist.rank == 0:
        unfinished = path.with_name(f"unfinished-{os.getpid()}.npz")  # of this run alone
        np.savez(unfinished, **arrays)
        unfinished.replace(path)


def read_arrays(path, run):
    """A file's arrays by name, and the record of the run that saved it, {} for others' weights."""
    try:
        arrays = {".npz": np.load, ".safetensors": load_file}[path.suffix](path)
        record = json.loads(str(arrays["run/record"])) if "run/record" in arrays else {}
    except Exception as error:  # another form, not there, damaged, bfloat16
        raise UsageError(f"{path} must be an .npz or .safetensors file: {error}") from None
    for flag, before in record.get("flags", {}).items():
        now = run["flags"].get(flag)
        if before != now and dist.rank == 0:
            print(f"{path}: {flag} was {before} and is {now}")
    return arrays, record


def load_initial_weights(model, path, run, args):
    """Load weights alone, ours or timm's, without a head for other classes. -> their step"""
    arrays, record = read_arrays(path, run)
    same_classes = record.get("classes", run["classes"]) == run["classes"]
    fits = "head.bias" in arrays and arrays["head.bias"].shape == tuple(model.head.bias.shape)
    skip_head = not (same_classes and fits)
    require(not (skip_head and args.eval_only), f"{path}: its head is for other classes")
    if skip_head and dist.rank == 0:
        print(f"{path}: its head is for other classes and is not loaded")
    is_timm = "blocks.0.attn.qkv.weight" in arrays
    (load_timm_state_dict if is_timm else load_weights)(model, arrays, skip_head)
    return record.get("step", 0)


def load_checkpoint(trainer, path, run):
    """Load all that the same run goes on from. -> the step it was saved after"""
    arrays, record = read_arrays(path, run)
    for name in ("batch_size", "steps", "sizes", "eager", "classes"):
        before, now = str(record.get(name)), str(run[name])
        require(before == now, f"{path}: {name} was {before:.500} and must not be {now:.500}")
    load_weights(trainer.model, arrays)
    weights, state = dict(trainer.model.named_parameters()), {}
    first_stage = dist.get_layer_placement(0), dist.get_nd_sbp([B, B])
    for name in sorted(name for name in arrays if name.startswith("optimizer/")):
        # optimizer/model.head.bias-m is head.bias's m. Those of no weight are a graph's counters.
        key = name.removeprefix("optimizer/")
        weight_name, _, kind = key.removeprefix("model.").rpartition("-")
        weight = weights.get(weight_name)
        where = (weight.placement, weight.sbp) if weight is not None else first_stage
        state[key] = distribute(flow.tensor(arrays[name]), *where)
        if not trainer.graph:
            trainer.optimizer._state[weight][kind] = state[key]
    if trainer.graph:
        trainer.graph.load_state_dict(state)
    trainer.optimizer._state["step"] = record["step"]
    while trainer.scheduler.last_step < record["step"]:
        trainer.scheduler.step()
    return record["step"]


# 4. The command -----------------------------------------------------------------------


def parse_arguments(argv=None):
    """The command line. Raises UsageError for what cannot go together."""
    parser = argparse.ArgumentParser(description="Train; sizes are those of --model.")
    parser.error = lambda message: require(False, message)  # in one sentence
    add = parser.add_argument
    add("--data-parallel", type=int, default=1, help="replicas, with a share of a batch each")
    add("--tensor-parallel", type=int, default=1, help="ranks that share each layer")
    add("--pipeline-parallel", type=int, default=1, help="stages, with some layers each")
    add("--shard-params", action="store_true", help="weights split over replicas (ZeRO-3)")
    add("--sequence-parallel", action="store_true", help="tokens split between layers")
    add("--model", choices=MODELS, metavar="NAME", help="(small) " + ", ".join(MODELS))
    for name in "img-size patch-size embed-dim depth num-heads num-classes".split():
        add(f"--{name}", type=int, metavar="N")
    add("--layer-norm-eps", type=float, default=1e-5, help="1e-5: LiBai, 1e-6: timm")
    add("--data", type=Path, metavar="DIR", help="it has train/CLASS/*, val/CLASS/*")
    add("--no-augment", action="store_true", help="train as validated: resized, cropped")
    add("--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406], metavar=tuple("RGB"))
    add("--std", type=float, nargs=3, default=[0.229, 0.224, 0.225], metavar=tuple("RGB"))
    add("--crop-pct", type=float, default=0.875, help="shown of an image's side (%(default)s)")
    add("--interpolation", choices=("bilinear", "bicubic"), default="bilinear")
    add("--rand-augment", metavar="POLICY", help="such as rand-m9-mstd0.5-inc1")
    for name in "drop-rate attn-drop-rate drop-path-rate random-erasing label-smoothing".split():
        add(f"--{name}", type=float, default=0.0, metavar="P", help="probability (%(default)s)")
    for name in ("mixup", "cutmix"):
        add(f"--{name}", type=float, default=0.0, metavar="ALPHA", help="0: none")
    add("--workers", type=int, default=2, help="readers of each process (%(default)s)")
    add("--micro-batch-size", type=int, default=32, help="of a replica (%(default)s)")
    add("--accumulation-steps", type=int, default=1, help="micro-batches (%(default)s)")
    add("--steps", type=int, help="optimizer steps (those of --epochs, or 200)")
    add("--epochs", type=int, help="passes over the training images")
    add("--lr", type=float, default=1e-3, help="highest learning rate (%(default)s)")
    add("--warmup-steps", type=int, help="(a tenth of all steps)")
    add("--weight-decay", type=float, default=0.05, help="of matrices (%(default)s)")
    add("--clip-grad", type=float, default=1.0, help="highest norm; 0: none (%(default)s)")
    add("--activation-checkpoint", action="store_true", help="recompute blocks (graph)")
    add("--eager", action="store_true", help="short runs: no nn.Graph, grows 13-22 kB a step")
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, help="steps from one validation to the next")
    add("--eval-only", action="store_true", help="no training, only --init-from")
    add("--output-dir", type=Path, help="where metrics.jsonl and checkpoint.npz go")
    add("--save-every", type=int, help="steps from one checkpoint to the next (an epoch)")
    add("--resume", action="store_true", help="go on from --output-dir, if it has a checkpoint")
    add("--init-from", type=Path, metavar="FILE", help="ours or timm's, .npz or .safetensors")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = 0 if type(value) is float or name in ("seed", "warmup_steps") else 1
            most = 1 if name in ("random_erasing", "label_smoothing", "crop_pct") else math.inf
            flag = f"--{name.replace('_', '-')} {value}"
            require(least <= value <= most, f"{flag} must be from {least} to {most}")
    is_odd = (args.mixup or args.cutmix or args.label_smoothing) and args.micro_batch_size % 2
    require(not is_odd, "--mixup, --cutmix, --label-smoothing: --micro-batch-size must be even")
    require(not (args.eager and args.activation_checkpoint), "--activation-checkpoint: not --eager")
    require(args.output_dir or not args.resume, "--resume needs --output-dir")
    require(args.init_from or not args.eval_only, "--eval-only needs --init-from")
    return args


def launch(processes, command):
    """Run a command as this many ranks; end all when one ends badly. -> exit code"""
    with socket.create_server(("", 0)) as free:
        address = "127.0.0.1", free.getsockname()[1]
    # The engine would send even 127.0.0.1 through a proxy.
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
    environment.setdefault("OMP_NUM_THREADS", "1")  # a rank is one core's arithmetic
    libc, ranks = ctypes.CDLL(None), []
    for rank in range(processes):
        # If a rank starts before rank 0 listens, the engine lets it sleep for 10 s.
        while ranks and ranks[0].poll() is None and socket.socket().connect_ex(address):
            time.sleep(0.05)
        environment.update(WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank))
        # 1 is PR_SET_PDEATHSIG, 9 SIGKILL: the kernel ends a rank when this process has ended.
        ranks.append(Popen(command, env=environment, preexec_fn=lambda: libc.prctl(1, 9)))
    while None in (codes := [process.poll() for process in ranks]) and not any(codes):
        time.sleep(0.05)
    for process in ranks:
        process.kill()
    code = next(filter(None, codes), 0)
    if code < 0:
        print(f"train.py: a process ended by {signal.Signals(-code).name}", file=sys.stderr)
    return abs(code)


def report(metrics, is_shown, **record):
    """A line of metrics.jsonl and, if it is shown, one of text, both by rank 0."""
    if metrics:
        print(json.dumps(record), file=metrics)
    if is_shown and dist.rank == 0:
        text = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
        print("  ".join(f"{k} {v}" for k, v in text.items()))


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
    steps = args.steps or (args.epochs or 0) * per_epoch or 200
    checkpoint = args.output_dir and args.output_dir / "checkpoint.npz"
    is_saved = checkpoint is not None and checkpoint.exists()
    is_kept = args.resume or args.eval_only or not is_saved
    require(is_kept, f"{checkpoint} exists: --resume goes on from it, or take another --output-dir")
    # All ranks must have the same of these, or labels could shift.
    same = [vars(args), dist.device_type, list(train.targets), list(val.targets), is_saved]
    checksum = flow.tensor([zlib.crc32(repr(same).encode())])
    world = flow.placement("cpu", list(range(dist.world_size)))
    checksums = full_array(checksum.to_global(placement=world, sbp=S(0)))
    require(len(set(checksums)) == 1, "the ranks differ in flags, device or files")

    # the model
    mixup, loss_func = None, None
    if args.mixup or args.cutmix or args.label_smoothing:  # all that makes labels soft
        loss_func, prob = SoftTargetCrossEntropy(), float(args.mixup > 0 or args.cutmix > 0)
        smoothing = dict(label_smoothing=args.label_smoothing, num_classes=num_classes)
        mixup = Mixup(args.mixup, args.cutmix, prob=prob, **smoothing)
    flow.manual_seed(args.seed)  # of the initial weights
    rates = {name: rate for name, rate in vars(args).items() if name.endswith("_rate")}
    model, metrics = VisionTransformer(**sizes, **rates, loss_func=loss_func), None
    if args.output_dir and dist.rank == 0:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path = args.output_dir / "metrics.jsonl"
        metrics = open(path, "a", 1)
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill can cut the last line
    if dist.rank == 0:
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{draw_mesh(dist)}\n{count:,} parameters, {batch_size} images a step, {steps} steps")
        print(f"images: {images} to train, {len(val.targets)} to validate; {num_classes} classes")

    # weights from a file
    flags = {name: str(value) for name, value in vars(args).items()}
    run = dict(batch_size=batch_size, steps=steps, sizes=sizes, eager=args.eager)
    run.update(classes=list(map(str, val.classes)), flags=dict(flags, images=str(images)))
    if args.eval_only:
        step = load_initial_weights(model, args.init_from, run, args)
        return report(metrics, True, step=step, **evaluate(model, val, args))
    trainer, first_step = Trainer(model, args, steps), 0
    if is_saved:
        first_step = load_checkpoint(trainer, checkpoint, run)
    elif args.init_from:
        load_initial_weights(model, args.init_from, run, args)

    # the loop
    flow.manual_seed(args.seed + first_step)  # of the masks
    keys = training_keys(images, batch_size, args, first_step, steps)
    batches = load_batches(train, keys, args, mixup)
    save_every, start = args.save_every or per_epoch, time.perf_counter()
    for step, batch in enumerate(batches, first_step + 1):
        loss, lr = trainer.step(*batch)
        require(math.isfinite(loss), f"loss {loss} at step {step}: lower --lr")
        images_per_s = round(batch_size / (time.perf_counter() - start), 1)
        is_shown = step % min(max(steps // 20, 1), 100) == 0
        report(metrics, is_shown, step=step, loss=loss, lr=lr, images_per_s=images_per_s)
        if args.output_dir and (step == steps or step % save_every == 0):
            save_checkpoint(trainer, dict(run, step=step), checkpoint)
        if step == steps or args.eval_every and step % args.eval_every == 0:
            report(metrics, True, step=step, **evaluate(model, val, args))
        start = time.perf_counter()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # leaves nothing to write at the end
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a process at once
    try:
        args = parse_arguments()
        processes = args.data_parallel * args.tensor_parallel * args.pipeline_parallel
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
        error_message = f"{tasks} tasks of Slurm, each alone: README has the line for srun"
        require(tasks == 1 or dist.world_size > 1, error_message)
        if processes > 1 and dist.world_size == 1:
            sys.exit(launch(processes, [sys.executable, *sys.argv]))
        main(args)
    except Exception as error:
        exit_code = 2 if isinstance(error, UsageError) else 1
        try:
            time.sleep(min(dist.rank, 9))  # all meet a mistake: rank 0 tells it first
            # What comes from a reader's process has its traceback in front.
            text = "train.py: " + str(error).rpartition("UsageError: ")[2].strip()
            print(text if exit_code == 2 else traceback.format_exc(), file=sys.stderr)
        finally:
            os._exit(exit_code)  # the engine's own end would wait for the other ranks
