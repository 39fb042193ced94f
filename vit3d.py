# SPDX-License-Identifier: Apache-2.0
"""A Vision Transformer with data, tensor and pipeline parallelism, in one file, on OneFlow.

The whole idea: a tensor is *global*. It has one shape, a `placement` (the processes that hold it,
as a mesh of one or two axes) and an `sbp` entry for each axis, which says how they hold it:

    S(i)  split: each process holds a slice along dimension i
    B     broadcast: each process holds all of it
    P     partial: each process holds a summand, the tensor is their sum

Operators work on global tensors. `x.to_global(sbp=new, grad_sbp=old)` moves x from one sbp to
another, and in the backward pass its gradient back (to B where old is P: each summand has the
gradient of the sum). The engine finds the communication for it, such as an all-reduce.
`x.to_global(placement=...)` sends x to other processes. On a local tensor `to_global` declares:
this is my part of a global tensor. Along an axis that is B the first process's values are taken.

Arguments have one order everywhere: data, tensor, pipeline. An sbp such as [S(0), B] has an entry
for the data-parallel axis, then one for the tensor-parallel axis. The pipeline has no entry: each
stage has a placement of its own. Every process runs the whole program, and skips operators on
tensors that it does not hold. A rank is the number of a process.

Sources: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv:2010.11929), called "the
paper"; LiBai's tutorial "Detailed instruction on building Vision Transformer models", called
"LiBai", whose names are kept; "Megatron-LM" (Shoeybi et al., 2019, arXiv:1909.08053).
"""

import contextlib
import ctypes
import math
import os
import socket
import sys
import time
import zlib

import numpy as np

# 0. Loading OneFlow 0.9.0: skip this at a first reading ------------------------------------------


def prepare_for_oneflow():
    """Set what the engine reads at its import. A user's values stay."""
    set_default = os.environ.setdefault
    # The engine may move a tensor by way of a third sbp. The search for one is turned off, since it
    # aborts on micro-batches of one image.
    set_default("ONEFLOW_BOXING_DISABLE_MIDDLE_NODE_AND_CHECK", "1")
    # The engine caches an operator for each Python number that it meets, such as a learning rate:
    # 14 kB a step in eager mode. At 1,000 entries it begins anew.
    set_default("ONEFLOW_EAGER_TENSOR_INFER_CACHE_SIZE", "1000")
    if not os.path.exists("/dev/nvidiactl"):  # there is no GPU
        set_default("ONEFLOW_VM_COMPUTE_ON_WORKER_THREAD", "0")  # an eager step: 0.6 s, not 1.7
        set_default("GLOG_minloglevel", "3")  # no lines on GPUs that are not there
    # OpenBLAS does not know processors newer than itself, and takes slow code there. It gets one
    # thread, since the engine computes several products at once.
    with open("/proc/cpuinfo") as file:
        cpu_flags = file.read().split()
    if "avx2" in cpu_flags:
        set_default("OPENBLAS_CORETYPE", "SkylakeX" if "avx512dq" in cpu_flags else "Haswell")
    set_default("OPENBLAS_NUM_THREADS", "1")
    # The engine's own OpenBLAS stops at AVX2, and loops after it, such as GELU's, take two to three
    # times as long. One that is loaded first is used in its place.
    for folder in sys.path:
        with contextlib.suppress(OSError):
            library = f"{folder}/scipy_openblas32/lib/libopenblas_python.so"
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def wait_for_rank_0(seconds=60):
    """Wait until rank 0 listens: a rank that comes earlier sleeps for 10 s in the engine."""
    is_later_rank = int(os.environ.get("RANK") or 0) > 0 and "MASTER_ADDR" in os.environ
    if not is_later_rank or "oneflow" in sys.modules:  # rank 0 listens during its import
        return
    error = None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            ip_address = socket.gethostbyname(os.environ["MASTER_ADDR"])  # the engine has no IPv6
            port = int(os.environ["MASTER_PORT"])
            return socket.create_connection((ip_address, port), timeout=1).close()
        except OSError as problem:
            error = problem
            time.sleep(0.05)
    if isinstance(error, socket.gaierror):  # the engine would wait for ever
        print(f"vit3d.py: MASTER_ADDR has no IPv4 address: {error}", file=sys.stderr)
        sys.exit(2)


prepare_for_oneflow()
wait_for_rank_0()
import oneflow as flow
from oneflow import nn

B = flow.sbp.broadcast
P = flow.sbp.partial_sum
S = flow.sbp.split

# 1. The mesh ------------------------------------------------------------------------------------


class UsageError(ValueError):
    """What a caller got wrong, in one sentence, told before the engine aborts on it."""


def require(condition, error_message):
    """Raise UsageError unless the condition holds."""
    if not condition:
        raise UsageError(error_message)


