# SPDX-License-Identifier: Apache-2.0
"""A Vision Transformer with data, tensor and pipeline parallelism, in one file, on OneFlow.

The whole idea: a tensor is *global*. It has one shape, a `placement` (the processes that hold it)
and one `sbp` entry for each axis of that mesh, which says how they hold it:

    S(i)  split: each process holds a slice along dimension i
    B     broadcast: each process holds all of it
    P     partial: each process holds a summand, the tensor is their sum

Operators work on global tensors, and `to_global` moves a tensor to another sbp or placement. The
engine finds the communication (all-reduce, all-gather, send) that the move needs, also backward.
All parallelism below is in the sbp of the weights, the `placement` of the layers and a few
`to_global`. A signature [a, b] gives the entry of the data-parallel axis, then that of the
tensor-parallel axis.

Sources: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv:2010.11929), called
"the paper" below; LiBai's tutorial "Detailed instruction on building Vision Transformer models",
called "LiBai" below, whose names are kept; "Megatron-LM" (Shoeybi et al., 2019, arXiv:1909.08053)
for the column- and row-parallel pair.
"""

import ctypes
import importlib.util
import math
import os
import socket
import sys
import time

# 1. The engine ----------------------------------------------------------------------------------


def _load_cuda_libraries():
    """Load the CUDA 11 libraries that OneFlow is linked against from their pip packages."""
    for package, names in {
        "nvidia.cublas": ["libcublasLt.so.11", "libcublas.so.11"],
        "nvidia.cudnn": [
            f"libcudnn_{part}.so.8" for part in ("ops_infer", "ops_train", "cnn_infer", "cnn_train")
        ],
    }.items():
        for folder in importlib.util.find_spec(package).submodule_search_locations:
            for name in names:
                ctypes.CDLL(f"{folder}/lib/{name}", mode=ctypes.RTLD_GLOBAL)


def _wait_for_rank_0(seconds=300):
    """Return when rank 0 listens: the engine lets a rank that comes before it sleep for 10 s."""
    deadline = time.monotonic() + seconds
    while int(os.environ.get("RANK", 0)) > 0 and time.monotonic() < deadline:
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            return socket.create_connection(address, timeout=1).close()
        except OSError:
            time.sleep(0.05)


_wait_for_rank_0()
try:
    import numpy as np

    try:
        import oneflow as flow
    except ImportError:  # the packages are not beside oneflow's own, where its rpath looks for them
        _load_cuda_libraries()
        import oneflow as flow
    from flowvision.layers.weight_init import trunc_normal_
    from oneflow import nn
    from PIL import Image
except (ImportError, OSError, AttributeError) as error:
    raise ImportError(
        f"OneFlow 0.9.0 does not load on Python {sys.version_info[0]}.{sys.version_info[1]}"
        f" ({error}): it needs Linux on x86-64, Python 3.8 to 3.10, and"
        " `pip install oneflow==0.9.0 flowvision==0.2.1 'numpy<2'"
        " nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96`."
    ) from None

B, S = flow.sbp.broadcast, flow.sbp.split

# 2. The mesh ------------------------------------------------------------------------------------


def require(condition, message):
    """Tell a user's mistake before the engine aborts on it."""
    if not condition:
        raise ValueError(message)


