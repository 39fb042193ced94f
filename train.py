# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer on synthetic images or on folders of images, on any mesh.

python train.py                                                               # one process
python train.py --data-parallel 2 --tensor-parallel 2 --pipeline-parallel 2   # 8 processes
python train.py --data DIR --model vit_small_patch16_224 --epochs 300 --output-dir runs/s16
python train.py --help

`run`, near the end, is a whole run: start there. What it calls stands above it, in the order in
which a run needs it; how a run ends stands below.
"""

import argparse
import contextlib
import ctypes
import fcntl
import itertools
import json
import math
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vit3d import MODELS, B, S, VisionTransformer, batch_to_global, dist, distribute, flow
from vit3d import load_timm_state_dict, load_weights, nn, require, whole
from flowvision import datasets, transforms
from flowvision.data import Mixup, create_transform
from flowvision.loss.cross_entropy import SoftTargetCrossEntropy

# flowvision's own create_transform passes what its Resize warns of.
warnings.filterwarnings("ignore", "Argument interpolation should be")
warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels

DEMO = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)

# The flags that change the course of a run: a checkpoint keeps them, and a resume compares them.
COURSE = "seed lr warmup_steps weight_decay clip_grad".split()
COURSE += "drop_rate attn_drop_rate drop_path_rate no_augment rand_augment".split()
COURSE += "random_erasing mixup cutmix label_smoothing".split()

MODEL = "num_heads", "layer_norm_eps"  # what the shapes of weights do not tell

# 1. Arguments -----------------------------------------------------------------------------------


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float in [low, high)."""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            bounds = f"at least {low}" + f" and below {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text!r} must be {bounds}")
        return value

    parse.__name__ = kind.__name__  # for argparse: "invalid float value: 'fast'"
    return parse


def parse_arguments(argv=None):
    """The command line; nothing changes it afterwards. ValueError for what cannot go together."""
    count, rate, zero_up = number(int, 1), number(float, 0, 1), number(float, 0)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="(): the default. Sizes not given are those of --model, or of a small ViT.",
    )
    parser.error = lambda message: require(False, message)  # a sentence, as for all mistakes
    add = parser.add_argument_group("mesh").add_argument
    add("--data-parallel", type=count, default=1, help="replicas, each with its share of a batch")
    add("--tensor-parallel", type=count, default=1, help="processes that share each layer")
    add("--pipeline-parallel", type=count, default=1, help="stages, each with some of the layers")
    add("--shard-params", action="store_true", help="split weights over the replicas (ZeRO-3)")
    add("--sequence-parallel", action="store_true", help="split tokens between layers, too")
    add("--device", choices=["cpu", "cuda"], help="(cuda where it can run, else cpu)")
    add("--nnodes", type=count, default=1, help="machines; run the command once on each")
    add("--node-rank", type=number(int, 0), default=0, help="which of the machines this is")
    add("--master-addr", help="address of machine 0 (this machine)")
    add("--master-port", type=number(int, 1, 65536), help="free port there (chosen)")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    for name in ("img-size", "patch-size", "embed-dim", "depth", "num-heads", "num-classes"):
        add(f"--{name}", type=count, metavar="N")
    add("--layer-norm-eps", type=zero_up, default=1e-5, help="(LiBai's 1e-5; timm's is 1e-6)")
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
    add("--workers", type=count, default=2, help="readers of each process (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--micro-batch-size", type=count, default=32, help="images, of a replica (%(default)s)")
    add("--accumulation-steps", type=count, default=1, help="micro-batches a step (%(default)s)")
    add("--steps", type=count, help="optimizer steps (200, or those of --epochs)")
    add("--epochs", type=count, help="passes over the training images")
    add("--lr", type=zero_up, default=1e-3, help="highest learning rate (%(default)s)")
    add("--warmup-steps", type=number(int, 0), help="(a tenth of all steps)")
    add("--weight-decay", type=zero_up, default=0.05, help="not of biases, norms (%(default)s)")
    add("--clip-grad", type=zero_up, default=1.0, help="highest norm; 0: none (%(default)s)")
    add("--activation-checkpoint", action="store_true", help="recompute blocks (less memory: CUDA)")
    add("--amp", action="store_true", help="half precision (CUDA)")
    add("--eager", action="store_true", help="run without nn.Graph")
    add("--seed", type=number(int, 0, 2**31), default=0)
    add = parser.add_argument_group("output").add_argument
    add("--eval-every", type=count, help="steps between validations; there is one at the end")
    add("--eval-only", action="store_true", help="validate the weights of --init-from, --resume")
    add("--output-dir", type=Path, help="where metrics.jsonl and checkpoints go")
    add("--save-every", type=count, help="steps between checkpoints; there is one at the end")
    add("--keep", type=count, default=2, help="newest checkpoints that stay (%(default)s)")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --output-dir")
    add("--init-from", type=Path, metavar="PATH", help="start from the weights of a checkpoint")
    args = parser.parse_args(argv)

    args.processes = args.data_parallel * args.tensor_parallel * args.pipeline_parallel
    address = args.master_addr and args.master_port
    weights = args.resume or args.init_from
    pairs = args.mixup or args.cutmix or args.label_smoothing
    for wrong, message in (
        (args.processes % args.nnodes, f"--nnodes must divide {args.processes} processes"),
        (args.node_rank >= args.nnodes, f"--node-rank {args.node_rank} must be below --nnodes"),
        (args.nnodes > 1 and not address, "--nnodes needs --master-addr and --master-port"),
        (args.steps and args.epochs, "--steps and --epochs: give one of them"),
        (pairs and args.micro_batch_size % 2, "soft labels take an even --micro-batch-size"),
        (args.eager and args.amp, "--amp needs the graph: leave out --eager"),
        (args.eager and args.activation_checkpoint, "--activation-checkpoint needs the graph"),
        (args.resume and not args.output_dir, "--resume needs --output-dir"),
        (args.save_every and not args.output_dir, "--save-every needs --output-dir"),
        (args.resume and args.init_from, "--resume and --init-from: give one of them"),
        (args.eval_only and not weights, "--eval-only needs --init-from or --resume"),
    ):
        require(not wrong, message)
    return args