class Dist:
    """The mesh of processes: which of them hold a layer, and how they share its tensors.

    A mesh 2x4x1 is data 2 x tensor 4 x pipeline 1. `dist`, at the end of this file, is the mesh of
    the running program. Source: LiBai's `libai.utils.distributed`.
    """

    def __init__(self):
        self.rank = flow.env.get_rank()
        self.world_size = flow.env.get_world_size()
        self.setup(self.world_size)  # all processes are replicas until a program calls setup

    def setup(
        self, data_parallel_size=1, tensor_parallel_size=1, pipeline_parallel_size=1,
        pipeline_num_layers=None, shard_params=False, sequence_parallel=False, device_type=None,
    ):
        """Lay the mesh over all processes. Call it once, before a model is built.

        The stages share the `pipeline_num_layers` layers evenly. With `shard_params` the replicas
        share the storage of the weights. With `sequence_parallel` the ranks of the tensor-parallel
        axis share the tokens between layers. Raises UsageError for a mesh that the processes or
        the layers do not fit, and for a device_type 'cuda' whose GPUs cannot run it.
        """
        d = data_parallel_size
        t = tensor_parallel_size
        p = pipeline_parallel_size
        require(
            min(d, t, p) >= 1 and d * t * p == self.world_size,
            f"data x tensor x pipeline = {d} x {t} x {p} = {d * t * p} must be the number of"
            f" processes, {self.world_size}, each at least 1",
        )
        self.data_parallel_size = d
        self.tensor_parallel_size = t
        self.pipeline_parallel_size = p
        # Ranks are numbered stage by stage, then replica by replica. 2x2x2: stage 0 is
        # [[0, 1], [2, 3]], stage 1 is [[4, 5], [6, 7]]; a row is a replica. The array is
        # ranks[replica, tensor_rank, stage].
        self.ranks = np.arange(self.world_size).reshape(p, d, t).transpose(1, 2, 0)
        self.shard_params = shard_params
        self.sequence_parallel = sequence_parallel
        layers = pipeline_num_layers or 0
        require(p == 1 or layers >= p, f"pipeline_num_layers {layers} is below the {p} stages")
        # 6 layers over 4 stages are 1, 1, 2, 2. The larger shares come last: a later stage keeps
        # the activations of fewer micro-batches.
        sizes = [(layers + stage) // p for stage in range(p)]
        self.layer_stage_ids = [stage for stage, size in enumerate(sizes) for _ in range(size)]
        processes = self.world_size // flow.env.get_node_size()  # of each machine
        self.cuda_problem = why_not_cuda(processes)  # "" if there is none
        self.device_type = device_type or ("cpu" if self.cuda_problem else "cuda")
        require(self.device_type in ("cpu", "cuda"), f"{device_type!r} must be 'cpu' or 'cuda'")
        can_run = self.device_type == "cpu" or not self.cuda_problem
        require(can_run, f"device_type 'cuda' cannot run, take 'cpu': {self.cuda_problem}")
        # A placement, and so an sbp, has no axis of size 1: both have one entry on 2x1x1. On 1x1x1
        # they have one, too.
        shape = [size for size in (d, t) if size > 1] or [1]
        stages = [self.ranks[:, :, stage].reshape(shape).tolist() for stage in range(p)]
        self.stage_placements = [flow.placement(self.device_type, ranks) for ranks in stages]

    def get_coordinates(self, rank=None):
        """(replica, tensor_rank, stage) of a rank; of this process if none is given."""
        rank = self.rank if rank is None else rank
        replica, tensor_rank, stage = np.argwhere(self.ranks == rank)[0]
        return int(replica), int(tensor_rank), int(stage)

    def get_layer_stage_id(self, layer_idx):
        """The pipeline stage of a layer; negative indices count from the end."""
        if self.pipeline_parallel_size == 1:  # `setup` need not know the layers then
            return 0
        layers = len(self.layer_stage_ids)
        is_known = -layers <= layer_idx < layers
        require(is_known, f"layer_idx {layer_idx} must be one of the {layers} layers")
        return self.layer_stage_ids[layer_idx]

    def get_layer_placement(self, layer_idx):
        """The `flow.placement` of a layer: all ranks of its stage, as a mesh of one or two axes."""
        return self.stage_placements[self.get_layer_stage_id(layer_idx)]

    def get_nd_sbp(self, sbp_list):
        """[data-parallel entry, tensor-parallel entry] -> those of the axes above size 1."""
        return [sbp for sbp, size in zip(sbp_list, self.ranks.shape[:2]) if size > 1] or [B]

    def get_hidden_sbp(self):
        """The sbp of (b, n, c) between layers: each rank has all tokens of its replica's images.

        With sequence parallelism it has some of them (Korthikanti et al., 2022, arXiv:2205.05198,
        section 4.2.2).
        """
        return self.get_nd_sbp([S(0), S(1) if self.sequence_parallel else B])


# No gradient flows through the moves of the next three functions: they need no grad_sbp.
def batch_to_global(array, layer_idx):
    """A replica's share of a batch, a numpy array -> a global tensor on the placement of a layer.

    (b, ...) of this replica -> (data_parallel_size * b, ...) [S(0), B]. Images go to layer 0,
    labels to layer -1.
    """
    placement = dist.get_layer_placement(layer_idx)
    return flow.tensor(array).to_global(placement=placement, sbp=dist.get_nd_sbp([S(0), B]))


def full_array(tensor):
    """A global tensor -> all of it as a numpy array. Call it on every rank: all of them get it."""
    # One kind of move at a time: to the whole within its own placement, then to all ranks.
    tensor = tensor.to_global(sbp=[B] * len(tensor.sbp))
    world = flow.placement(tensor.placement.type, list(range(dist.world_size)))
    tensor = tensor.to_global(placement=world, sbp=B)
    return tensor.to_local().numpy().copy()  # what `numpy` gives can be the tensor's own memory


def distribute(tensor, placement, sbp):
    """A local CPU tensor, the same on every rank -> a global one, of which each keeps its part.

    So a weight that all ranks draw alike is the same on every mesh, however it is split.
    """
    # The first move says that all ranks have it. (The engine still sends it from the first one to
    # the others.) The second cuts it.
    tensor = tensor.to_global(placement=placement, sbp=[B] * len(sbp))
    return tensor.to_global(sbp=sbp)


# 2. Layers, small to large ----------------------------------------------------------------------


class Layer(nn.Module):
    """What layers with weights share: a place in the model, `layer_idx`, and how to store them."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def new_parameter(self, tensor, tensor_axis_sbp=B):
        """A local CPU tensor, the same on every rank -> a parameter on the layer's placement.

        It is stored as [B, tensor_axis_sbp], or with `shard_params` as [S(i), tensor_axis_sbp]: i
        is the first dimension that data_parallel_size divides and tensor_axis_sbp does not split.
        A parameter that has no such dimension stays whole on each replica.
        """
        data_sbp = B
        if dist.shard_params:
            size = dist.data_parallel_size
            # of the dimensions that the replicas divide evenly
            fits = [S(i) for i, n in enumerate(tensor.shape) if n % size == 0]
            data_sbp = next((sbp for sbp in fits if sbp != tensor_axis_sbp), B)
        placement = dist.get_layer_placement(self.layer_idx)
        sbp = dist.get_nd_sbp([data_sbp, tensor_axis_sbp])
        return nn.Parameter(distribute(tensor, placement, sbp))

    def gather(self, parameter):
        """A parameter as `forward` uses it: [B, tensor_axis_sbp], as given to `new_parameter`.

        Without `shard_params` that is how it is stored. With it the replicas hold the weights,
        their gradients and the optimizer's state once, together. (Source: ZeRO, stage 3,
        Rajbhandari et al., 2020, arXiv:1910.02054.) The gathered copy lives until the layer's
        backward pass has used it.
        """
        if not dist.shard_params:
            return parameter
        tensor_axis_sbp = parameter.sbp[-1] if dist.tensor_parallel_size > 1 else B  # the last one
        sbp = dist.get_nd_sbp([B, tensor_axis_sbp])
        # ZeRO-3 is this move: forward an all-gather, backward a reduce-scatter. The engine aborts
        # on moving a parameter itself, so it moves a copy: `* 1.0`.
        weight = (parameter * 1.0).to_global(sbp=sbp, grad_sbp=parameter.sbp)
        # The next move is for the backward pass, which comes here first. Under sequence parallelism
        # the gradient of a norm or a row bias is [P, P], from where the engine has no move to
        # [S(0), B]. It becomes [P, B] here, and [S(0), B] in the line above.
        return weight.to_global(sbp=sbp, grad_sbp=dist.get_nd_sbp([P, tensor_axis_sbp]))


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis of x, (..., c)."""
    if x.placement.type == "cuda":  # nobody has run this line yet
        return flow._C.layer_norm_affine(x, weight, bias, x.ndim - 1, x.ndim - 1, eps)
    # On the CPU the engine has no layer_norm kernel. A product with ones sums over c, or repeats
    # over c: to add (..., 1) to (..., c) takes 100 times as long. `matmul` of OneFlow has a factor,
    # alpha, and transpose_b: a b^T.
    c = x.shape[-1]
    where = dict(dtype=x.dtype, placement=x.placement, sbp=weight.sbp)  # [B, B]
    ones = flow._C.global_constant((c, 1), 1.0, **where)
    minus_mean = flow.matmul(x, ones, alpha=-1 / c)  # (..., c) -> (..., 1)
    x = x + flow.matmul(minus_mean, ones, transpose_b=True)  # (..., 1) -> (..., c)
    variance = flow.matmul(x.square(), ones, alpha=1 / c)
    scale = flow.matmul(flow.rsqrt(variance + eps), weight.reshape(1, -1))
    return x * scale + bias