class Dist:
    """The mesh of processes: which of them hold a layer, and how they share its tensors.

    Ranks are numbered stage by stage, and within a stage data-parallel by tensor-parallel: `ranks`
    has the shape (pipeline_parallel_size, data_parallel_size, tensor_parallel_size).
    Source: LiBai's `libai.utils.distributed`.
    """

    def __init__(self):
        self.rank, self.world_size = flow.env.get_rank(), flow.env.get_world_size()
        self.setup(self.world_size)  # until a program lays out its own mesh

    def setup(
        self,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        pipeline_num_layers=None,
        custom_pipeline_stage_id=None,
        device_type=None,
        shard_params=False,
    ):
        """Lay the mesh over all processes; call it before a model is built, and again for another.

        Layers are dealt evenly to the stages, the remainder to the later ones, which hold fewer
        micro-batches in flight; `custom_pipeline_stage_id`, a stage for each layer, overrides it.
        With `shard_params` each weight is stored split along the data-parallel axis, too.
        Raises ValueError for a mesh that the processes or the layers do not fit.
        """
        d, t, p = sizes = data_parallel_size, tensor_parallel_size, pipeline_parallel_size
        layers, stage_ids = pipeline_num_layers, custom_pipeline_stage_id
        require(
            min(sizes) >= 1 and d * t * p == self.world_size,
            f"data x tensor x pipeline = {d} x {t} x {p} = {d * t * p} must be the number of"
            f" processes, {self.world_size}, each at least 1",
        )
        devices = ["cpu", "cuda"] if flow.cuda.is_available() else ["cpu"]
        require(
            device_type in (None, *devices), f"device_type {device_type!r} must be one of {devices}"
        )
        if stage_ids is None and layers is not None:
            few, remainder = divmod(layers, p)
            require(few, f"{layers} layers are too few for {p} stages, which must each have one")
            stage_ids = [s for s in range(p) for _ in range(few + (s >= p - remainder))]
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
        self.data_parallel_size, self.tensor_parallel_size, self.pipeline_parallel_size = sizes
        self.ranks = np.arange(self.world_size).reshape(p, d, t)
        self.device_type = device_type or devices[-1]
        self.layer_stage_ids, self.shard_params = stage_ids, shard_params

    def get_dist_util(self):
        """`dist` itself: text written for LiBai asks for it."""
        return self

    def get_layer_stage_id(self, layer_idx):
        """The pipeline stage of a layer; negative indices count from the end."""
        return 0 if self.pipeline_parallel_size == 1 else self.layer_stage_ids[layer_idx]

    def get_layer_placement(self, layer_idx, device_type=None):
        """The `flow.placement` of a layer: all ranks of its stage, as a mesh of one or two axes."""
        ranks = self.ranks[self.get_layer_stage_id(layer_idx)]
        ranks = ranks if min(ranks.shape) > 1 else ranks.flatten()
        return flow.placement(device_type or self.device_type, ranks.tolist())

    def get_world_placement(self):
        """The `flow.placement` of all ranks, as one axis."""
        return flow.placement(self.device_type, self.ranks.flatten().tolist())

    def get_nd_sbp(self, sbp_list):
        """[data-parallel entry, tensor-parallel entry] -> the entries of the axes above 1."""
        sizes = self.data_parallel_size, self.tensor_parallel_size
        return [sbp for sbp, size in zip(sbp_list, sizes) if size > 1] or [B]

    def get_data_parallel_rank(self):
        """Which replica this process belongs to: it reads that share of the data."""
        return self.rank // self.tensor_parallel_size % self.data_parallel_size

    def __str__(self):
        """Draw the mesh: a column for each stage, in it one for each tensor shard."""
        p, d, t = self.ranks.shape
        heads = [f"stage {stage}" for stage in range(p)]
        for stage in set(self.layer_stage_ids or []):
            blocks = [i for i, s in enumerate(self.layer_stage_ids) if s == stage]
            heads[stage] += f": blocks {blocks[0]}-{blocks[-1]}"
        rows = {"tensor shard": [range(t)] * p}
        rows.update({f"ranks of replica {i}": self.ranks[:, i] for i in range(d)})
        width = max(6 * t, len(max(heads, key=len)) + 3)
        count = f"{self.world_size} process" + "es" * (self.world_size > 1)
        lines = [f"data {d} x tensor {t} x pipeline {p} = {count}, {self.device_type}"]
        lines.append(" " * 20 + "".join(head.ljust(width) for head in heads))
        for label, stages in rows.items():
            cells = ["".join(f"{cell:<6}" for cell in stage).ljust(width) for stage in stages]
            lines.append(f"{label:<20}" + "".join(cells))
        return "\n".join(line.rstrip() for line in lines)


dist = Dist()


def distribute(tensor, placement, sbp):
    """A local CPU tensor, the same on every rank -> a global one, of which each keeps its part."""
    return tensor.to_global(placement=placement, sbp=dist.get_nd_sbp([B, B])).to_global(sbp=sbp)


def whole(tensor):
    """A global tensor -> all of it as a numpy array, on every rank."""
    tensor = tensor.to_global(sbp=[B] * len(tensor.sbp))
    tensor = tensor.to_global(placement=dist.get_world_placement(), sbp=B)
    return tensor.to_local().numpy().copy()  # what `numpy` gives can be the tensor's own memory


