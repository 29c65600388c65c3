"""Wan 2.1's networks in two layouts: the original, which Self Forcing and its kin share, and diffusers'."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from vidar.errors import CheckpointError
from vidar.interop.sources import Tensors
from vidar.interop.tables import Row, Table
from vidar.models.codecs.wan_vae import WanVAE, WanVAEConfig
from vidar.models.dit import DiT, DiTConfig, ImageConfig, TextConfig
from vidar.models.layers import Precision
from vidar.models.umt5 import UMT5, UMT5Config

# A tensor by which each network and its layout are known.
DIT_MARKS = {"original": "head.head.weight", "diffusers": "proj_out.weight"}
VAE_MARKS = {"original": "decoder.head.0.gamma", "diffusers": "decoder.norm_out.gamma"}
UMT5_MARKS = {"original": "token_embedding.weight", "diffusers": "shared.weight"}
_LINEARS = (  # vidar's module, the original's, diffusers'
    ("text_inner", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_outer", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time.inner", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time.outer", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection", "time_projection.1", "condition_embedder.time_proj"),
    ("head", "head.head", "proj_out"),
    ("image.inner", "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("image.outer", "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("blocks.image_attention.key", "blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
    ("blocks.image_attention.value", "blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
    ("blocks.mlp.up", "blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.mlp.down", "blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
)
_ATTENTIONS = (("attention", "self_attn", "attn1"), ("text_attention", "cross_attn", "attn2"))
_PROJECTIONS = (("query", "q", "to_q"), ("key", "k", "to_k"), ("value", "v", "to_v"), ("output", "o", "to_out.0"))


# --------------------------------------------------------------------------------------------------------------- DiT


def dit_table(config: DiTConfig) -> Table:
    """Every tensor of a transformer of Wan's kind."""
    return tuple(_dit_rows(config))


def dit_template(config: DiTConfig) -> DiT:
    """The transformer with `jax.ShapeDtypeStruct` leaves."""
    return jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))


def dit_config(tensors: Tensors, head_dim: int = 128, precision: Precision | None = None) -> tuple[DiTConfig, str]:
    """Reads off a checkpoint which transformer it is of.

    Args:
        tensors: The checkpoint.
        head_dim: Channels of a head, which no shape tells; all of Wan's have 128.
        precision: Types of the network; None stores parameters as the checkpoint does and computes in bf16.

    Returns:
        The network's config, and the layout.

    Raises:
        CheckpointError: It is none of Wan's transformers.
    """
    rows = {row.ours: row for row in dit_table(DiTConfig())}
    layout = _layout(tensors, DIT_MARKS, "transformer")

    def name(ours: str, block: int = 0) -> str:
        return rows[ours].theirs[layout].format(block)

    def size(ours: str, axis: int) -> int:
        return _size(tensors, name(ours), axis)

    width, patch = size("patch.bias", 0), size("patch.kernel", 3)
    if width % head_dim:
        raise CheckpointError(
            f"the network is {width} wide, which heads of {head_dim} channels do not fill: give theirs (--head-dim, or "
            "attention_head_dim in config.json)"
        )
    layers = 0
    while name("blocks.modulation.table", layers) in tensors:
        layers += 1
    channels, mlp = size("head.kernel", 0) // patch**2, size("blocks.mlp.up.kernel", 0)
    image = None
    if name("image.inner.kernel") in tensors:
        image = ImageConfig(size("image.inner.kernel", 1), size("patch.kernel", 1) - channels)
    config = DiTConfig(
        width=width,
        layers=layers,
        heads=width // head_dim,
        mlp=mlp,
        channels=channels,
        patch=patch,
        time_channels=size("time.inner.kernel", 1),
        text=TextConfig(width=size("text_inner.kernel", 1)),
        image=image,
        precision=precision or Precision(params=tensors[name("blocks.mlp.up.kernel")].dtype.name),
    )
    return config, layout


def _layout(tensors: Tensors, marks: Mapping[str, str], what: str) -> str:
    for layout, name in marks.items():
        if name in tensors:
            return layout
    first = ", ".join(list(tensors)[:3])
    raise CheckpointError(f"no {what} of Wan's: it has neither {' nor '.join(marks.values())}, but {first} …")