class Linear(Layer):
    """y = x W^T + b, with the weight whole ("data") or shared by the tensor-parallel ranks.

    For two ranks, whose parts of the stored W, (out_features, in_features), are W_1 and W_2:

    "col"  W^T = [W_1^T, W_2^T]  y = [x W_1^T, x W_2^T]        x whole, y split by features
    "row"  W^T = [W_1^T]         y = x_1 W_1^T + x_2 W_2^T     x split by features, y whole
                 [W_2^T]

    parallel  x                W          x W^T            y                gradient, dy W
    "data"    [S(0), B]        [B, B]     [S(0), B]        [S(0), B]        [S(0), B]
    "col"     [S(0), B]        [B, S(0)]  [S(0), S(last)]  [S(0), S(last)]  [S(0), P]
    "row"     [S(0), S(last)]  [B, S(1)]  [S(0), P]        [S(0), B]        [S(0), S(last)]

    Each P becomes B by an all-reduce: y of "row", and the gradient of x of "col".

    x: (..., in_features), y: (..., out_features). With sequence parallelism "col" takes x and "row"
    gives y as [S(0), S(1)]. Initial weights: normal, std 0.02 (LiBai); initial bias: zero. Raises
    UsageError if tensor_parallel_size does not divide the features that are split. Source:
    Megatron-LM, section 3.
    """

    def __init__(self, in_features, out_features, bias=True, parallel="data", *, layer_idx=0):
        super().__init__(layer_idx)
        weight_sbp = {"data": B, "col": S(0), "row": S(1)}
        require(parallel in weight_sbp, f"parallel {parallel!r} must be 'data', 'col' or 'row'")
        # 0: nothing is split
        features = {"data": 0, "col": out_features, "row": in_features}[parallel]
        ranks = dist.tensor_parallel_size
        fits = features % ranks == 0
        require(fits, f"{ranks} tensor-parallel ranks do not divide {features} features")
        self.parallel = parallel
        weight = nn.init.normal_(flow.empty(out_features, in_features), std=0.02)
        self.weight = self.new_parameter(weight, weight_sbp[parallel])
        zeros = flow.zeros(out_features)
        bias_sbp = S(0) if parallel == "col" else B
        self.bias = self.new_parameter(zeros, bias_sbp) if bias else None

    def forward(self, x):
        full = dist.get_nd_sbp([S(0), B])
        hidden = dist.get_hidden_sbp()
        split = dist.get_nd_sbp([S(0), S(x.ndim - 1)])
        # x, its gradient, y, its gradient. (If the gradient of y had another sbp, the engine would
        # move W to compute dy W, and abort: see `gather`.)
        x_sbp, x_grad_sbp, y_sbp, y_grad_sbp = {
            "data": (full, full, full, full),
            "col": (full, hidden, split, split),
            "row": (split, split, hidden, full),
        }[self.parallel]
        x = x.to_global(sbp=x_sbp, grad_sbp=x_grad_sbp)
        y = flow.matmul(x, self.gather(self.weight), transpose_b=True)  # x W^T
        y = y.to_global(sbp=y_sbp, grad_sbp=y_grad_sbp)
        return y if self.bias is None else y + self.gather(self.bias)