# 2. Processes -----------------------------------------------------------------------------------


def launch(args, command):
    """Run a command as this machine's ranks, rank 0 first; end all when one ends badly.

    A rank that finds a mistake writes `CODE SENTENCE` to a pipe; the first one is printed. Returns
    the exit code.
    """
    per_node = args.processes // args.nnodes
    try:
        address = socket.gethostbyname(args.master_addr or "127.0.0.1")
    except OSError as error:
        raise ValueError(f"--master-addr {args.master_addr} is no address: {error}") from None
    with socket.create_server(("", 0)) as free:
        port = args.master_port or free.getsockname()[1]
    told, tell = os.pipe()
    environment = {
        "OMP_NUM_THREADS": "1",  # a rank is one core's arithmetic
        **os.environ,
        "WORLD_SIZE": str(per_node * args.nnodes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "VIT3D_LAUNCHER": str(tell),
    }
    if args.nnodes > 1:
        print(f"waiting for rank 0 at {address}:{port}", flush=True)
    libc, ranks, codes = ctypes.CDLL(None), [], []
    try:
        for local_rank in range(per_node):
            rank = args.node_rank * per_node + local_rank
            # A rank that starts before rank 0 listens sleeps 10 s in the engine: wait for its port.
            while rank > 0 and not any(process.poll() for process in ranks):
                with contextlib.suppress(OSError):
                    socket.create_connection((address, port), timeout=1).close()
                    break
                time.sleep(0.05)
            process = subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
                pass_fds=[tell],
                start_new_session=True,  # Ctrl-C reaches the launcher alone
                # However the launcher dies, the ranks die with it: 1 is PR_SET_PDEATHSIG.
                preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),
            )
            ranks.append(process)
        while None in codes or not codes:
            codes = [process.poll() for process in ranks]
            if select.select([told], [], [], 0.1)[0]:
                code, sentence = os.read(told, 65536).decode().splitlines()[0].split(" ", 1)
                print(sentence, file=sys.stderr)
                time.sleep(args.nnodes > 1)  # so that the other machines find it and tell it, too
                return int(code)
            if any(codes):
                code = next(filter(None, codes))
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                print(f"train.py: a process ended by {name}, and with it the run", file=sys.stderr)
                return 1
        return 0
    finally:
        # All are stopped before one is killed: a rank that sees another end aborts with a trace.
        for each, process in itertools.product((signal.SIGSTOP, signal.SIGKILL), ranks):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, each)  # and the processes that read images for it
        for process in ranks:
            process.wait()