def _size(tensors: Tensors, name: str, axis: int) -> int:
    stored = tensors.get(name)
    if stored is None or len(stored.shape) <= axis:
        raise CheckpointError(f"{name} is missing or has another shape than Wan's")
    return stored.shape[axis]


def dit_settings(config: DiTConfig) -> dict[str, Any]:
    """What diffusers keeps beside the weights, in `config.json`."""
    image = config.image
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, config.patch, config.patch],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.channels + (image.latents if image else 0),
        "out_channels": config.channels,
        "text_dim": config.text.width if config.text else 0,
        "freq_dim": config.time_channels,
        "ffn_dim": config.mlp,
        "num_layers": config.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image.width if image else None,
        "added_kv_proj_dim": config.width if image else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def _dit_rows(config: DiTConfig) -> Iterator[Row]:
    def row(ours: str, original: str, diffusers: str, pattern: str = "c -> c", **sizes: int) -> Row:
        return Row(ours, {"original": original, "diffusers": diffusers}, pattern, sizes)

    def linear(ours: str, original: str, diffusers: str, outputs: tuple[str, str] = ("o", "o"), **sizes: int) -> Any:
        there, here = outputs
        yield row(f"{ours}.kernel", f"{original}.weight", f"{diffusers}.weight", f"{there} i -> i {here}", **sizes)
        yield row(f"{ours}.bias", f"{original}.bias", f"{diffusers}.bias", f"{there} -> {here}", **sizes)

    patch = {"p": config.patch, "q": config.patch}
    yield row("patch.kernel", *["patch_embedding.weight"] * 2, "m c 1 p q -> (p q c) m", **patch)
    yield row("patch.bias", *["patch_embedding.bias"] * 2)
    table = "1 r m -> r m"
    yield row("blocks.modulation.table", "blocks.{}.modulation", "blocks.{}.scale_shift_table", table)
    yield row("head_modulation.table", "head.modulation", "scale_shift_table", table)
    for names in _LINEARS:
        yield from linear(*names)
    # Where positions rotate channels, Wan pairs neighbours, and vidar the two halves of a head.
    halves, heads = ("(n d two)", "(n two d)"), {"n": config.heads, "two": 2}
    for ours, original, diffusers in _ATTENTIONS:
        ours, original, diffusers = f"blocks.{ours}", f"blocks.{{}}.{original}", f"blocks.{{}}.{diffusers}"
        for part, letter, module in _PROJECTIONS:
            names = f"{ours}.{part}", f"{original}.{letter}", f"{diffusers}.{module}"
            rotated = ours == "blocks.attention" and part in ("query", "key")
            yield from linear(*names, outputs=halves, **heads) if rotated else linear(*names)
        for part, name in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            names = f"{ours}.{part}.weight", f"{original}.{name}.weight", f"{diffusers}.{name}.weight"
            yield row(*names, " -> ".join(halves), **heads) if ours == "blocks.attention" else row(*names)
    norms = "blocks.{}.cross_attn.norm_k_img.weight", "blocks.{}.attn2.norm_added_k.weight"
    yield row("blocks.image_attention.key_norm.weight", *norms)
    for name in ("weight", "bias"):
        # The norm before cross-attention is Wan's norm3 and diffusers' norm2; the other two have no parameters.
        yield row(f"blocks.text_norm.{name}", f"blocks.{{}}.norm3.{name}", f"blocks.{{}}.norm2.{name}")
        for ours, original, diffusers in (("norm", "proj.0", "norm1"), ("last_norm", "proj.4", "norm2")):
            theirs = f"img_emb.{original}.{name}", f"condition_embedder.image_embedder.{diffusers}.{name}"
            yield row(f"image.{ours}.{name}", *theirs)


# --------------------------------------------------------------------------------------------------------------- VAE


def vae_table(config: WanVAEConfig) -> Table:
    """Every tensor of the VAE."""
    return tuple(_vae_rows(config))


def vae_template(config: WanVAEConfig) -> WanVAE:
    """The VAE with `jax.ShapeDtypeStruct` leaves."""
    return jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))