class LayerNorm(Layer):
    """Layer normalization over the last axis, (..., c) -> the same, in the hidden sbp.

    Source: Ba et al., 2016, arXiv:1607.06450. eps 1e-5 is LiBai's; the paper's code and timm take
    1e-6.
    """

    def __init__(self, normalized_shape, eps=1e-5, *, layer_idx=0):
        super().__init__(layer_idx)
        self.eps = eps
        self.weight = self.new_parameter(flow.ones(normalized_shape))
        self.bias = self.new_parameter(flow.zeros(normalized_shape))

    def forward(self, x):
        return layer_norm(x, self.gather(self.weight), self.gather(self.bias), self.eps)


class Dropout(nn.Module):
    """Zero an element with probability p and scale the others by 1 / (1 - p), when training.

    On every mesh the mask is the one that a single process draws. (Eager mode has other masks than
    a graph, and they depend on the number of micro-batches.) For this each rank of the stage draws
    the numbers of the whole batch, and keeps its slice. The ranks of other stages compute nothing,
    but `flow.rand` moves their generators on, too, so all stay alike.
    (The engine's own `nn.Dropout` gives the same mask to all dropouts of one shape.)
    """

    def __init__(self, p=0.0, *, layer_idx=None):
        super().__init__()
        require(0 <= p < 1, f"dropout probability {p} must lie in [0, 1)")
        self.p = p
        self.layer_idx = layer_idx  # None: it has the stage of the block around it

    def mask_shape(self, x):  # DropPath has another
        return x.shape

    def forward(self, x):
        if self.p == 0 or not self.training:
            return x
        shape = self.mask_shape(x)
        sbp = [B] * len(x.sbp)
        draw = flow.rand(*shape, placement=x.placement, sbp=sbp)
        # Each rank keeps the slice that it has of x. It cuts one axis after the other, since both
        # at once abort in the engine where the ranks do not divide a dimension.
        splits = [S(i) for i, size in enumerate(shape) if size > 1]  # of (b, 1, 1): only S(0)
        for axis, entry in enumerate(x.sbp):
            sbp[axis] = entry if entry in splits else B
            draw = draw.to_global(sbp=sbp)  # a mask has no gradient, and so no grad_sbp
        return x * ((draw >= self.p).to(x.dtype) / (1 - self.p))


class DropPath(Dropout):
    """Stochastic depth: Dropout with one draw for each sample (Huang et al., arXiv:1603.09382)."""

    def mask_shape(self, x):
        return [x.shape[0]] + [1] * (x.ndim - 1)