def new_parameter(tensor, tensor_sbp=B, layer_idx=0):
    """A local CPU tensor, the same on every rank -> a parameter on the layer's placement.

    Stored as [B, tensor_sbp]; with `shard_params` as [S(i), tensor_sbp], i the first dimension that
    divides and that tensor_sbp does not split. Every rank draws the whole weight and keeps its
    part: a random initializer on a split tensor would give other weights on each mesh.
    """
    free = [
        i for i, n in enumerate(tensor.shape)
        if n % dist.data_parallel_size == 0 and S(i) != tensor_sbp
    ]  # fmt: skip
    data_sbp = S(free[0]) if dist.shard_params and free else B
    sbp = dist.get_nd_sbp([data_sbp, tensor_sbp])
    return nn.Parameter(distribute(tensor, dist.get_layer_placement(layer_idx), sbp))


def gather(parameter):
    """A parameter as a layer uses it, [B, tensor_sbp]; its gradient is reduce-scattered.

    Source: ZeRO, stage 3 (Rajbhandari et al., 2020, arXiv:1910.02054): weights, gradients and
    optimizer state each rank holds once.
    """
    if not dist.shard_params:
        return parameter
    sbp = dist.get_nd_sbp([B, parameter.sbp[-1]])
    # The engine aborts on moving a parameter itself to another sbp; it moves a copy.
    return (parameter * 1.0).to_global(sbp=sbp, grad_sbp=parameter.sbp)


# 3. Layers, small to large ----------------------------------------------------------------------