def vae_config(
    tensors: Tensors, settings: Mapping[str, Any], precision: Precision | None = None
) -> tuple[WanVAEConfig, str]:
    """Reads off a checkpoint which VAE it is of.

    Args:
        tensors: The checkpoint.
        settings: What stands beside it: the statistics of the latents, which no checkpoint holds.
        precision: Types of the network; None is fp32.

    Returns:
        The network's config, and the layout.

    Raises:
        CheckpointError: It is no VAE of Wan's.
    """
    layout = _layout(tensors, VAE_MARKS, "VAE")
    names = {row.ours: row.theirs[layout] for row in vae_table(WanVAEConfig())}
    width, channels = (_size(tensors, names[name], 0) for name in ("encoder.enter.kernel", "from_latent.kernel"))
    config = WanVAEConfig(width=width)
    mean, deviation = (tuple(settings.get(f"latents_{name}", ())) for name in ("mean", "std"))
    if not mean and channels == config.channels:
        mean, deviation = config.mean, config.deviation  # Wan's own, which its files leave out
    mean, deviation = mean or (0.0,) * channels, deviation or (1.0,) * channels
    if len(mean) != channels:
        raise CheckpointError(f"{len(mean)} statistics of latents were given, the VAE has {channels} channels")
    return replace(config, mean=mean, deviation=deviation, precision=precision or config.precision), layout


def vae_settings(config: WanVAEConfig) -> dict[str, Any]:
    """What diffusers keeps beside the weights, in `config.json`."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.width,
        "z_dim": config.channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal),
        "dropout": 0.0,
        "latents_mean": list(config.mean),
        "latents_std": list(config.deviation),
    }


def _vae_rows(config: WanVAEConfig) -> Iterator[Row]:
    def conv(ours: str, original: str, diffusers: str, pattern: str = "o i t h w -> t h w i o") -> Iterator[Row]:
        names = {"original": original, "diffusers": diffusers}
        yield Row(f"{ours}.kernel", {layout: f"{name}.weight" for layout, name in names.items()}, pattern)
        yield Row(f"{ours}.bias", {layout: f"{name}.bias" for layout, name in names.items()})

    def norm(ours: str, original: str, diffusers: str, pattern: str = "c 1 1 1 -> c") -> Row:
        return Row(f"{ours}.weight", {"original": f"{original}.gamma", "diffusers": f"{diffusers}.gamma"}, pattern)

    def residual(ours: str, original: str, diffusers: str) -> Iterator[Row]:
        yield norm(f"{ours}.norm", f"{original}.residual.0", f"{diffusers}.norm1")
        yield from conv(f"{ours}.inner", f"{original}.residual.2", f"{diffusers}.conv1")
        yield norm(f"{ours}.inner_norm", f"{original}.residual.3", f"{diffusers}.norm2")
        yield from conv(f"{ours}.outer", f"{original}.residual.6", f"{diffusers}.conv2")
        yield from conv(f"{ours}.shortcut", f"{original}.shortcut", f"{diffusers}.conv_shortcut")

    def resampling(ours: str, original: str, diffusers: str) -> Iterator[Row]:
        yield from conv(f"{ours}.space", f"{original}.resample.1", f"{diffusers}.resample.1", "o i h w -> 1 h w i o")
        yield from conv(f"{ours}.time", f"{original}.time_conv", f"{diffusers}.time_conv")

    yield from conv("to_latent", "conv1", "quant_conv")
    yield from conv("from_latent", "conv2", "post_quant_conv")
    for part in ("encoder", "decoder"):
        yield from conv(f"{part}.enter", f"{part}.conv1", f"{part}.conv_in")
        yield norm(f"{part}.norm", f"{part}.head.0", f"{part}.norm_out")
        yield from conv(f"{part}.leave", f"{part}.head.2", f"{part}.conv_out")
        for index, number in ((0, 0), (2, 1)):
            names = f"{part}.middle.{index}", f"{part}.middle.{index}", f"{part}.mid_block.resnets.{number}"
            yield from residual(*names)
        ours, diffusers = f"{part}.middle.1", f"{part}.mid_block.attentions.0"
        yield norm(f"{ours}.norm", f"{ours}.norm", f"{diffusers}.norm", "c 1 1 -> c")
        flat = "o i 1 1 -> 1 1 1 i o"
        yield from conv(f"{ours}.inner", f"{ours}.to_qkv", f"{diffusers}.to_qkv", flat)
        yield from conv(f"{ours}.outer", f"{ours}.proj", f"{diffusers}.proj", flat)
        blocks = config.blocks + (part == "decoder")
        for index in range(len(config.multipliers) * (blocks + 1) - 1):
            level, block = divmod(index, blocks + 1)
            ours, original = f"{part}.layers.{index}", f"{part}.{'down' if part == 'encoder' else 'up'}samples.{index}"
            if part == "encoder":
                diffusers = f"encoder.down_blocks.{index}"
            else:
                place = "upsamplers.0" if block == blocks else f"resnets.{block}"
                diffusers = f"decoder.up_blocks.{level}.{place}"
            yield from (resampling if block == blocks else residual)(ours, original, diffusers)


# -------------------------------------------------------------------------------------------------------------- text


def umt5_table(config: UMT5Config) -> Table:
    """Every tensor of the text encoder; diffusers keeps it in the layout of transformers."""
    del config
    return tuple(_umt5_rows())


def umt5_template(config: UMT5Config) -> UMT5:
    """The text encoder with `jax.ShapeDtypeStruct` leaves."""
    return jax.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))


def umt5_config(
    tensors: Tensors, settings: Mapping[str, Any], precision: Precision | None = None
) -> tuple[UMT5Config, str]:
    """Reads off a checkpoint which text encoder it is of.

    Args:
        tensors: The checkpoint.
        settings: What stands beside it.
        precision: Types of the network; None is bf16.

    Returns:
        The network's config, and the layout.

    Raises:
        CheckpointError: It is no UMT5.
    """
    layout = _layout(tensors, UMT5_MARKS, "text encoder")
    names = {row.ours: row.theirs[layout] for row in umt5_table(UMT5Config())}
    first = {ours: name.format(0) for ours, name in names.items()}
    layers = 0
    while names["blocks.positions"].format(layers) in tensors:
        layers += 1
    heads = _size(tensors, first["blocks.positions"], 1)
    config = UMT5Config()
    config = UMT5Config(
        width=_size(tensors, first["embedding"], 1),
        layers=layers,
        heads=heads,
        head_dim=_size(tensors, first["blocks.query.kernel"], 0) // heads,
        mlp=_size(tensors, first["blocks.up.kernel"], 0),
        vocabulary=_size(tensors, first["embedding"], 0),
        buckets=_size(tensors, first["blocks.positions"], 0),
        distance=int(settings.get("relative_attention_max_distance", config.distance)),
        precision=precision or config.precision,
    )
    return config, layout


def umt5_settings(config: UMT5Config) -> dict[str, Any]:
    """What transformers keeps beside the weights, in `config.json`."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "vocab_size": config.vocabulary,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.distance,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
    }