class PatchEmbedding(Layer):
    """Images (b, in_chans, h, w) -> (b, patches, embed_dim), patches = h w / patch_size^2.

    `img_size` is (h, w), or one number for both. The layer is a convolution whose stride is its
    kernel's size. Its weight has the shape of one, (embed_dim, in_chans, patch_size, patch_size),
    and its initial values. Raises UsageError if patch_size does not divide img_size, or for images
    of another size or type. Source: the paper, section 3.1.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, *, layer_idx=0):
        super().__init__(layer_idx)
        self.img_size = tuple(np.broadcast_to(img_size, 2).tolist())
        height, width = self.img_size
        fits = height % patch_size == width % patch_size == 0
        require(fits, f"patches of side {patch_size} do not divide images of {height} x {width}")
        self.patch_size = patch_size
        self.grid = height // patch_size, width // patch_size
        self.num_patches = math.prod(self.grid)
        bound = (in_chans * patch_size**2) ** -0.5
        weight = flow.empty(embed_dim, in_chans, patch_size, patch_size).uniform_(-bound, bound)
        self.proj = nn.Module()  # for LiBai's names, proj.weight and proj.bias
        self.proj.weight = self.new_parameter(weight)
        self.proj.bias = self.new_parameter(flow.empty(embed_dim).uniform_(-bound, bound))

    def forward(self, x):
        b, c, h, w = x.shape
        p = self.patch_size
        wanted = (self.proj.weight.shape[1], *self.img_size)
        require((c, h, w) == wanted, f"images are {(c, h, w)}, and the model takes {wanted}")
        # The engine gives wrong results for uint8, and aborts on float64.
        fits = x.dtype == self.proj.weight.dtype
        require(fits, f"images are {x.dtype}: make them float32, as by array.astype(np.float32)")
        # As a matrix product: the engine's convolution takes three times as long on the CPU.
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(b, self.num_patches, c * p * p)  # (b, c, h, w) -> (b, patches, c p p)
        weight = self.gather(self.proj.weight).reshape(-1, c * p * p)
        # (b, patches, c p p) [S(0), B] x [B, B] -> (b, patches, embed_dim) [S(0), B]
        return flow.matmul(x, weight, transpose_b=True) + self.gather(self.proj.bias)


class MLP(nn.Module):
    """Two linear layers with a GELU between: (b, n, c) -> (b, n, ffn_hidden_size) -> (b, n, c)."""

    def __init__(self, hidden_size, ffn_hidden_size, output_dropout_prob=0.0, *, layer_idx=0):
        super().__init__()
        ffn = ffn_hidden_size
        self.dense_h_to_4h = Linear(hidden_size, ffn, parallel="col", layer_idx=layer_idx)
        self.dense_4h_to_h = Linear(ffn, hidden_size, parallel="row", layer_idx=layer_idx)
        self.dropout = Dropout(output_dropout_prob)

    def forward(self, x):
        x = flow.gelu(self.dense_h_to_4h(x))  # [S(0), B] -> [S(0), S(2)]; a GELU moves nothing
        return self.dropout(self.dense_4h_to_h(x))  # [S(0), S(2)] -> [S(0), B]


class MultiheadAttention(nn.Module):
    """Self-attention, (b, n, c) -> (b, n, c); each tensor-parallel rank computes its own heads.

    q, k and v lie side by side within each head (LiBai), so that a slice of the query_key_value
    weight is whole heads. Raises UsageError if the heads do not divide hidden_size, or the ranks
    the heads. Source: the paper, appendix A.
    """

    def __init__(
        self, hidden_size, num_attention_heads, attention_dropout_prob=0.0,
        output_dropout_prob=0.0, *, layer_idx=0,
    ):
        super().__init__()
        heads = num_attention_heads
        ranks = dist.tensor_parallel_size
        require(hidden_size % heads == 0, f"{heads} heads do not divide {hidden_size} features")
        require(heads % ranks == 0, f"{ranks} tensor-parallel ranks do not divide {heads} heads")
        self.num_heads = heads
        self.head_size = hidden_size // heads
        c = hidden_size
        self.query_key_value = Linear(c, 3 * c, parallel="col", layer_idx=layer_idx)
        self.dropout = Dropout(attention_dropout_prob)
        self.dense = Linear(c, c, parallel="row", layer_idx=layer_idx)
        self.output_dropout = Dropout(output_dropout_prob)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.query_key_value(x)  # (b, n, c) [S(0), B] -> (b, n, 3 c) [S(0), S(2)]
        # (b, n, 3 c) [S(0), S(2)] -> (b, heads, n, 3 head_size) [S(0), S(1)]
        qkv = qkv.reshape(b, n, self.num_heads, 3 * self.head_size).permute(0, 2, 1, 3)
        query, key, value = flow.chunk(qkv, 3, dim=-1)
        scores = flow.matmul(query, key, transpose_b=True, alpha=self.head_size**-0.5)
        weights = self.dropout(flow.softmax(scores, dim=-1))  # (b, heads, n, n) [S(0), S(1)]
        # (b, heads, n, head_size) [S(0), S(1)] -> (b, n, c) [S(0), S(2)]
        context = flow.matmul(weights, value).permute(0, 2, 1, 3).flatten(2)
        return self.output_dropout(self.dense(context))  # [S(0), S(2)] -> [S(0), B]


class TransformerLayer(Layer):
    """One pre-norm block, (b, n, c) -> (b, n, c) in the hidden sbp, on its stage's placement.

    Source: the paper, equations 2 and 3.
    """

    def __init__(
        self, hidden_size, ffn_hidden_size, num_attention_heads, attention_dropout_prob=0.0,
        output_dropout_prob=0.0, drop_path_prob=0.0, layernorm_epsilon=1e-5, *, layer_idx=0,
    ):
        super().__init__(layer_idx)
        eps = layernorm_epsilon
        self.drop_path = DropPath(drop_path_prob)
        self.input_layernorm = LayerNorm(hidden_size, eps, layer_idx=layer_idx)
        self.self_attention = MultiheadAttention(
            hidden_size, num_attention_heads, attention_dropout_prob, output_dropout_prob,
            layer_idx=layer_idx,
        )
        self.post_attention_layernorm = LayerNorm(hidden_size, eps, layer_idx=layer_idx)
        self.mlp = MLP(hidden_size, ffn_hidden_size, output_dropout_prob, layer_idx=layer_idx)

    def forward(self, x):
        # The step from one pipeline stage to the next is a send. Within a stage this line does
        # nothing. Eager mode needs it; in a graph with stage ids the engine has moved x already.
        x = x.to_global(placement=dist.get_layer_placement(self.layer_idx))
        x = x + self.drop_path(self.self_attention(self.input_layernorm(x)))
        return x + self.drop_path(self.mlp(self.post_attention_layernorm(x)))


# 3. The model -----------------------------------------------------------------------------------

class VisionTransformer(Layer):
    """The Vision Transformer (the paper, figure 1), arguments and parameter names as in LiBai.

    `loss_func` is a module, (logits, labels) -> scalar, the mean over the images of all replicas.
    None is the cross entropy. Raises UsageError if `depth` is not the number of layers that a
    pipeline was set up for.
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=3,
        mlp_ratio=4.0, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0, num_classes=1000,
        loss_func=None, layer_norm_eps=1e-5,
    ):
        super().__init__(layer_idx=0)  # of its own parameters, cls_token and pos_embed
        layers = len(dist.layer_stage_ids)
        error_message = f"depth {depth} must be the pipeline_num_layers of dist.setup, {layers}"
        require(dist.pipeline_parallel_size == 1 or depth == layers, error_message)
        self.patch_embed = PatchEmbedding(img_size, patch_size, in_chans, embed_dim)
        tokens = self.patch_embed.num_patches + 1  # and the class token
        ranks = dist.tensor_parallel_size if dist.sequence_parallel else 1
        require(tokens >= ranks, f"sequence_parallel: {tokens} tokens are fewer than {ranks} ranks")
        cls_token = nn.init.normal_(flow.empty(1, 1, embed_dim), std=0.02)
        pos_embed = nn.init.normal_(flow.empty(1, tokens, embed_dim), std=0.02)
        self.cls_token = self.new_parameter(cls_token)
        self.pos_embed = self.new_parameter(pos_embed)
        self.pos_drop = Dropout(drop_rate, layer_idx=0)
        self.blocks = nn.Sequential()
        for i, drop_path_prob in enumerate(np.linspace(0, drop_path_rate, depth).tolist()):
            block = TransformerLayer(
                embed_dim, int(embed_dim * mlp_ratio), num_heads,
                attention_dropout_prob=attn_drop_rate, output_dropout_prob=drop_rate,
                drop_path_prob=drop_path_prob, layernorm_epsilon=layer_norm_eps, layer_idx=i,
            )
            self.blocks.add_module(str(i), block)
        self.norm = LayerNorm(embed_dim, layer_norm_eps, layer_idx=-1)
        self.head = Linear(embed_dim, num_classes, layer_idx=-1)
        self.loss_func = nn.CrossEntropyLoss() if loss_func is None else loss_func
        self.loss_func.layer_idx = -1  # of the last stage

    def no_weight_decay(self):
        """Names of the parameters that no weight decay should touch, beside biases and norms."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x):
        """Images (b, in_chans, h, w) [S(0), B], first stage -> (b, tokens, c), last stage."""
        x = self.patch_embed(x)
        cls_token = self.gather(self.cls_token).expand(x.shape[0], -1, -1)
        # [B, B] -> [S(0), B]: a slice. Backward `expand` sums over the images: [P, B]. Then the
        # engine moves it to the sbp of its weight: data parallelism's all-reduce.
        cls_token = cls_token.to_global(sbp=x.sbp, grad_sbp=x.sbp)
        x = flow.cat((cls_token, x), dim=1)  # (b, patches, c) -> (b, tokens, c)
        x = x + self.gather(self.pos_embed)
        x = x.to_global(sbp=dist.get_hidden_sbp(), grad_sbp=x.sbp)  # [S(0), B] -> hidden
        return self.blocks(self.pos_drop(x))

    def forward_head(self, x):
        """(b, tokens, c) -> logits (b, num_classes), from the class token alone."""
        x = self.norm(x)
        # hidden -> [S(0), B]. In [S(0), S(1)] one rank alone has the class token, and all need it
        # for the head. The engine can only gather all tokens.
        x = x.to_global(sbp=dist.get_nd_sbp([S(0), B]), grad_sbp=x.sbp)
        return self.head(x[:, 0])

    def forward(self, images, labels=None):
        """Images (b, in_chans, h, w) on the first stage, labels (b,) on the last, both [S(0), B].

        Returns {"losses": scalar} when training with labels, else {"prediction_scores": logits}.
        """
        x = self.forward_head(self.forward_features(images))
        if labels is not None and self.training:
            return {"losses": self.loss_func(x, labels)}
        return {"prediction_scores": x}

    @staticmethod
    def set_pipeline_stage_id(model):
        """LiBai's name for the function `set_pipeline_stage_id` below."""
        set_pipeline_stage_id(model)


