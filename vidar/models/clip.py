"""CLIP's image encoder (arXiv 2103.00020), whose features of an image Wan's image-to-video transformer attends to.

Wan takes the states after the last but one block, without a norm. All tensors of a checkpoint's vision tower have their
place here; those that come later (the last block and the norm after it) are kept and not run. Dimension letters as
elsewhere; t tokens: the class token first, then patches row by row. Files are read elsewhere.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from vidar.errors import ConfigError, check_range
from vidar.models.layers import LayerNorm, Linear, Precision, Projections

EPS = 1e-5
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_CUBIC = -0.75  # slope of the interpolation kernel at distance 1, as PyTorch has it


@dataclass(frozen=True)
class CLIPConfig:
    """Shape of the encoder; the defaults are ViT-H/14's.

    Attributes:
        width: Model width.
        layers: Blocks, the last of which is kept but not run.
        heads: Attention heads.
        mlp: Hidden width of the MLP.
        patch: Pixels of a patch's side.
        size: Pixels of the image's side; other images are resized to it.
        precision: Types.
    """

    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp: int = 5120
    patch: int = 14
    size: int = 224
    precision: Precision = Precision(params="bfloat16", compute="bfloat16")

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp", "patch", "size"):
            check_range(f"image_encoder.{name}", getattr(self, name), least=1)
        for whole, part in (("width", "heads"), ("size", "patch")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"image_encoder.{whole}={getattr(self, whole)} must be a multiple of "
                    f"image_encoder.{part}={getattr(self, part)}"
                )

    @property
    def tokens(self) -> int:
        """Tokens of an image: its patches and the class token."""
        return 1 + (self.size // self.patch) ** 2


def cubic_weights(length: int, size: int) -> np.ndarray:
    """Weights of bicubic interpolation along one axis, float32 `[size, length]`.

    Pixels are areas (PyTorch's `align_corners=False`), what lies outside repeats the border, and nothing is smoothed
    before it is made smaller (Keys 1981, with slope -0.75).
    """
    centre = (np.arange(size) + 0.5) * (length / size) - 0.5
    nearest = np.floor(centre).astype(np.int64)
    weights = np.zeros((size, length))
    for tap in range(-1, 3):
        far = np.abs(centre - nearest - tap)
        near_value = ((_CUBIC + 2) * far - (_CUBIC + 3)) * far**2 + 1
        far_value = _CUBIC * (((far - 5) * far + 8) * far - 4)
        column = np.clip(nearest + tap, 0, length - 1)
        np.add.at(weights, (np.arange(size), column), np.where(far <= 1, near_value, far_value))
    return weights.astype(np.float32)


def prepare(pixels_bhwc: jax.Array, config: CLIPConfig) -> jax.Array:
    """Images as the encoder wants them, which is as Wan's own code prepares them.

    The whole image is stretched to a square. The processor of transformers, which diffusers uses, smooths and crops
    instead, so its features differ.

    Args:
        pixels_bhwc: Images of any size, uint8 `[b, h, w, 3]`.
        config: Shape of the encoder.

    Returns:
        Images of zero mean and unit deviation over CLIP's training data, fp32 `[b, size, size, 3]`.

    Raises:
        ConfigError: The images are of another kind.
    """
    shape = tuple(pixels_bhwc.shape)
    if pixels_bhwc.dtype != jnp.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ConfigError(f"images must be uint8 [b, h, w, 3], got {pixels_bhwc.dtype} {list(shape)}")
    rows, columns = (jnp.asarray(cubic_weights(length, config.size)) for length in shape[1:3])
    # Wan resizes values in [-1, 1] and brings them to [0, 1] after that: the same, as weights sum to one. Neither cuts
    # off what overshoots. Full precision, because accelerators would otherwise round the image itself.
    values = jnp.asarray(pixels_bhwc).astype(jnp.float32) / 255.0
    values = jnp.einsum("bhwc,yh,xw->byxc", values, rows, columns, precision=jax.lax.Precision.HIGHEST)
    mean, deviation = (jnp.broadcast_to(jnp.float32(numbers), values.shape) for numbers in (MEAN, DEVIATION))
    return (values - mean) / deviation


class CLIPBlock(nnx.Module):
    """Self-attention and an MLP around an exact GELU, each after a norm."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        dtype, width = config.precision.params, config.width
        self.norm = LayerNorm(width, dtype=dtype, eps=EPS)
        self.attention = Projections(width, config.heads, "none", rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(width, dtype=dtype, eps=EPS)
        self.up = Linear(width, config.mlp, rngs=rngs, dtype=dtype)
        self.down = Linear(config.mlp, width, rngs=rngs, dtype=dtype)

    def __call__(self, x_btm: jax.Array) -> jax.Array:
        """One block."""
        dtype, attention = x_btm.dtype, self.attention
        hidden = self.norm(x_btm)
        parts = (part(hidden, dtype) for part in (attention.queries, attention.keys, attention.values))
        with jax.numpy_dtype_promotion("standard"):
            mixed = jax.nn.dot_product_attention(*parts)
        x_btm = x_btm + attention.merge(mixed, dtype)
        hidden = jax.nn.gelu(self.up(self.mlp_norm(x_btm), dtype), approximate=False)
        return x_btm + self.down(hidden, dtype)


class CLIP(nnx.Module):
    """The encoder."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        """Creates the parameters.

        Args:
            config: Shape.
            rngs: Source of the initial values.
        """
        dtype, width = config.precision.params, config.width

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param((width**-0.5 * jax.random.normal(rngs.params(), shape)).astype(dtype))

        self.config = config
        self.patch = Linear(3 * config.patch**2, width, rngs=rngs, bias=False, dtype=dtype)
        self.class_token, self.positions = normal(width), normal(config.tokens, width)
        self.first_norm = LayerNorm(width, dtype=dtype, eps=EPS)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: CLIPBlock(config, rngs=nnx.Rngs(key)))(keys)
        self.last_norm = LayerNorm(width, dtype=dtype, eps=EPS)

    def __call__(self, pixels_bhwc: jax.Array) -> jax.Array:
        """Features of images.

        Args:
            pixels_bhwc: Images of any size, uint8 `[b, h, w, 3]`.

        Returns:
            States after the last but one block `[b, t, m]` in the compute type, t = 1 + (size / patch)².

        Raises:
            ConfigError: The images are of another kind.
        """
        config = self.config
        dtype, sides = jnp.dtype(config.precision.compute), {"p": config.patch, "q": config.patch}
        values = prepare(pixels_bhwc, config)
        patches = self.patch(rearrange(values, "b (h p) (w q) c -> b (h w) (p q c)", **sides), dtype)
        class_token = jnp.broadcast_to(self.class_token[...].astype(dtype), (len(patches), 1, config.width))
        x_btm = jnp.concatenate([class_token, patches], axis=1)
        x_btm = self.first_norm(x_btm + self.positions[...].astype(dtype)[None])

        def block(x_btm: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            # By number: a stack without its last block would be a copy of all the others.
            part = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self.blocks)
            return part(x_btm), None

        x_btm, _ = jax.lax.scan(block, x_btm, jnp.arange(config.layers - 1, dtype=jnp.int32))
        return x_btm
