# SPDX-License-Identifier: Apache-2.0
"""A Vision Transformer with data, tensor and pipeline parallelism, in one file, on OneFlow.

The whole idea: a tensor is *global*. It has one shape, a `placement` (the processes that hold it,
as a mesh of one or two axes) and an `sbp` entry for each axis, which says how they hold it:

    S(i)  split: each process holds a slice along dimension i
    B     broadcast: each process holds all of it
    P     partial: each process holds a summand, the tensor is their sum

Operators work on global tensors. `to_global` on a global tensor moves it to another sbp or
placement: the engine finds the communication (all-reduce, all-gather, send) for it. Backward, the
gradient goes back to the input's placement, in the sbp `grad_sbp` if that is given.
`to_global` on a local tensor declares: this is my part of a global tensor. (Along an axis that is
B the engine sends the first process's tensor to the others.)

A signature such as [S(0), B] gives the entry of the data-parallel axis, then that of the
tensor-parallel axis. The pipeline is not an axis: its stages are placements on other processes.
Every process runs the whole program; outside an operator's placement it computes nothing.

Sources: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv:2010.11929), called
"the paper" below; LiBai's tutorial "Detailed instruction on building Vision Transformer models",
called "LiBai" below, whose names are kept; "Megatron-LM" (Shoeybi et al., 2019, arXiv:1909.08053)
for the column- and row-parallel pair.
"""

import contextlib
import copy
import ctypes
import itertools
import math
import os
import sys

import numpy as np

# With its search for detours between two sbp the engine aborts on micro-batches of one image.
# With the search off a move must be a single one: who needs two writes both.
os.environ.setdefault("ONEFLOW_BOXING_DISABLE_MIDDLE_NODE_AND_CHECK", "1")
try:
    # The wheel's OpenBLAS does not know recent processors: it can take kernels without AVX.
    if {"avx2", "fma"} <= set(open("/proc/cpuinfo").read().split()):
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")  # numpy's own is loaded by now
    libraries = ["libmkl_rt.so.2"]  # the package mkl, if it is there, takes OpenBLAS's place
    # The wheel needs these of nvidia's packages, and does not find them by itself.
    libraries += [f"nvidia/cublas/lib/libcublas{name}.so.11" for name in ("Lt", "")]
    for name in ("ops_infer", "ops_train", "cnn_infer", "cnn_train"):
        libraries.append(f"nvidia/cudnn/lib/libcudnn_{name}.so.8")
    for library, folder in itertools.product(libraries, [f"{sys.prefix}/lib", *sys.path]):
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"{folder}/{library}", mode=ctypes.RTLD_GLOBAL)
    import oneflow as flow
    from oneflow import nn
except (ImportError, OSError) as error:
    raise ImportError(
        f"OneFlow 0.9.0 does not load on Python {sys.version_info[0]}.{sys.version_info[1]}"
        f" ({error}): it needs Linux on x86-64, Python 3.8 to 3.10, and `pip install"
        " oneflow==0.9.0 'numpy<2' nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96`."
    ) from None

B, P, S = flow.sbp.broadcast, flow.sbp.partial_sum, flow.sbp.split

# 1. The mesh ------------------------------------------------------------------------------------


def require(condition, message):
    """Raise ValueError for a user's mistake, before the engine aborts on it."""
    if not condition:
        raise ValueError(message)


def why_not_cuda(capabilities, processes):
    """Why this many processes of a machine cannot run on its GPUs, in a few words; "" if they can.

    `capabilities` holds (major, minor) of each GPU. The wheel has code for 6.0 to 8.6 and no PTX:
    it runs on 8.9, too, by binary compatibility, and not on newer ones.
    """
    if not capabilities:
        return "no GPU here"
    if len(capabilities) < processes:
        return f"GPUs: {len(capabilities)}, processes: {processes}"
    other = [c for c in capabilities[:processes] if not (6, 0) <= c <= (8, 9)]
    return "compute capability {}.{} is not in 6.0 to 8.9".format(*other[0]) if other else ""