def set_pipeline_stage_id(model, stage_id=None):
    """Give each part of a model its pipeline stage; call it in an `nn.Graph`'s __init__.

    `model` is the graph's own, `self.model`. A module has the stage of its `layer_idx`; one without
    has that of the module around it, `stage_id`.

    With stage ids the engine moves the input of each module to its stage. It also puts buffers
    between the stages, for what the backward pass will need. So a stage can begin a micro-batch
    before the one ahead of it has come back: 1F1B.
    """
    # In a graph modules are proxies. `to(nn.Module)` gives the original.
    for module in model.children():
        layer_idx = getattr(module.to(nn.Module), "layer_idx", None)
        stage_of_module = stage_id
        if layer_idx is not None:
            stage_of_module = dist.get_layer_stage_id(layer_idx)
        # The engine moves all inputs of a module that is given a stage. So the model itself gets
        # none: its images belong to the first stage and its labels to the last. Nor do the parts
        # of a block: each would cost an operator forward and one backward.
        if stage_of_module != stage_id:
            placement = dist.get_layer_placement(layer_idx)
            # `to(nn.graph.GraphModule)` gives what the compiler keeps of a module.
            module.to(nn.graph.GraphModule).set_stage(stage_of_module, placement)
        set_pipeline_stage_id(module, stage_of_module)