# Two operators have a form for each device; all else is the same on both. The fused forms for CUDA
# were not run: no GPU was at hand.


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis of x, (..., C)."""
    if x.placement.type == "cuda":
        return flow._C.layer_norm_affine(x, weight, bias, x.ndim - 1, x.ndim - 1, eps)
    # On the CPU the engine has no layer_norm kernel, and adding (..., 1) to (..., C) takes it
    # 100 times as long as the product with a row of ones that spreads it.
    c, where = x.shape[-1], dict(placement=x.placement, sbp=weight.sbp)
    ones = flow._C.global_constant((1, c), 1.0, dtype=x.dtype, **where)
    average = flow._C.global_constant((c, 1), 1 / c, dtype=x.dtype, **where)
    x = x - flow.matmul(flow.matmul(x, average), ones)  # (..., C) -> (..., 1) -> (..., C)
    variance = flow.matmul(x.square(), average)
    scale = flow.matmul(flow.rsqrt(variance + eps), weight.reshape(1, -1))
    return x * scale + bias


def bias_gelu(x, bias):
    """GELU(x + bias), (..., C) and (C,) -> (..., C), each rank on its slice of C if it is split."""
    if x.placement.type == "cuda":
        return flow._C.fused_bias_add_gelu(x, bias, axis=x.ndim - 1)
    x = x + bias
    # The same function as the engine's gelu, with which a whole step on the CPU takes 1.4 times
    # as long.
    return x * (0.5 + 0.5 * flow.erf(x * math.sqrt(0.5)))


class Linear(nn.Module):
    """y = x W^T + b with W^T whole ("data"), split by its columns ("col") or by its rows ("row").

    x: (..., in_features), y: (..., out_features), the sbp of both as in `forward`. Raises
    ValueError if tensor_parallel_size does not divide the features that are split.
    With `skip_bias_add` it returns x W^T and b, for an operator that adds b itself.
    Initial weights: truncated normal, std 0.02 (LiBai); initial bias: zero.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        parallel="data",
        skip_bias_add=False,
        *,
        layer_idx=0,
    ):
        super().__init__()
        weight_sbp = {"data": B, "col": S(0), "row": S(1)}
        require(parallel in weight_sbp, f"parallel {parallel!r} must be 'data', 'col' or 'row'")
        split = {"data": 0, "col": out_features, "row": in_features}[parallel]
        ranks = dist.tensor_parallel_size
        require(split % ranks == 0, f"{ranks} tensor-parallel ranks do not divide {split} features")
        self.in_features, self.out_features, self.parallel = in_features, out_features, parallel
        self.skip_bias_add = skip_bias_add
        weight = trunc_normal_(flow.empty(out_features, in_features), std=0.02)
        self.weight = new_parameter(weight, weight_sbp[parallel], layer_idx)
        bias_sbp = S(0) if parallel == "col" else B
        self.bias = new_parameter(flow.zeros(out_features), bias_sbp, layer_idx) if bias else None

    def forward(self, x):
        last = S(x.ndim - 1)
        if self.parallel == "row":
            # (..., in) [S(0), S(last)] x W^T [B, S(0)] -> [S(0), P] -> [S(0), B]: the all-reduce
            x = x.to_global(sbp=dist.get_nd_sbp([S(0), last]))
            x = flow.matmul(x, gather(self.weight), transpose_b=True)
            x = x.to_global(sbp=dist.get_nd_sbp([S(0), B]))
        else:
            # data: (..., in) [S(0), B] x W^T [B, B] -> [S(0), B]
            # col:  (..., in) [S(0), B] x W^T [B, S(1)] -> [S(0), S(last)]
            # The gradient of x is [S(0), P] for "col"; grad_sbp asks for its sum: an all-reduce.
            sbp = dist.get_nd_sbp([S(0), B])
            x = x.to_global(sbp=sbp, grad_sbp=sbp)
            x = flow.matmul(x, gather(self.weight), transpose_b=True)
        if self.bias is None:
            return x
        bias = gather(self.bias)
        return (x, bias) if self.skip_bias_add else x + bias

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, parallel={self.parallel}"


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, (..., C) [S(0), B] -> the same.

    eps 1e-5 is LiBai's; the paper's code and timm take 1e-6.
    """

    def __init__(self, normalized_shape, eps=1e-5, *, layer_idx=0):
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(flow.ones(normalized_shape), layer_idx=layer_idx)
        self.bias = new_parameter(flow.zeros(normalized_shape), layer_idx=layer_idx)

    def forward(self, x):
        x = x.to_global(placement=self.weight.placement)
        return layer_norm(x, gather(self.weight), gather(self.bias), self.eps)


class Dropout(nn.Module):
    """Zero an element with probability p and scale the others by 1 / (1 - p), when training.

    Drawn by a global `flow.rand`, which differs in each layer, step and slice of a split axis and
    agrees on the copies of a broadcast one. The engine's own dropout draws one mask for all
    dropouts of one shape, on all ranks.
    """

    def __init__(self, p=0.0):
        super().__init__()
        require(0 <= p < 1, f"dropout probability {p} must lie in [0, 1)")
        self.p = p

    def mask_shape(self, x):
        return x.shape

    def forward(self, x):
        if self.p == 0 or not self.training:
            return x
        draw = flow.rand(*self.mask_shape(x), placement=x.placement, sbp=x.sbp)
        return x * ((draw >= self.p).to(x.dtype) / (1 - self.p))


class DropPath(Dropout):
    """Stochastic depth: Dropout with one draw for each sample (Huang et al., arXiv:1603.09382)."""

    def mask_shape(self, x):
        return [x.shape[0]] + [1] * (x.ndim - 1)


class PatchEmbedding(nn.Module):
    """Images (B, in_chans, H, W) -> patch vectors (B, N, embed_dim), N = H W / patch_size^2.

    Source: the paper, section 3.1. The weight has a convolution's shape, (C, in_chans, P, P).
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, *, layer_idx=0):
        super().__init__()
        misfit = f"patches of side {patch_size} do not divide images of side {img_size}"
        require(img_size % patch_size == 0, misfit)
        self.img_size, self.patch_size = img_size, patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.proj.weight = new_parameter(self.proj.weight, layer_idx=layer_idx)
        self.proj.bias = new_parameter(self.proj.bias, layer_idx=layer_idx)

    def forward(self, x):
        b, c, h, w = x.shape
        p = self.patch_size
        require(h == w == self.img_size, f"images of {h} x {w}, the model takes {self.img_size}")
        # As a matrix product: the engine's convolution takes three times as long on the CPU.
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(b, self.num_patches, c * p * p)  # (B, 3, H, W) -> (B, N, 3 P P)
        weight = gather(self.proj.weight).reshape(-1, c * p * p)
        # (B, N, 3 P P) [S(0), B] x [B, B] -> (B, N, C) [S(0), B]
        return flow.matmul(x, weight, transpose_b=True) + gather(self.proj.bias)