# 3. Data ----------------------------------------------------------------------------------------


class Images(flow.utils.data.Dataset):
    """What all data sets share. Each adds `img_size`, `num_classes`, `labels`, a class for each
    sample, and `image(index, epoch)`, an array (3, img_size, img_size) that depends on the seed,
    the split and these two alone.
    """

    listing = 0  # a number that tells which files there are

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        """(epoch, index) -> key, image, label, and what is wrong with its file or None.

        Only the first stage reads images.
        """
        epoch, index = key
        image, wrong = np.zeros((3, self.img_size, self.img_size), np.float32), None
        if dist.get_coordinates()[0] == 0:
            try:
                image = self.image(index, epoch)
            except Exception as error:  # decoders meet damaged files with many kinds of them
                wrong = f"{self.folder.samples[index][0]} cannot be read as an image: {error}"
        return key, image, self.labels[index], wrong


class SyntheticImages(Images):
    """Class-dependent patterns under noise; an image is a function of seed, split and index."""

    def __init__(self, split, length, num_classes, img_size, seed):
        self.split, self.num_classes, self.img_size, self.seed = split, num_classes, img_size, seed
        self.labels = np.arange(length) % num_classes
        self.patterns = np.random.default_rng(seed).standard_normal((num_classes, 3, 4, 4))

    def image(self, index, epoch):
        rng = np.random.default_rng([self.seed, self.split == "val", index])
        size, scale = self.img_size, math.ceil(self.img_size / 4)
        pattern = self.patterns[self.labels[index]].repeat(scale, 1).repeat(scale, 2)
        pattern = pattern[:, :size, :size]
        return (0.5 * pattern + rng.standard_normal(pattern.shape)).astype(np.float32)


def open_image(path):
    """Decode a file by the format that its extension names, whatever its content says it is."""
    suffix = Path(path).suffix.lower()
    with Image.open(path, formats=[Image.registered_extensions()[suffix]]) as image:
        return image.convert("RGB")


class FolderImages(Images):
    """Images in ImageNet's layout, augmented by a function of the seed, the epoch and the index."""

    def __init__(self, split, img_size, args):
        root = args.data / split
        require(root.is_dir(), f"--data {args.data} must hold a folder {split}: {root} is missing")
        try:
            self.folder = datasets.ImageFolder(str(root), loader=open_image)
        except FileNotFoundError as error:  # no class folder, or a class without images
            raise ValueError(f"{root}: {str(error).split('Supported')[0].strip()}") from None
        self.labels, folders = self.folder.targets, len(self.folder.classes)
        self.img_size, self.seed = img_size, args.seed
        self.num_classes = args.num_classes or folders
        few = f"--num-classes {self.num_classes} is below the {folders} folders"
        require(self.num_classes >= folders, few)
        names = [os.path.relpath(path, root) for path, _ in self.folder.samples]
        self.listing = zlib.crc32("\n".join(names).encode())
        if args.no_augment:
            resize = transforms.Resize((img_size, img_size))
            normalize = create_transform(img_size).transforms[-2:]
            self.transform = transforms.Compose([resize, *normalize])
            return
        try:
            self.transform = create_transform(
                img_size, is_training=split == "train", color_jitter=None,
                auto_augment=args.rand_augment, re_prob=args.random_erasing, re_mode="pixel",
            )
        except AssertionError:
            policy = f"--rand-augment {args.rand_augment!r}"
            raise ValueError(f"{policy} must be a policy such as rand-m9-mstd0.5-inc1") from None

    def image(self, index, epoch):
        seed = seed_of(self.seed, epoch, index)  # flowvision's transforms draw from all of these
        for draw in (random.seed, np.random.seed, flow.manual_seed):
            draw(seed)
        return self.transform(self.folder.loader(self.folder.samples[index][0])).numpy()


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def data_sets(args, img_size):
    """The training and the validation images."""
    if not args.data:
        sizes = args.num_classes or 10, img_size, args.seed
        return SyntheticImages("train", 4096, *sizes), SyntheticImages("val", 1000, *sizes)
    train, val = (FolderImages(split, img_size, args) for split in ("train", "val"))
    odd = sorted(set(train.folder.classes) ^ set(val.folder.classes))
    require(not odd, f"{args.data}: train and val must hold the same classes, not {odd}")
    return train, val