# 4. Sizes of the papers, weights in and out -------------------------------------------------------

MODELS = {  # the paper, table 1; "Scaling Vision Transformers" (Zhai et al., 2022), table 2
    "vit_tiny_patch16_224": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "vit_small_patch32_224": dict(patch_size=32, embed_dim=384, depth=12, num_heads=6),
    "vit_small_patch16_224": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "vit_base_patch32_224": dict(patch_size=32, embed_dim=768, depth=12, num_heads=12),
    "vit_base_patch16_224": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_base_patch8_224": dict(patch_size=8, embed_dim=768, depth=12, num_heads=12),
    "vit_large_patch32_224": dict(patch_size=32, embed_dim=1024, depth=24, num_heads=16),
    "vit_large_patch16_224": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge_patch14_224": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
    "vit_giant_patch14_224": dict(  # an MLP of 6144
        patch_size=14, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11
    ),
    "vit_gigantic_patch14_224": dict(  # an MLP of 8192
        patch_size=14, embed_dim=1664, depth=48, num_heads=16, mlp_ratio=64 / 13
    ),
}


def load_weights(model, arrays, may_be_missing=()):
    """Load full numpy arrays by name, as `np.load` gives them, into a model on any mesh.

    One array is read at a time. Names with a slash, a checkpoint's other entries, are left out. A
    weight stays as it is if it has no array and its name contains a part that `may_be_missing`
    gives, such as ("head.", "lora_"). Raises UsageError that names what is missing, surplus or
    misshapen, not finite or not a float.
    """
    parameters = dict(model.named_parameters())
    given = [name for name in arrays.keys() if "/" not in name]
    missing = [name for name in parameters if name not in given]
    missing = [name for name in missing if not any(part in name for part in may_be_missing)]
    surplus = [name for name in given if name not in parameters]
    errors = [f"{name} is missing" for name in missing] + [f"{name} is surplus" for name in surplus]
    require(not errors, f"the weights are of another model: {'; '.join(errors):.300}")
    for name in given:
        array = np.asarray(arrays[name])
        parameter = parameters[name]
        error_message = f"{name} is {array.shape} and must be {tuple(parameter.shape)}"
        require(array.shape == tuple(parameter.shape), error_message)
        require(array.dtype.kind == "f", f"{name} is {array.dtype}, and weights must be floats")
        require(np.isfinite(array).all(), f"{name} is not finite and is not loaded")
        weight = flow.tensor(np.asarray(array, np.float32, order="C"))
        parameter.data.copy_(distribute(weight, parameter.placement, parameter.sbp))


TIMM_NAMES = {
    "input_layernorm": "norm1",
    "self_attention.query_key_value": "attn.qkv",
    "self_attention.dense": "attn.proj",
    "post_attention_layernorm": "norm2",
    "mlp.dense_h_to_4h": "mlp.fc1",
    "mlp.dense_4h_to_h": "mlp.fc2",
}


def timm_name(name):
    """Our name of a weight -> timm's."""
    for ours, theirs in TIMM_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _swap_rows(array, outer, inner):
    """(outer x inner x n, ...) -> (inner x outer x n, ...).

    timm's rows are all q, all k, all v. Ours are q, k and v of each head.
    """
    array = array.reshape(outer, inner, -1, *array.shape[1:]).swapaxes(0, 1)
    return array.reshape(-1, *array.shape[3:])


def resize_pos_embed(pos_embed, model):
    """A position embedding (1, 1 + old^2, c) -> that of the model's grid, bicubic as in timm.

    Raises UsageError where it cannot be that of a class token and a square.
    """
    from PIL import Image  # flowvision brings it
    tokens = pos_embed.shape[1]
    height, width = model.patch_embed.grid
    old = math.isqrt(max(tokens - 1, 0))
    is_square = old > 0 and tokens == 1 + old * old
    fits = tokens == 1 + height * width
    if fits and (height == width or not is_square):
        return pos_embed
    # Where the number of tokens fits, it may be of a 4 x 4 grid or of a 2 x 8 grid: refused.
    error_message = f"pos_embed of {tokens} tokens is of no square, or may be of {height} x {width}"
    require(is_square and not fits, error_message)
    planes = pos_embed[0, 1:].reshape(old, old, -1).astype(np.float32).transpose(2, 0, 1)
    planes = [Image.fromarray(plane).resize((width, height), Image.BICUBIC) for plane in planes]
    grid = np.stack(planes, -1).reshape(1, height * width, -1)  # c x (old, old) -> (1, h w, c)
    return np.concatenate([pos_embed[:, :1], grid], 1)


def load_timm_state_dict(model, state_dict, may_be_missing=()):
    """Load arrays or tensors under timm's names, which are flowvision's too, on any mesh.

    q, k and v, one after the other in timm, go side by side within each head. A position embedding
    of another grid is interpolated (bicubic, antialiased, class token kept). Otherwise as
    `load_weights`. Build the model with `layer_norm_eps=1e-6`, timm's value.
    """
    heads = model.blocks[0].self_attention.num_heads
    our_names = {timm_name(name): name for name, _ in model.named_parameters()}
    arrays = {}
    for name, value in state_dict.items():
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
        if ".qkv." in name:
            array = _swap_rows(array, 3, heads)
        if name == "pos_embed":
            array = resize_pos_embed(array, model)
        arrays[our_names.get(name, name)] = array
    load_weights(model, arrays, may_be_missing)