class Dist:
    """The mesh of processes: which of them hold a layer, and how they share its tensors.

    Ranks are numbered stage by stage, within a stage replica by replica, and the tensor-parallel
    ranks of a replica are neighbours: `ranks` has the shape (pipeline_parallel_size,
    data_parallel_size, tensor_parallel_size). A mesh 2x4x1 is data 2 x tensor 4 x pipeline 1.
    Source: LiBai's `libai.utils.distributed`.
    """

    def __init__(self):
        self.rank = flow.env.get_rank()
        self.world_size = flow.env.get_world_size()
        self.setup(self.world_size)  # until a program lays out its own mesh

    def setup(
        self, data_parallel_size=1, tensor_parallel_size=1, pipeline_parallel_size=1,
        pipeline_num_layers=None, custom_pipeline_stage_id=None, device_type=None,
        shard_params=False, sequence_parallel=False,
    ):
        """Lay the mesh over all processes. Call it before a model is built.

        Layers are dealt evenly to the stages, the remainder to the later ones, which hold fewer
        micro-batches in flight; `custom_pipeline_stage_id`, a stage for each layer, overrides it.
        With `shard_params` weights are stored split along the data-parallel axis, too; with
        `sequence_parallel` the tensor-parallel ranks share the tokens between layers, too.
        Raises ValueError for a mesh that the processes or the layers do not fit, and for a
        device_type 'cuda' whose GPUs cannot run it.
        """
        d, t, p = data_parallel_size, tensor_parallel_size, pipeline_parallel_size
        layers, stage_ids = pipeline_num_layers, custom_pipeline_stage_id
        require(
            min(d, t, p) >= 1 and d * t * p == self.world_size,
            f"data x tensor x pipeline = {d} x {t} x {p} = {d * t * p} must be the number of"
            f" processes, {self.world_size}, each at least 1",
        )
        gpus = flow.cuda.device_count() if flow.cuda.is_available() else 0
        capabilities = [flow.cuda.get_device_capability(gpu) for gpu in range(gpus)]
        no_cuda = why_not_cuda(capabilities, self.world_size // flow.env.get_node_size())
        named = f"device_type {device_type!r}"
        require(device_type in (None, "cpu", "cuda"), f"{named} must be 'cpu' or 'cuda'")
        require(device_type != "cuda" or not no_cuda, f"{named} cannot run, take 'cpu': {no_cuda}")
        if stage_ids is None and layers is not None:
            require(layers >= p, f"{layers} layers are too few for {p} stages: each must have one")
            least, remainder = divmod(layers, p)
            sizes = [least + (stage >= p - remainder) for stage in range(p)]
            stage_ids = [stage for stage in range(p) for _ in range(sizes[stage])]
        require(p == 1 or stage_ids is not None, f"{p} stages: pipeline_num_layers must be given")
        if stage_ids is not None:
            require(
                layers in (None, len(stage_ids)),
                f"stage ids {stage_ids} name {len(stage_ids)} layers, the model has {layers}",
            )
            require(
                list(stage_ids) == sorted(stage_ids) and set(stage_ids) == set(range(p)),
                f"stage ids {stage_ids} must rise from 0 to {p - 1} and leave out none",
            )
        self.data_parallel_size = d
        self.tensor_parallel_size = t
        self.pipeline_parallel_size = p
        # In a stage ranks must rise row by row: the engine sorts a placement's in silence.
        self.ranks = np.arange(self.world_size).reshape(p, d, t)
        self.layer_stage_ids = stage_ids
        self.device_type = device_type or ("cpu" if no_cuda else "cuda")
        self.no_cuda = no_cuda
        self.shard_params = shard_params
        self.sequence_parallel = sequence_parallel

    def get_coordinates(self, rank=None):
        """(stage, replica, tensor-parallel shard) of a rank; of this process if none is given."""
        stage, replica, shard = np.argwhere(self.ranks == (self.rank if rank is None else rank))[0]
        return int(stage), int(replica), int(shard)

    def get_data_parallel_rank(self):
        """Which replica this process belongs to: it reads that share of the data."""
        return self.get_coordinates()[1]

    def get_layer_stage_id(self, layer_idx):
        """The pipeline stage of a layer; negative indices count from the end."""
        if self.pipeline_parallel_size == 1:
            return 0
        layers = len(self.layer_stage_ids)
        wrong = f"layer_idx {layer_idx} must be one of the {layers} layers of the pipeline"
        require(-layers <= layer_idx < layers, wrong)
        return self.layer_stage_ids[layer_idx]

    def get_layer_placement(self, layer_idx):
        """The `flow.placement` of a layer: all ranks of its stage, as a mesh of one or two axes."""
        ranks = self.ranks[self.get_layer_stage_id(layer_idx)]
        ranks = ranks if min(ranks.shape) > 1 else ranks.flatten()
        return flow.placement(self.device_type, ranks.tolist())

    def get_world_placement(self):
        """The `flow.placement` of all ranks, as one axis."""
        return flow.placement(self.device_type, self.ranks.flatten().tolist())

    def get_nd_sbp(self, sbp_list):
        """[data-parallel entry, tensor-parallel entry] -> the entries of the axes above 1."""
        sizes = self.data_parallel_size, self.tensor_parallel_size
        # A placement of one rank has one axis, too.
        return [sbp for sbp, size in zip(sbp_list, sizes) if size > 1] or [B]

    def get_hidden_sbp(self):
        """The hidden layout, that of (b, n, c) between layers: each rank has its replica's tokens.

        With sequence parallelism (Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2) each
        has some of them, and LayerNorm, dropout and sums work on those alone.
        """
        return self.get_nd_sbp([S(0), S(1) if self.sequence_parallel else B])

    def __str__(self):
        """Draw the mesh: a column for each stage, in it one for each tensor-parallel shard."""
        p, d, t = self.ranks.shape
        titles = [f"stage {stage}" for stage in range(p)]
        for stage in set(self.layer_stage_ids or []):
            blocks = [i for i, s in enumerate(self.layer_stage_ids) if s == stage]
            titles[stage] += f": blocks {blocks[0]}-{blocks[-1]}"
        rows = {"tensor shard": [range(t)] * p}
        rows.update({f"ranks of replica {i}": self.ranks[:, i] for i in range(d)})
        width = max(6 * t, len(max(titles, key=len)) + 3)
        count = f"{self.world_size} process" + "es" * (self.world_size > 1)
        why = f" ({self.no_cuda})" * bool(self.no_cuda)  # no_cuda: then the device is the CPU
        lines = [f"data {d} x tensor {t} x pipeline {p} = {count}, {self.device_type}{why}"]
        lines.append(" " * 20 + "".join(title.ljust(width) for title in titles))
        for label, stages in rows.items():
            cells = ["".join(f"{cell:<6}" for cell in stage).ljust(width) for stage in stages]
            lines.append(f"{label:<20}" + "".join(cells))
        return "\n".join(line.rstrip() for line in lines)


dist = Dist()


def batch_to_global(array, layer_idx):
    """A replica's share of a batch, a numpy array -> a global tensor on the placement of a layer.

    (b, ...) of this replica -> (data_parallel_size * b, ...) [S(0), B]. Images go to layer 0,
    labels to layer -1.
    """
    return flow.tensor(array).to_global(
        placement=dist.get_layer_placement(layer_idx), sbp=dist.get_nd_sbp([S(0), B])
    )


def whole(tensor):
    """A global tensor -> all of it as a numpy array. Call it on every rank: all of them get it."""
    tensor = tensor.to_global(sbp=[B] * len(tensor.sbp))  # within its placement
    tensor = tensor.to_global(placement=dist.get_world_placement(), sbp=B)  # to all ranks
    return tensor.to_local().numpy().copy()  # what `numpy` gives can be the tensor's own memory


def distribute(tensor, placement, sbp):
    """A local CPU tensor, the same on every rank -> a global one, of which each keeps its part."""
    tensor = tensor.to_global(placement=placement, sbp=[B] * len(sbp))  # each rank has all of it
    return tensor.to_global(sbp=sbp)


# 2. Layers, small to large ----------------------------------------------------------------------


class Layer(nn.Module):
    """What all layers share: a place in the model, the mesh, and how weights are stored.

    `layer_idx` gives the pipeline stage. `dist` is the mesh as it was when the layer was built: a
    later `dist.setup` does not change it, only where `batch_to_global` puts new batches.
    """

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.dist = copy.copy(dist)

    def new_parameter(self, tensor, tensor_sbp=B):
        """A local CPU tensor, the same on every rank -> a parameter on the layer's placement.

        Stored as [B, tensor_sbp]; with `shard_params` as [S(i), tensor_sbp], i the first dimension
        that data_parallel_size divides and tensor_sbp does not split. Every rank draws the whole
        weight and keeps its part: a random initializer on a split tensor would give other weights
        on each mesh.
        """
        data_sbp = B
        if self.dist.shard_params:
            size = self.dist.data_parallel_size
            fits = [S(i) for i, n in enumerate(tensor.shape) if n % size == 0]
            data_sbp = next((sbp for sbp in fits if sbp != tensor_sbp), B)
        sbp = self.dist.get_nd_sbp([data_sbp, tensor_sbp])
        placement = self.dist.get_layer_placement(self.layer_idx)
        return nn.Parameter(distribute(tensor, placement, sbp))

    def gather(self, parameter):
        """A parameter as `forward` uses it, [B, tensor_sbp].

        With `shard_params` that is an all-gather, and the gradient is reduce-scattered. Source:
        ZeRO, stage 3 (Rajbhandari et al., 2020, arXiv:1910.02054): together the replicas hold the
        weights, their gradients and the optimizer's state once. The gathered copy lives until its
        backward pass.
        """
        if not self.dist.shard_params:
            return parameter
        tensor_sbp = parameter.sbp[-1]  # without a tensor-parallel axis `get_nd_sbp` drops it
        sbp = self.dist.get_nd_sbp([B, tensor_sbp])
        # The engine aborts on moving a parameter itself to another sbp; it moves a copy.
        parameter = (parameter * 1.0).to_global(sbp=sbp, grad_sbp=parameter.sbp)
        # Forward this second move does nothing. Backward it makes [P, P] -> [P, B] -> [S(0), B]:
        # with sequence parallelism the gradient of LayerNorm's weights is [P, P], from where the
        # engine has no single move to [S(0), B].
        return parameter.to_global(sbp=sbp, grad_sbp=self.dist.get_nd_sbp([P, tensor_sbp]))


# Two operators have a form for each device; all else is the same on both. No GPU was at hand: the
# forms for CUDA were not run.


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis of x, (..., c)."""
    if x.placement.type == "cuda":
        return flow._C.layer_norm_affine(x, weight, bias, x.ndim - 1, x.ndim - 1, eps)
    # On the CPU the engine has no layer_norm kernel, and adding (..., 1) to (..., c) is 100 times
    # slower than the product with a row of ones that spreads it.
    c = x.shape[-1]
    where = dict(dtype=x.dtype, placement=x.placement, sbp=weight.sbp)
    ones = flow._C.global_constant((1, c), 1.0, **where)
    average = flow._C.global_constant((c, 1), 1 / c, **where)
    x = x - flow.matmul(flow.matmul(x, average), ones)  # (..., c) -> (..., 1) -> (..., c)
    variance = flow.matmul(x.square(), average)
    scale = flow.matmul(flow.rsqrt(variance + eps), weight.reshape(1, -1))
    return x * scale + bias


def gelu(x):
    """x times the normal distribution's cumulative probability of x, elementwise, on any sbp."""
    if x.placement.type == "cuda":
        return flow.gelu(x)
    # The same function; with the engine's own, a whole step on the CPU takes 1.4 times as long.
    return x * (0.5 + 0.5 * flow.erf(x * math.sqrt(0.5)))


class Linear(Layer):
    """y = x W^T + b with W whole ("data"), split by columns of W^T ("col") or by its rows ("row").

    x: (..., in_features), y: (..., out_features), the sbp of both as in `forward`. W is stored as
    (out_features, in_features), so that "col" is S(0) and "row" is S(1). The two halves of a "col"
    output lie on other ranks: for a gate take two Linear. Raises ValueError if
    tensor_parallel_size does not divide the features that are split. Source: Megatron-LM, section
    3. Initial weights: normal, std 0.02 (LiBai); initial bias: zero.
    """

    def __init__(self, in_features, out_features, bias=True, parallel="data", *, layer_idx=0):
        super().__init__(layer_idx)
        weight_sbp = {"data": B, "col": S(0), "row": S(1)}
        require(parallel in weight_sbp, f"parallel {parallel!r} must be 'data', 'col' or 'row'")
        split = {"data": 0, "col": out_features, "row": in_features}[parallel]
        ranks = dist.tensor_parallel_size
        require(split % ranks == 0, f"{ranks} tensor-parallel ranks do not divide {split} features")
        self.in_features = in_features
        self.out_features = out_features
        self.parallel = parallel
        weight = nn.init.normal_(flow.empty(out_features, in_features), std=0.02)
        self.weight = self.new_parameter(weight, weight_sbp[parallel])
        bias_sbp = S(0) if parallel == "col" else B
        self.bias = self.new_parameter(flow.zeros(out_features), bias_sbp) if bias else None

    def forward(self, x):
        whole_sbp, hidden_sbp = self.dist.get_nd_sbp([S(0), B]), self.dist.get_hidden_sbp()
        split_sbp = self.dist.get_nd_sbp([S(0), S(x.ndim - 1)])
        # Each move gives grad_sbp. Where the sbp of a gradient is left open in a graph, the engine
        # may choose one for which it moves a parameter by itself, and then aborts.
        sbp, grad_sbp = {
            "data": (whole_sbp, whole_sbp),  # [S(0), B] x W^T [B, B] -> [S(0), B]
            # [S(0), B], or an all-gather from [S(0), S(1)], x W^T [B, S(1)] -> [S(0), S(last)].
            # Backward, the gradient of x is [S(0), P]: an all-reduce, or a reduce-scatter.
            "col": (whole_sbp, hidden_sbp),
            "row": (split_sbp, split_sbp),  # [S(0), S(last)] x W^T [B, S(0)] -> [S(0), P]
        }[self.parallel]
        x = x.to_global(sbp=sbp, grad_sbp=grad_sbp)
        x = flow.matmul(x, self.gather(self.weight), transpose_b=True)  # (..., in) -> (..., out)
        if self.parallel == "row":
            # [S(0), P] -> [S(0), B]: an all-reduce, or -> [S(0), S(1)]: a reduce-scatter, whose
            # backward is an all-gather
            x = x.to_global(sbp=hidden_sbp, grad_sbp=whole_sbp)
        return x if self.bias is None else x + self.gather(self.bias)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, parallel={self.parallel}"


class LayerNorm(Layer):
    """Layer normalization over the last axis, (..., c) -> the same, in the hidden layout.

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

    The mask is the one that a single process would draw, on every mesh: each call of `flow.rand`
    takes a seed from the generator of every rank, whichever stage it runs on. The price: each rank
    draws the numbers of the whole batch and keeps its slice. Who will not pay it draws with
    `sbp=x.sbp` instead: each rank its own slice, other masks on each mesh. The engine's own
    dropout draws one mask for all dropouts of one shape, on all ranks.
    """

    def __init__(self, p=0.0, *, layer_idx=None):
        super().__init__()
        require(0 <= p < 1, f"dropout probability {p} must lie in [0, 1)")
        self.p = p
        self.layer_idx = layer_idx  # of one outside the blocks; in a block, that of the block

    def mask_shape(self, x):
        return x.shape

    def forward(self, x):
        if self.p == 0 or not self.training:
            return x
        shape, sbp = self.mask_shape(x), [B] * len(x.sbp)
        draw = flow.rand(*shape, placement=x.placement, sbp=sbp)
        splits = [S(i) for i, size in enumerate(shape) if size > 1]  # DropPath's is (b, 1, 1)
        # One axis after the other, [B, B] -> [S(0), B] -> [S(0), S(1)], each rank keeps its slice:
        # the engine aborts on both at once where the ranks do not divide a dimension.
        for axis, entry in enumerate(x.sbp):
            sbp[axis] = entry if entry in splits else B
            draw = draw.to_global(sbp=sbp)
        return x * ((draw >= self.p).to(x.dtype) / (1 - self.p))


class DropPath(Dropout):
    """Stochastic depth: Dropout with one draw for each sample (Huang et al., arXiv:1603.09382)."""

    def mask_shape(self, x):
        return [x.shape[0]] + [1] * (x.ndim - 1)


class PatchEmbedding(Layer):
    """Images (b, in_chans, h, w) -> (b, patches, embed_dim), patches = h w / patch_size^2.

    A convolution whose stride is its size; its weight has a convolution's shape, (embed_dim,
    in_chans, patch_size, patch_size), and initial values. Raises ValueError if patch_size does not
    divide img_size, or for images of another size. Source: the paper, section 3.1.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, *, layer_idx=0):
        super().__init__(layer_idx)
        misfit = f"patches of side {patch_size} do not divide images of side {img_size}"
        require(img_size % patch_size == 0, misfit)
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        bound = (in_chans * patch_size**2) ** -0.5
        weight = flow.empty(embed_dim, in_chans, patch_size, patch_size).uniform_(-bound, bound)
        self.proj = nn.Module()  # for LiBai's names, proj.weight and proj.bias
        self.proj.weight = self.new_parameter(weight)
        self.proj.bias = self.new_parameter(flow.empty(embed_dim).uniform_(-bound, bound))

    def forward(self, x):
        b, c, h, w = x.shape
        p = self.patch_size
        require(h == w == self.img_size, f"images of {h} x {w}, the model takes {self.img_size}")
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
        up, down = (hidden_size, ffn_hidden_size), (ffn_hidden_size, hidden_size)
        self.dense_h_to_4h = Linear(*up, parallel="col", layer_idx=layer_idx)
        self.dense_4h_to_h = Linear(*down, parallel="row", layer_idx=layer_idx)
        self.dropout = Dropout(output_dropout_prob)

    def forward(self, x):
        x = gelu(self.dense_h_to_4h(x))  # [S(0), B] -> [S(0), S(2)]: elementwise, no move
        return self.dropout(self.dense_4h_to_h(x))  # [S(0), S(2)] -> [S(0), B]


class MultiheadAttention(nn.Module):
    """Self-attention, (b, n, c) -> (b, n, c); each tensor-parallel rank computes its own heads.

    q, k and v lie side by side within each head (LiBai), so that a slice of the query_key_value
    weight is whole heads. Raises ValueError if the heads do not divide hidden_size, or the ranks
    the heads. Source: the paper, appendix A.
    """

    def __init__(
        self, hidden_size, num_attention_heads, attention_dropout_prob=0.0,
        output_dropout_prob=0.0, *, layer_idx=0,
    ):
        super().__init__()
        heads, ranks = num_attention_heads, dist.tensor_parallel_size
        require(hidden_size % heads == 0, f"{heads} heads do not divide {hidden_size} features")
        require(heads % ranks == 0, f"{ranks} tensor-parallel ranks do not divide {heads} heads")
        self.num_heads = heads
        self.head_size = hidden_size // heads
        self.query_key_value = Linear(
            hidden_size, 3 * hidden_size, parallel="col", layer_idx=layer_idx
        )
        self.dropout = Dropout(attention_dropout_prob)
        self.dense = Linear(hidden_size, hidden_size, parallel="row", layer_idx=layer_idx)
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
    """One pre-norm block, (b, n, c) -> (b, n, c) in the hidden layout, on its stage's placement.

    Source: the paper, equations 2 and 3.
    """

    def __init__(
        self, hidden_size, ffn_hidden_size, num_attention_heads, attention_dropout_prob=0.0,
        output_dropout_prob=0.0, drop_path_prob=0.0, layernorm_epsilon=1e-5, *, layer_idx=0,
    ):
        super().__init__(layer_idx)
        self.drop_path = DropPath(drop_path_prob)
        self.input_layernorm = LayerNorm(hidden_size, layernorm_epsilon, layer_idx=layer_idx)
        self.self_attention = MultiheadAttention(
            hidden_size, num_attention_heads, attention_dropout_prob, output_dropout_prob,
            layer_idx=layer_idx,
        )
        self.post_attention_layernorm = LayerNorm(
            hidden_size, layernorm_epsilon, layer_idx=layer_idx
        )
        self.mlp = MLP(hidden_size, ffn_hidden_size, output_dropout_prob, layer_idx=layer_idx)

    def forward(self, x):
        # The step from one pipeline stage to the next: a send. Within a stage it does nothing, and
        # in a graph with stage ids the engine has done it.
        x = x.to_global(placement=self.dist.get_layer_placement(self.layer_idx))
        x = x + self.drop_path(self.self_attention(self.input_layernorm(x)))
        return x + self.drop_path(self.mlp(self.post_attention_layernorm(x)))


# 3. The model -----------------------------------------------------------------------------------

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


class VisionTransformer(Layer):
    """The Vision Transformer (the paper, figure 1), arguments and parameter names as in LiBai.

    `loss_func` is a module, (logits, labels) -> scalar; None is the cross entropy. Raises
    ValueError if `depth` is not the number of layers that a pipeline was set up for.
    """

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=3,
        mlp_ratio=4.0, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0, num_classes=1000,
        loss_func=None, layer_norm_eps=1e-5,
    ):
        super().__init__(layer_idx=0)  # of its own parameters, cls_token and pos_embed
        layers = len(dist.layer_stage_ids or [])
        misfit = f"depth {depth} must be the pipeline_num_layers of dist.setup, {layers}"
        require(dist.pipeline_parallel_size == 1 or depth == layers, misfit)
        self.patch_embed = PatchEmbedding(img_size, patch_size, in_chans, embed_dim)
        tokens = self.patch_embed.num_patches + 1  # and the class token
        cls_token, pos_embed = flow.empty(1, 1, embed_dim), flow.empty(1, tokens, embed_dim)
        self.cls_token = self.new_parameter(nn.init.normal_(cls_token, std=0.02))
        self.pos_embed = self.new_parameter(nn.init.normal_(pos_embed, std=0.02))
        self.pos_drop = Dropout(drop_rate, layer_idx=0)
        blocks = []
        for i in range(depth):
            drop_path_prob = drop_path_rate * i / max(depth - 1, 1)  # rises from 0 with depth
            blocks.append(
                TransformerLayer(
                    embed_dim, int(embed_dim * mlp_ratio), num_heads, attn_drop_rate, drop_rate,
                    drop_path_prob, layer_norm_eps, layer_idx=i,
                )
            )
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm(embed_dim, layer_norm_eps, layer_idx=-1)
        self.head = Linear(embed_dim, num_classes, layer_idx=-1)
        self.loss_func = nn.CrossEntropyLoss() if loss_func is None else loss_func
        self.loss_func.layer_idx = -1  # for `set_pipeline_stage_id`

    def no_weight_decay(self):
        """Names of the parameters that no weight decay should touch, beside biases and norms."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x):
        """Images (b, in_chans, h, w) [S(0), B], first stage -> (b, tokens, c), last stage."""
        x = self.patch_embed(x)
        cls_token = self.gather(self.cls_token).expand(x.shape[0], -1, -1).to_global(sbp=x.sbp)
        x = flow.cat((cls_token, x), dim=1)  # (b, patches, c) -> (b, tokens, c)
        x = x + self.gather(self.pos_embed)
        x = x.to_global(sbp=self.dist.get_hidden_sbp(), grad_sbp=x.sbp)  # [S(0), B] -> hidden
        return self.blocks(self.pos_drop(x))

    def forward_head(self, x):
        """(b, tokens, c) -> logits (b, num_classes), from the class token alone."""
        x = self.norm(x)
        # hidden -> [S(0), B]: the class token is on one rank of [S(0), S(1)], the head on all
        x = x.to_global(sbp=self.dist.get_nd_sbp([S(0), B]), grad_sbp=x.sbp)
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
        """Give each part of a model its stage; call it in an `nn.Graph`'s __init__.

        `model` is the graph's own, `self.model`. A module has the stage of its `layer_idx`, a
        parameter that of its placement. The placements alone make a pipeline; with the stage ids
        the engine also puts buffers between stages, so that forward and backward of different
        micro-batches run at once, as in 1F1B.
        """
        # In a graph modules and parameters are proxies: `to(nn.Module)` gives the original,
        # `to(nn.graph.GraphModule)` what the compiler keeps of it. All inputs of a module with a
        # stage are moved there: not the model's own, or the labels would go to stage 0.
        mesh = getattr(model.to(nn.Module), "dist", dist)  # the one that the model was built on
        for module in model.modules():
            layer_idx = getattr(module.to(nn.Module), "layer_idx", None)
            if layer_idx is not None and module is not model:
                stage = mesh.get_layer_stage_id(layer_idx), mesh.get_layer_placement(layer_idx)
                module.to(nn.graph.GraphModule).set_stage(*stage)
        for parameter in model.parameters():
            placement = parameter.to(flow.Tensor).placement
            stage_id = mesh.get_coordinates(placement.ranks.flat[0])[0]
            parameter.to(nn.graph.GraphTensor).set_stage(stage_id, placement)


# 4. Weights in and out --------------------------------------------------------------------------


def load_weights(model, arrays, keep_head=False):
    """Load whole numpy arrays by name, as `np.load` gives them, into a model on any mesh.

    Names with a slash, a checkpoint's optimizer state, are passed over; with `keep_head` those of
    the head, too. Raises ValueError that names what is missing, surplus or misshapen, before
    anything is loaded.
    """

    def taken(name):
        return "/" not in name and not (keep_head and name.startswith("head."))

    parameters = {name: p for name, p in model.named_parameters() if taken(name)}
    arrays = {name: np.asarray(arrays[name], np.float32) for name in arrays if taken(name)}
    wrong = [f"{name} is missing" for name in parameters.keys() - arrays.keys()]
    wrong += [f"{name} is not in the model" for name in arrays.keys() - parameters.keys()]
    for name in parameters.keys() & arrays.keys():
        here, there = tuple(parameters[name].shape), arrays[name].shape
        if here != there:
            wrong.append(f"{name} has shape {there}, in the model {here}")
    require(not wrong, "the weights are of another model: " + "; ".join(sorted(wrong)))
    for name, parameter in parameters.items():
        tensor = flow.tensor(np.ascontiguousarray(arrays[name]))
        parameter.data.copy_(distribute(tensor, parameter.placement, parameter.sbp))


TIMM_NAMES = {
    "input_layernorm": "norm1",
    "self_attention.query_key_value": "attn.qkv",
    "self_attention.dense": "attn.proj",
    "post_attention_layernorm": "norm2",
    "mlp.dense_h_to_4h": "mlp.fc1",
    "mlp.dense_4h_to_h": "mlp.fc2",
}


def _swap_rows(array, outer, inner):
    """(outer x inner x n, ...) -> (inner x outer x n, ...): q, k, v of heads, heads of q, k, v."""
    array = array.reshape(outer, inner, -1, *array.shape[1:]).swapaxes(0, 1)
    return array.reshape(-1, *array.shape[3:])


def _resize_grid(pos_embed, tokens):
    """A position embedding (1, 1 + old^2, c) -> (1, tokens, c), bicubic as in timm."""
    from PIL import Image

    old, new = math.isqrt(pos_embed.shape[1] - 1), math.isqrt(tokens - 1)
    require(
        pos_embed.shape[1] == 1 + old**2,
        f"pos_embed has {pos_embed.shape[1]} tokens, which must be a class token and a square grid",
    )
    planes = pos_embed[0, 1:].reshape(old, old, -1).astype(np.float32).transpose(2, 0, 1)
    planes = [Image.fromarray(plane).resize((new, new), Image.BICUBIC) for plane in planes]
    grid = np.stack(planes, -1).reshape(1, new * new, -1)  # c x (old, old) -> (1, new^2, c)
    return np.concatenate([pos_embed[:, :1], grid], 1)


def load_timm_state_dict(model, state_dict, keep_head=False):
    """Load arrays or tensors under timm's names, which are flowvision's too, on any mesh.

    q, k and v, one after the other in timm, go side by side within each head. A position embedding
    of another grid is interpolated (bicubic, antialiased, class token kept). With `keep_head` the
    head keeps its initial values. Raises ValueError as `load_weights` does. Build the model with
    `layer_norm_eps=1e-6`, timm's value.
    """
    heads, tokens = model.blocks[0].self_attention.num_heads, model.pos_embed.shape[1]
    arrays = {}
    for name, value in state_dict.items():
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
        if ".qkv." in name:
            array = _swap_rows(array, 3, heads)
        if name == "pos_embed" and array.shape[1] != tokens:
            array = _resize_grid(array, tokens)
        for ours, theirs in TIMM_NAMES.items():
            name = name.replace(theirs, ours)
        arrays[name] = array
    load_weights(model, arrays, keep_head)


def to_timm_state_dict(model):
    """The inverse: whole numpy arrays under timm's names. Call it on every rank."""
    heads, arrays = model.blocks[0].self_attention.num_heads, {}
    for name, parameter in model.named_parameters():
        array = whole(parameter)
        for ours, theirs in TIMM_NAMES.items():
            name = name.replace(ours, theirs)
        if ".qkv." in name:
            array = _swap_rows(array, heads, 3)
        arrays[name] = array
    return arrays