class MLP(nn.Module):
    """Two linear layers with a GELU between: (B, N, C) -> (B, N, ffn_hidden_size) -> (B, N, C)."""

    def __init__(self, hidden_size, ffn_hidden_size, output_dropout_prob=0.0, *, layer_idx=0):
        super().__init__()
        sizes = hidden_size, ffn_hidden_size
        self.dense_h_to_4h = Linear(*sizes, parallel="col", skip_bias_add=True, layer_idx=layer_idx)
        self.dense_4h_to_h = Linear(*sizes[::-1], parallel="row", layer_idx=layer_idx)
        self.dropout = Dropout(output_dropout_prob)

    def forward(self, x):
        x = bias_gelu(*self.dense_h_to_4h(x))  # [S(0), B] -> [S(0), S(2)]: elementwise, no move
        return self.dropout(self.dense_4h_to_h(x))  # [S(0), S(2)] -> [S(0), B]


class MultiheadAttention(nn.Module):
    """Self-attention, (B, N, C) -> (B, N, C); each tensor-parallel rank computes its own heads.

    Source: the paper, appendix A. q, k and v lie side by side within each head (LiBai), so that a
    slice of the query_key_value weight is whole heads.
    """

    def __init__(
        self,
        hidden_size,
        num_attention_heads,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
        *,
        layer_idx=0,
    ):
        super().__init__()
        heads, ranks = num_attention_heads, dist.tensor_parallel_size
        require(hidden_size % heads == 0, f"{heads} heads do not divide {hidden_size} features")
        require(heads % ranks == 0, f"{ranks} tensor-parallel ranks do not divide {heads} heads")
        self.num_heads, self.head_size = heads, hidden_size // heads
        self.query_key_value = Linear(
            hidden_size, 3 * hidden_size, parallel="col", layer_idx=layer_idx
        )
        self.dropout = Dropout(attention_dropout_prob)
        self.dense = Linear(hidden_size, hidden_size, parallel="row", layer_idx=layer_idx)
        self.output_dropout = Dropout(output_dropout_prob)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.query_key_value(x)  # (B, N, C) [S(0), B] -> (B, N, 3 C) [S(0), S(2)]
        # (B, N, 3 C) [S(0), S(2)] -> (B, heads, N, 3 head_size) [S(0), S(1)]
        qkv = qkv.reshape(b, n, self.num_heads, 3 * self.head_size).permute(0, 2, 1, 3)
        query, key, value = flow.chunk(qkv, 3, dim=-1)
        scores = flow.matmul(query, key, transpose_b=True, alpha=self.head_size**-0.5)
        weights = self.dropout(flow.softmax(scores, dim=-1))  # (B, heads, N, N) [S(0), S(1)]
        # (B, heads, N, head_size) [S(0), S(1)] -> (B, N, C) [S(0), S(2)]
        context = flow.matmul(weights, value).permute(0, 2, 1, 3).flatten(2)
        return self.output_dropout(self.dense(context))  # [S(0), S(2)] -> [S(0), B]