def to_timm_state_dict(model):
    """The inverse: full numpy arrays under timm's names. Call it on every rank."""
    heads = model.blocks[0].self_attention.num_heads
    arrays = {}
    for name, parameter in model.named_parameters():
        array = full_array(parameter)
        if ".query_key_value." in name:
            array = _swap_rows(array, heads, 3)
        arrays[timm_name(name)] = array
    return arrays


# 5. The rest of the mesh: devices, a picture, what ranks compare, a norm over all ranks ----------


def why_not_cuda(processes):
    """Why this many processes of a machine cannot run on its GPUs; "" if they can.

    The wheel has code for compute capability 6.0 to 8.6, which runs on 8.9, too, and no PTX.
    """
    gpus = flow.cuda.device_count() if flow.cuda.is_available() else 0
    if gpus < processes:
        return f"{gpus} GPUs"
    for gpu in range(processes):
        major, minor = flow.cuda.get_device_capability(gpu)
        if not (6, 0) <= (major, minor) <= (8, 9):
            return f"compute capability {major}.{minor} is not in 6.0 to 8.9"
    return ""


def draw_mesh(mesh):
    """The mesh as text: of each stage its blocks and its ranks, a row of them for each replica."""
    d, t, p = mesh.ranks.shape
    reason = f" ({mesh.cuda_problem})" if mesh.cuda_problem else ""
    lines = [f"data {d} x tensor {t} x pipeline {p}, {mesh.device_type}{reason}"]
    for stage in range(p):
        blocks = [i for i, s in enumerate(mesh.layer_stage_ids) if s == stage]
        ranks = mesh.ranks[:, :, stage].tolist()
        lines.append(f"stage {stage}: blocks {blocks}, ranks {ranks}")
    return "\n".join(lines)


def of_all_ranks(numbers):
    """64-bit numbers of this rank, (n,) -> those of all ranks, (world_size, n). Call it on all."""
    placement = flow.placement("cpu", list(range(dist.world_size)))
    numbers = flow.tensor(np.array([numbers]))  # int64 or float64
    return full_array(numbers.to_global(placement=placement, sbp=S(0)))


def require_alike(values):
    """Raise UsageError that names what ranks differ in. Call it on every rank."""
    checksums = of_all_ranks([zlib.crc32(repr(value).encode()) for value in values.values()])
    columns = checksums.T  # (ranks, values) -> (values, ranks)
    names = [name for name, column in zip(values, columns) if len(set(column)) > 1]
    require(not names, f"the ranks differ in {', '.join(names)}")


def require_equal_copies(model):
    """Raise UsageError if ranks that hold the same part of a weight or buffer differ in it.

    An operator that is wrong on shares causes that silently: README, 'Where a PyTorch habit
    goes wrong'. Call it on every rank. Differences up to 1e-4 of the largest element pass, since
    processors of two kinds may round copies apart. Weights that `shard_params` splits have no
    copies.
    """
    if dist.world_size == 1:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_global}
    parts = [tensor.detach().to_local() for tensor in tensors.values()]
    checksums = of_all_ranks([zlib.crc32(part.numpy()) for part in parts])
    for (name, tensor), part, column in zip(tensors.items(), parts, checksums.T):
        ranks = tensor.placement.ranks  # of its stage: the mesh, (d, t), or one axis of it
        sums = column[ranks]
        # Along a B axis all checksums must be that of its first rank.
        whole = [axis for axis, entry in enumerate(tensor.sbp) if entry == B]
        if all((sums == sums.take([0], axis)).all() for axis in whole):
            continue
        # The copies are stacked along a new dimension 0: B becomes S(0), S(i) becomes S(i + 1).
        next_split = {S(i): S(i + 1) for i in range(tensor.ndim)}
        sbp = [next_split.get(entry, S(0)) for entry in tensor.sbp]
        copies = part.unsqueeze(0).to_global(placement=tensor.placement, sbp=sbp)
        copies = full_array(copies).astype(float)
        gap = abs(copies - copies[0]).max()
        error_message = f"the copies of {name} on ranks {ranks.tolist()} differ by {gap:.1e}"
        cure = "README, 'Where a PyTorch habit goes wrong', has what does that"
        require(gap <= 1e-4 * abs(copies).max(), f"{error_message}: {cure}")


def clip_grad_norm(parameters, max_norm):
    """Scale all gradients so that their common norm is at most max_norm. -> the norm before that

    Each rank adds up the squares of its own parts of the gradients. Of a part that several ranks
    hold alike, each counts its share. One number from each rank is all that is sent.
    """
    sizes = [size for size in dist.ranks.shape[:2] if size > 1]  # of the axes that an sbp names
    # A gradient has the sbp of its weight, so never P. Those of other stages are empty here.
    parts = []
    copies = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.to_local().numel() > 0:
            parts.append(parameter.grad.to_local())  # shares the gradient's memory
            copies.append(math.prod(n for n, sbp in zip(sizes, parameter.grad.sbp) if sbp == B))
    squares = 0.0
    if parts:
        norms = flow.stack([flow.linalg.vector_norm(part) for part in parts])
        squares = (norms.numpy().astype(np.float64) ** 2 / copies).sum()
    norm = math.sqrt(of_all_ranks([squares]).sum())
    scale = max_norm / (norm + 1e-6)  # 1e-6: as a graph has it
    if scale < 1:
        for part in parts:
            part.mul_(scale)
    return norm


dist = Dist()  # here, since it calls what stands above