def _umt5_rows() -> Iterator[Row]:
    def row(ours: str, original: str, transformers: str, pattern: str = "c -> c") -> Row:
        return Row(ours, {"original": f"{original}.weight", "diffusers": f"{transformers}.weight"}, pattern)

    block, attention, mlp = "encoder.block.{}.layer", "0.SelfAttention", "1.DenseReluDense"
    yield row("embedding", "token_embedding", "shared", "v c -> v c")
    yield row("norm.weight", "norm", "encoder.final_layer_norm")
    yield row("blocks.norm.weight", "blocks.{}.norm1", f"{block}.0.layer_norm")
    yield row("blocks.mlp_norm.weight", "blocks.{}.norm2", f"{block}.1.layer_norm")
    bias = f"{block}.{attention}.relative_attention_bias"
    yield row("blocks.positions", "blocks.{}.pos_embedding.embedding", bias, "b n -> b n")
    for ours, name in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        yield row(f"blocks.{ours}.kernel", f"blocks.{{}}.attn.{name}", f"{block}.{attention}.{name}", "o i -> i o")
    for ours, original, name in (("gate", "gate.0", "wi_0"), ("up", "fc1", "wi_1"), ("down", "fc2", "wo")):
        yield row(f"blocks.{ours}.kernel", f"blocks.{{}}.ffn.{original}", f"{block}.{mlp}.{name}", "o i -> i o")