class TransformerLayer(nn.Module):
    """One pre-norm block, (B, N, C) [S(0), B] -> the same, on the placement of its stage.

    Source: the paper, equations 2 and 3.
    """

    def __init__(
        self,
        hidden_size,
        ffn_hidden_size,
        num_attention_heads,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
        drop_path_prob=0.0,
        layernorm_epsilon=1e-5,
        *,
        layer_idx=0,
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.drop_path = DropPath(drop_path_prob)
        self.input_layernorm = LayerNorm(hidden_size, layernorm_epsilon, layer_idx=layer_idx)
        self.self_attention = MultiheadAttention(
            hidden_size,
            num_attention_heads,
            attention_dropout_prob,
            output_dropout_prob,
            layer_idx=layer_idx,
        )
        self.post_attention_layernorm = LayerNorm(
            hidden_size, layernorm_epsilon, layer_idx=layer_idx
        )
        self.mlp = MLP(hidden_size, ffn_hidden_size, output_dropout_prob, layer_idx=layer_idx)

    def forward(self, x):
        # The step from one pipeline stage to the next; within a stage it does nothing.
        x = x.to_global(placement=dist.get_layer_placement(self.layer_idx))
        x = x + self.drop_path(self.self_attention(self.input_layernorm(x)))
        return x + self.drop_path(self.mlp(self.post_attention_layernorm(x)))


# 4. The model -----------------------------------------------------------------------------------


def _sizes(patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0):
    return dict(locals())


MODELS = {  # the paper, table 1; "Scaling Vision Transformers" (Zhai et al., 2022), table 2
    "vit_tiny_patch16_224": _sizes(16, 192, 12, 3),
    "vit_small_patch32_224": _sizes(32, 384, 12, 6),
    "vit_small_patch16_224": _sizes(16, 384, 12, 6),
    "vit_base_patch32_224": _sizes(32, 768, 12, 12),
    "vit_base_patch16_224": _sizes(16, 768, 12, 12),
    "vit_base_patch8_224": _sizes(8, 768, 12, 12),
    "vit_large_patch32_224": _sizes(32, 1024, 24, 16),
    "vit_large_patch16_224": _sizes(16, 1024, 24, 16),
    "vit_huge_patch14_224": _sizes(14, 1280, 32, 16),
    "vit_giant_patch14_224": _sizes(14, 1408, 40, 16, 48 / 11),  # an MLP of 6144
    "vit_gigantic_patch14_224": _sizes(14, 1664, 48, 16, 64 / 13),  # an MLP of 8192
}


class VisionTransformer(nn.Module):
    """The Vision Transformer (the paper, figure 1), arguments and parameter names as in LiBai.

    `loss_func` is a module, (logits, labels) -> scalar; None is the cross entropy. Raises
    ValueError if `depth` is not the number of layers that the pipeline was set up for.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=192,
        depth=12,
        num_heads=3,
        mlp_ratio=4.0,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        num_classes=1000,
        loss_func=None,
        layer_norm_eps=1e-5,
    ):
        super().__init__()
        ids = dist.layer_stage_ids or []
        misfit = f"depth {depth} must be the pipeline_num_layers of dist.setup, {len(ids)}"
        require(dist.pipeline_parallel_size == 1 or depth == len(ids), misfit)
        self.num_classes = num_classes
        self.patch_embed = PatchEmbedding(img_size, patch_size, in_chans, embed_dim)
        cls_token = trunc_normal_(flow.empty(1, 1, embed_dim), std=0.02)
        self.cls_token = new_parameter(cls_token)
        positions = self.patch_embed.num_patches + 1
        self.pos_embed = new_parameter(trunc_normal_(flow.empty(1, positions, embed_dim), std=0.02))
        self.pos_drop = Dropout(drop_rate)
        self.blocks = nn.Sequential(
            *[
                TransformerLayer(
                    embed_dim,
                    int(embed_dim * mlp_ratio),
                    num_heads,
                    attn_drop_rate,
                    drop_rate,
                    drop_path_rate * i / max(depth - 1, 1),  # rises from 0 with depth
                    layer_norm_eps,
                    layer_idx=i,
                )
                for i in range(depth)
            ]
        )
        self.norm = LayerNorm(embed_dim, layer_norm_eps, layer_idx=-1)
        self.head = Linear(embed_dim, num_classes, layer_idx=-1)
        self.loss_func = nn.CrossEntropyLoss() if loss_func is None else loss_func

    def no_weight_decay(self):
        """Names of the parameters that no weight decay should touch, beside biases and norms."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x):
        """Images (B, in_chans, H, W) [S(0), B], first stage -> (B, N + 1, C), last stage."""
        x = self.patch_embed(x)
        cls_token = gather(self.cls_token).expand(x.shape[0], -1, -1).to_global(sbp=x.sbp)
        x = flow.cat((cls_token, x), dim=1)  # (B, N, C) -> (B, N + 1, C)
        return self.blocks(self.pos_drop(x + gather(self.pos_embed)))

    def forward_head(self, x):
        """(B, N + 1, C) -> logits (B, num_classes), from the class token alone."""
        return self.head(self.norm(x)[:, 0])

    def forward(self, images, labels=None):
        """Images (B, in_chans, H, W) on the first stage, labels (B,) on the last, both [S(0), B].

        Returns {"losses": scalar} when training with labels, else {"prediction_scores": logits}.
        """
        x = self.forward_head(self.forward_features(images))
        if labels is not None and self.training:
            return {"losses": self.loss_func(x, labels)}
        return {"prediction_scores": x}

    @staticmethod
    def set_pipeline_stage_id(model):
        """Give each part its stage; call it in an `nn.Graph`'s __init__, on its `self.model`.

        The placements alone make a pipeline; with the stage ids the engine also buffers between
        stages and runs forward and backward of different micro-batches at once, as 1F1B does.
        """

        def set_stage(part, kind, layer_idx):
            part.to(kind).set_stage(
                dist.get_layer_stage_id(layer_idx), dist.get_layer_placement(layer_idx)
            )

        for module in model.modules():
            if isinstance(module.to(nn.Module), TransformerLayer):
                set_stage(module, nn.graph.GraphModule, module.to(nn.Module).layer_idx)
        for tensor in (model.cls_token, model.pos_embed):
            set_stage(tensor, nn.graph.GraphTensor, 0)
        for module in (model.patch_embed, model.pos_drop):
            set_stage(module, nn.graph.GraphModule, 0)
        for module in (model.norm, model.head, model.loss_func):
            set_stage(module, nn.graph.GraphModule, -1)


# 5. Weights in and out --------------------------------------------------------------------------


def load_state_dict(model, arrays, keep_head=False):
    """Load whole numpy arrays by name, as `np.load` gives them, into the model, on any mesh.

    Names with a slash, a checkpoint's optimizer state, are passed over; with `keep_head` those of
    the head, too. Raises ValueError that names what is missing, surplus or misshapen, before
    anything is loaded.
    """

    def taken(name):
        return "/" not in name and not (keep_head and name.startswith("head."))

    parameters = {name: p for name, p in model.named_parameters() if taken(name)}
    shapes = {name: tuple(arrays[name].shape) for name in arrays if taken(name)}
    wrong = [f"{name} is missing" for name in parameters.keys() - shapes.keys()]
    wrong += [f"{name} is not in the model" for name in shapes.keys() - parameters.keys()]
    for name in parameters.keys() & shapes.keys():
        shape = tuple(parameters[name].shape)
        if shapes[name] != shape:
            wrong.append(f"{name} has shape {shapes[name]}, in the model {shape}")
    require(not wrong, "the weights are of another model: " + "; ".join(sorted(wrong)))
    for name, parameter in parameters.items():
        tensor = flow.tensor(np.ascontiguousarray(arrays[name], np.float32))
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


def load_timm_state_dict(model, state_dict, keep_head=False):
    """Load arrays or tensors under timm's names, which are flowvision's too, on any mesh.

    q, k and v, one after the other in timm, go side by side within each head. A position embedding
    of another grid is interpolated as in timm (bicubic, antialiased, class token kept). With
    `keep_head` the head keeps its initial values. Raises ValueError as `load_state_dict` does.
    Build the model with `layer_norm_eps=1e-6`, timm's value.
    """
    heads, arrays = model.blocks[0].self_attention.num_heads, {}
    for name, value in state_dict.items():
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
        if ".qkv." in name:
            array = _swap_rows(array, 3, heads)
        if name == "pos_embed" and array.shape != tuple(model.pos_embed.shape):
            old, new = (math.isqrt(shape[1] - 1) for shape in (array.shape, model.pos_embed.shape))
            grid = array[0, 1:].reshape(old, old, -1).astype(np.float32)
            grid = [
                Image.fromarray(g).resize((new, new), Image.BICUBIC) for g in np.rollaxis(grid, 2)
            ]
            array = np.concatenate([array[:, :1], np.stack(grid, -1).reshape(1, new * new, -1)], 1)
        for ours, theirs in TIMM_NAMES.items():
            name = name.replace(theirs, ours)
        arrays[name] = array
    load_state_dict(model, arrays, keep_head)


def to_timm_state_dict(model):
    """The inverse of `load_timm_state_dict`: whole numpy arrays, the same on every rank."""
    heads, arrays = model.blocks[0].self_attention.num_heads, {}
    for name, parameter in model.named_parameters():
        array = whole(parameter)
        for ours, theirs in TIMM_NAMES.items():
            name = name.replace(ours, theirs)
        if ".qkv." in name:
            array = _swap_rows(array, heads, 3)
        arrays[name] = array
    return arrays