def training_keys(length, batch_size, args, first_step, last_step):
    """This replica's keys of each step, shuffled by epoch.

    Micro-batch i of a step holds the same samples on every mesh.
    """
    replicas, replica = dist.data_parallel_size, dist.get_data_parallel_rank()
    steps_per_epoch = length // batch_size
    for step in range(first_step, last_step):
        epoch, position = divmod(step, steps_per_epoch)
        if step == first_step or position == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(length)
        batch = order[position * batch_size :][:batch_size]
        # (batch,) -> (micro-batches, replicas, images) -> (micro-batches * images,)
        mine = batch.reshape(args.accumulation_steps, replicas, -1)[:, replica].flatten()
        yield [(epoch, int(index)) for index in mine]


def load(data_set, keys, args, mixup=None):
    """Yield numpy batches, images (b, 3, h, w) and labels (b,), for lists of keys.

    With mixup, labels are (b, num_classes). It mixes pairs of neighbours, each with its own draw,
    so that all ranks of a replica, and replicas of other sizes, see the same mix. Raises
    ValueError for a file that is not an image.
    """

    def collate(samples):
        own_keys, images, labels, wrong = zip(*samples)
        images, labels = np.stack(images), np.array(labels)
        if mixup is not None:
            pairs = []
            for i in range(0, len(own_keys), 2):
                np.random.seed(seed_of(args.seed, *own_keys[i], 1))
                pairs.append(mixup(flow.tensor(images[i : i + 2]), flow.tensor(labels[i : i + 2])))
            images, labels = (np.concatenate([t.numpy() for t in part]) for part in zip(*pairs))
        return images, labels, [each for each in wrong if each]

    # Files are read in other processes: `image` seeds the generator that masks draw from.
    workers = args.workers if args.data else 0
    loader = flow.utils.data.DataLoader(
        data_set, batch_sampler=keys, num_workers=workers, collate_fn=collate
    )
    for images, labels, wrong in loader:
        if wrong:
            raise ValueError(wrong[0])
        yield images, labels


# 4. The step ------------------------------------------------------------------------------------


class AdamW(flow.optim.AdamW):
    """The engine's AdamW on two parameter groups, with and without weight decay.

    Its methods hold every private name of the engine that this script needs. A graph counts its own
    steps and, under AMP, scales the loss: a step whose gradients overflow is not counted.
    """

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        # A graph clips each group by the norm of its own gradients. Clipping by the global norm
        # takes one group, from whose decay the engine excludes variables by name.
        decay, no_decay = super()._generate_conf_for_graph(train_conf, vars_conf)
        decay.variable_op_names.extend(no_decay.variable_op_names)
        decay.weight_decay_conf.excludes.pattern.extend(
            f"^{name}$" for name in no_decay.variable_op_names
        )
        del train_conf.optimizer_conf[-1]
        return [decay]

    def tensors(self, model, graph):
        """All that a checkpoint holds: weights by name, their moments as `adam/m/NAME` and
        `adam/v/NAME`, and what a graph counts as `engine/NAME`.
        """
        state, tensors = graph.state_dict() if graph else {}, dict(model.named_parameters())
        for name, weight in model.named_parameters():
            for m, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                moment = state[f"model.{name}-{m}"] if graph else self._state[weight][key]
                tensors[f"adam/{m}/{name}"] = moment
        for name in sorted(name for name in state if name.startswith("System-Train-")):
            tensors[f"engine/{name}"] = state[name]
        return tensors

    def load(self, model, graph, arrays, step):
        """The inverse, before a graph's first step; return how many steps were counted."""
        load_weights(model, arrays)
        on_first = dist.get_layer_placement(0), dist.get_nd_sbp([B, B])
        engine = {"engine/System-Train-TrainStep": np.array([step])}
        engine.update({name: arrays[name] for name in arrays if name.startswith("engine/")})
        state = {"model": model.state_dict()}
        for name, array in engine.items():
            state[name[len("engine/") :]] = distribute(flow.tensor(array), *on_first)
        for name, weight in model.named_parameters():
            m, v = (flow.tensor(arrays[f"adam/{m}/{name}"]) for m in "mv")
            m, v = (distribute(moment, weight.placement, weight.sbp) for moment in (m, v))
            state[f"model.{name}-m"], state[f"model.{name}-v"] = m, v
            self._state[weight].update(exp_avg=m, exp_avg_sq=v)
        self._state["step"] = step
        if graph:
            graph.load_state_dict(state)
        return int(engine["engine/System-Train-TrainStep"][0])

    def amp(self, graph):
        """{"amp_step", "amp_scale"}: a graph's step and the scale of its loss."""
        state = graph.state_dict()
        step = whole(state["System-Train-TrainStep"])
        scale = whole(state["System-Train-DynamicLossScale-LossScale"])
        return dict(amp_step=int(step[0]), amp_scale=float(scale[0]))


class TrainGraph(nn.Graph):
    """Forward, backward and update of one step, compiled into one static graph.

    With gradient accumulation the engine cuts its inputs into micro-batches; with stage ids it
    overlaps these in the pipeline, as in 1F1B.
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

    def __init__(self, model, args, steps):
        """AdamW without decay on biases, norms, cls_token and pos_embed; warm-up, then cosine."""
        self.model, self.args = model.train(), args
        groups = {True: [], False: []}
        for name, parameter in model.named_parameters():
            groups[parameter.ndim > 1 and name not in model.no_weight_decay()].append(parameter)
        # A graph that accumulates and does not clip updates weights that a backward pass still
        # reads: there is always a norm to wait for, and 1e9 clips nothing.
        clip = dict(clip_grad_max_norm=args.clip_grad or 1e9, clip_grad_norm_type=2.0)
        decay = dict(params=groups[True], weight_decay=args.weight_decay, **clip)
        no_decay = dict(params=groups[False], weight_decay=0.0, **clip)
        self.optimizer = AdamW([decay, no_decay], lr=args.lr)
        warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps
        require(warmup < steps, f"--warmup-steps {warmup} must be below all {steps} steps")
        schedules = flow.optim.lr_scheduler
        self.scheduler = schedules.CosineDecayLR(self.optimizer, steps - warmup)
        if warmup:
            self.scheduler = schedules.WarmUpLR(
                self.scheduler, warmup_factor=1 / warmup, warmup_iters=warmup, warmup_prefix=True
            )
        graph = None if args.eager else TrainGraph(model, self.optimizer, self.scheduler, args)
        self.graph = graph

    def step(self, images, labels):
        """A replica's batch as numpy -> mean loss, and what else to report."""
        seen = dict(lr=self.optimizer.param_groups[0]["lr"])
        if self.graph:
            losses = self.graph(batch_to_global(images, 0), batch_to_global(labels, -1))
        else:
            losses = self.eager_step(images, labels)
        if self.args.amp:  # not run: no GPU was at hand
            seen.update(self.optimizer.amp(self.graph))
        self.schedule(seen.get("amp_step", self.scheduler.last_step + 1))
        return float(whole(losses).mean()), seen

    def schedule(self, step):
        """Set the learning rate for a step. A graph computes its own: there it is only reported."""
        while self.scheduler.last_step < step:
            self.scheduler.step()

    def eager_step(self, images, labels):
        n, total = self.args.accumulation_steps, 0
        for image, label in zip(np.split(images, n), np.split(labels, n)):
            losses = self.model(batch_to_global(image, 0), batch_to_global(label, -1))["losses"] / n
            losses.backward()
            total = total + losses.detach()
        if self.args.clip_grad:
            nn.utils.clip_grad_norm_(list(self.model.parameters()), self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def load(self, arrays, step):
        """Go on from the arrays of a checkpoint after this many steps."""
        self.schedule(self.optimizer.load(self.model, self.graph, arrays, step))


# 5. Evaluation ----------------------------------------------------------------------------------


def evaluate(model, images, args):
    """Mean loss, top-1 and top-5 accuracy over all images, each counted once.

    Of equal logits the first class is the best, and a sample with NaN is wrong.
    """
    start, length = time.perf_counter(), len(images)
    size, replica = args.micro_batch_size, dist.get_data_parallel_rank()
    batches = np.arange(length + -length % (dist.data_parallel_size * size))
    batches = batches.reshape(-1, dist.data_parallel_size, size)  # the last is filled up
    keys = [[(0, int(index) % length) for index in batch[replica]] for batch in batches]
    losses, hits = [], []
    model.eval()
    with flow.no_grad():
        for batch, (mine, _) in zip(batches, load(images, keys, args)):
            logits = whole(model(batch_to_global(mine, 0))["prediction_scores"])  # of all replicas
            labels = np.array([images.labels[index] for index in batch.flatten() if index < length])
            logits = logits[: len(labels)].astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            true = np.take_along_axis(logits, labels[:, None], 1)
            losses.extend(np.log(np.exp(logits).sum(1)) - true[:, 0])
            best = np.argsort(-logits, 1, kind="stable")[:, :5]
            hits.extend((best == labels[:, None]) & ~np.isnan(true))
    model.train()
    top1, top5 = np.mean([hit[0] for hit in hits]), np.mean(np.sum(hits, 1))
    speed = round(length / (time.perf_counter() - start), 1)
    return dict(
        val_loss=np.mean(losses), top1=top1, top5=top5, images=length, val_images_per_s=speed
    )


# 6. Checkpoints ---------------------------------------------------------------------------------


def save(trainer, step, about, args):
    """Write `step-N.npz`: whole arrays, which know no mesh, and `about/run`, what the run is.

    Complete or absent: it reaches the disk under another name, then gets its own; only then older
    ones go.
    """
    arrays = {}
    for name, tensor in trainer.optimizer.tensors(trainer.model, trainer.graph).items():
        array = whole(tensor)
        if not np.isfinite(array).all():
            fail(f"{name} is not finite after step {step}, which is not saved", code=1)
        if dist.rank == 0:
            arrays[name] = array
    if dist.rank > 0:
        return
    beside, path = args.output_dir / "unfinished.npz", args.output_dir / f"step-{step:08d}.npz"
    with open(beside, "wb") as file:
        np.savez(file, **{"about/run": json.dumps(dict(about, step=step))}, **arrays)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(args.output_dir, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    older = sorted(each for each in args.output_dir.glob("step-*.npz") if each.name < path.name)
    for each in older[::-1][args.keep - 1 :]:
        each.unlink()


DAMAGED = OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error


def open_arrays(path):
    """An .npz file, whose arrays are read when asked for."""
    try:
        arrays = np.load(path)
    except DAMAGED as error:
        raise ValueError(f"{path} must be an .npz file: {error}") from None
    require(isinstance(arrays, np.lib.npyio.NpzFile), f"{path} must be an .npz file")
    return arrays


def read_arrays(path, arrays, about, compared):
    """All arrays by name, and after which step they were saved; weights alone have no step."""
    try:
        arrays = {name: arrays[name] for name in arrays}
    except DAMAGED as error:
        cure = "take another, or delete it to resume from the one before"
        raise ValueError(f"{path} is damaged: {error}; {cure}") from None
    if "about/run" not in arrays:
        return arrays, None
    there = json.loads(str(arrays["about/run"]))
    other = [key for key in compared if there.get(key) != about[key]]
    other = [f"{key} was {there.get(key)} and is {about[key]}" for key in other]
    require(not other, f"{path} is of another run: {'; '.join(other)}")
    return arrays, there["step"]


def start_from(trainer, about, args):
    """Load the weights of --init-from, or go on from the newest checkpoint that opens.

    Returns the step that it was saved after. Raises ValueError for a checkpoint of another run.
    """
    if args.init_from:
        arrays, _ = read_arrays(args.init_from, open_arrays(args.init_from), about, MODEL)
        timm = "blocks.0.attn.qkv.weight" in arrays
        (load_timm_state_dict if timm else load_weights)(trainer.model, arrays)
    checkpoints = sorted(args.output_dir.glob("step-*.npz")) if args.output_dir else []
    require_agreement([path.name for path in checkpoints])
    if not args.resume:
        there = f"{args.output_dir} holds checkpoints already: --resume goes on from the newest"
        require(args.eval_only or not checkpoints, there)
        return 0
    for path in reversed(checkpoints):
        try:
            arrays = open_arrays(path)
        except ValueError as error:
            if dist.rank == 0:
                print(f"train.py: skipped: {error}", file=sys.stderr)
            continue
        arrays, step = read_arrays(path, arrays, about, MODEL if args.eval_only else about)
        require(step, f"{path} is no checkpoint: --init-from takes weights alone")
        trainer.load(arrays, step)
        if dist.rank == 0:
            print(f"resuming from {path}")
        return step
    require(not args.eval_only, f"--eval-only needs a checkpoint: {args.output_dir} holds none")
    if dist.rank == 0:
        print(f"no checkpoint in {args.output_dir}: from the start")
    return 0


# 7. The run -------------------------------------------------------------------------------------


def build_model(args, sizes, num_classes):
    """The model, whose initial weights depend on the seed alone, and Mixup or None.

    Mixup here is all that makes labels soft: Mixup, CutMix and label smoothing.
    """
    mixup = None
    if args.mixup or args.cutmix or args.label_smoothing:
        mixup = Mixup(
            args.mixup, args.cutmix, prob=float(args.mixup > 0 or args.cutmix > 0),
            label_smoothing=args.label_smoothing, num_classes=num_classes,
        )
    flow.manual_seed(args.seed)
    model = VisionTransformer(
        **sizes, drop_rate=args.drop_rate, attn_drop_rate=args.attn_drop_rate,
        drop_path_rate=args.drop_path_rate, num_classes=num_classes,
        loss_func=SoftTargetCrossEntropy() if mixup else None, layer_norm_eps=args.layer_norm_eps,
    )
    return model, mixup


def require_agreement(*what):
    """Raise ValueError unless all ranks hold the same: machines can differ in files and flags."""
    number = flow.tensor([zlib.crc32(repr((dist.device_type, *what)).encode())])
    everyone = flow.placement("cpu", dist.ranks.flatten().tolist())  # whatever device each chose
    numbers = number.to_global(placement=everyone, sbp=S(0)).to_global(sbp=B).to_local().numpy()
    require(len(set(numbers)) == 1, "machines differ in files, flags or device")


def open_metrics(args):
    """metrics.jsonl, to which lines are only ever appended; ValueError if a run writes to it."""
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        metrics = open(args.output_dir / "metrics.jsonl", "a", buffering=1)
        fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run writes to --output-dir {args.output_dir}") from None
    except OSError as error:
        raise ValueError(f"--output-dir {args.output_dir} cannot be used: {error}") from None
    return metrics


def describe(model, batch_size, steps):
    """Print the mesh, the model's size and what a step is."""
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    if dist.rank == 0:
        print(f"{dist}\n{count:,} parameters, of which rank 0 holds {held:,}")
        print(f"{batch_size} images a step, {steps} steps", flush=True)


def report(bar, metrics, show, **record):
    """A line of metrics.jsonl and, if `show`, one of text, both by rank 0."""
    if metrics:
        print(json.dumps(record), file=metrics)
    if show and dist.rank == 0:
        text = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()]
        bar.write("  ".join(text), file=sys.stdout)
        sys.stdout.flush()


def last_report(seconds, batch_size):
    """Print the median time of a step and the peak memory of this process, rank 0."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    text = f"peak memory of rank 0: {memory:.2f} GB"
    if seconds:
        median = np.median(seconds[1:] or seconds)  # the first step compiles the graph
        text = f"step: median {1e3 * median:.1f} ms, {batch_size / median:.1f} images/s; {text}"
    if dist.rank == 0:
        print(text)


def run(args):
    """One run, from the mesh to the last report. Raises ValueError for a user's mistake."""
    sizes = {"img_size": 224, **(MODELS[args.model] if args.model else DEMO)}
    for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads"):
        sizes[name] = getattr(args, name) or sizes[name]
    dist.setup(
        args.data_parallel, args.tensor_parallel, args.pipeline_parallel, sizes["depth"],
        device_type=args.device, shard_params=args.shard_params,
        sequence_parallel=args.sequence_parallel,
    )
    require(not args.amp or dist.device_type == "cuda", f"--amp needs CUDA: {dist.no_cuda}")
    train, val = data_sets(args, sizes["img_size"])
    batch_size = args.data_parallel * args.accumulation_steps * args.micro_batch_size
    per_epoch = len(train) // batch_size
    require(per_epoch, f"a batch of {batch_size} images is more than the {len(train)} there are")
    steps = args.steps or (args.epochs * per_epoch if args.epochs else 200)
    require_agreement({**vars(args), "node_rank": 0, "data": 0}, train.listing, val.listing)
    model, mixup = build_model(args, sizes, train.num_classes)
    trainer = Trainer(model, args, steps)
    metrics = open_metrics(args) if args.output_dir and dist.rank == 0 else None
    about = dict(batch_size=batch_size, steps=steps, train=train.listing, val=val.listing)
    about.update(num_heads=sizes["num_heads"], layer_norm_eps=args.layer_norm_eps)
    about.update({flag: getattr(args, flag) for flag in COURSE})
    first_step = start_from(trainer, about, args)

    describe(model, batch_size, steps)
    bar = tqdm(total=steps, initial=first_step, disable=dist.rank > 0 or not sys.stderr.isatty())
    if args.eval_only:
        report(bar, metrics, True, step=first_step, **evaluate(model, val, args))
        return last_report([], batch_size)
    flow.manual_seed(args.seed + first_step)  # of the masks: a graph draws their seeds when built
    keys = training_keys(len(train), batch_size, args, first_step, steps)
    seconds, overflows, start = [], 0, time.perf_counter()
    for step, batch in enumerate(load(train, keys, args, mixup), first_step + 1):
        loss, seen = trainer.step(*batch)
        overflows = 0 if math.isfinite(loss) else overflows + 1
        if overflows > 10 * args.amp:  # under AMP the engine leaves the step out and scales less
            fail(f"the loss is {loss} at step {step}, learning rate {seen['lr']:.3g}", code=1)
        seconds.append(time.perf_counter() - start)
        seen["images_per_s"] = round(batch_size / seconds[-1], 1)
        line = bar.disable and step % max(steps // 20, 1) == 0
        report(bar, metrics, line, step=step, loss=loss, **seen)
        bar.set_postfix(loss=f"{loss:.4f}", **seen)
        bar.update()
        if step == steps or (args.eval_every and step % args.eval_every == 0):
            report(bar, metrics, True, step=step, **evaluate(model, val, args))
        if args.output_dir and (step == steps or args.save_every and step % args.save_every == 0):
            save(trainer, step, about, args)
        start = time.perf_counter()
    bar.close()
    last_report(seconds, batch_size)


# 8. The end -------------------------------------------------------------------------------------


def fail(message, code=2):
    """End the run on all ranks, with one sentence and an exit code."""
    sys.stdout.flush()
    sentence = "train.py: " + " ".join(str(message).split())
    if "VIT3D_LAUNCHER" in os.environ:
        os.write(int(os.environ["VIT3D_LAUNCHER"]), f"{code} {sentence}\n".encode())
        time.sleep(60)  # until the launcher ends it: the others abort on a closed connection
    # Under another launcher: most mistakes are found by all ranks, and the first one tells.
    time.sleep(3 * int(os.environ.get("LOCAL_RANK", 0)))
    print(sentence, file=sys.stderr, flush=True)
    os._exit(code)  # at once: a clean exit would wait for the other ranks


def main():
    try:
        args = parse_arguments()
        if args.processes > 1 and dist.world_size == 1:
            # The engine ends a process at once on Ctrl-C; so `launch` comes to end its ranks first.
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, lambda number, frame: sys.exit(128 + number))
            sys.exit(launch(args, [sys.executable, *sys.argv]))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
        run(args)
    except ValueError as error:  # a user's mistake
        fail(error)
    except OSError as error:  # a full disk
        fail(error, code=1)
    except Exception as error:
        traceback.print_exc()
        fail(f"rank {dist.rank} stopped with {type(error).__name__}", code=1)


if __name__ == "__main__":
    main()
