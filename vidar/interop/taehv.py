"""TAEHV's checkpoints (`taew2_1.pth`) in their one layout, the original.

That project's loader cuts surplus frames off the layers that make several frames of one, for previews of fewer frames.
`taew2_1` has none to cut; a checkpoint with others is refused.
"""

from collections.abc import Iterator

import jax
from flax import nnx

from vidar.errors import CheckpointError
from vidar.interop.sources import Tensors
from vidar.interop.tables import Row, Table
from vidar.models.codecs.taehv import BLOCKS, TAEHV, TAEHVConfig
from vidar.models.layers import Precision


def taehv_table(config: TAEHVConfig) -> Table:
    """Every tensor of the autoencoder."""
    return tuple(_rows(config))


def taehv_template(config: TAEHVConfig) -> TAEHV:
    """The autoencoder with `jax.ShapeDtypeStruct` leaves."""
    return jax.eval_shape(lambda: TAEHV(config, rngs=nnx.Rngs(0)))


def taehv_config(tensors: Tensors, precision: Precision | None = None) -> TAEHVConfig:
    """Reads off a checkpoint which TAEHV it is of; those for other latents of the same shapes look no different.

    Args:
        tensors: The checkpoint.
        precision: Types of the network; None is fp32.

    Returns:
        The network's config.

    Raises:
        CheckpointError: It is another network, or a TAEHV of another kind than Wan 2.1's.
    """
    names = {row.ours: row.theirs["original"] for row in taehv_table(TAEHVConfig())}

    def shape(ours: str) -> tuple[int, ...]:
        name = names[f"{ours}.kernel"]
        if name not in tensors or len(tensors[name].shape) != 4:
            raise CheckpointError(f"no TAEHV of Wan 2.1's kind: {name} is missing or no convolution's; use taew2_1")
        return tensors[name].shape

    stages = range(len(TAEHVConfig().growth))
    pixels = shape("decoder.leave")[0]
    if pixels != 3:
        name = names["decoder.leave.kernel"]
        raise CheckpointError(
            f"{name} makes {pixels} channels instead of 3, as TAEHVs for other models do; use taew2_1"
        )
    growth = []
    for stage in stages:
        up, down = f"decoder.stages.{stage}.time", f"encoder.stages.{len(stages) - 1 - stage}.time"
        (outputs, inputs), (merged, given) = shape(up)[:2], shape(down)[:2]
        if outputs * merged != given * inputs or outputs % inputs:
            theirs, others = names[f"{up}.kernel"], names[f"{down}.kernel"]
            raise CheckpointError(
                f"{theirs} makes {outputs} channels of {inputs}, where {others} makes {merged} of {given}: the decoder "
                "must make as many frames as the encoder merges; use taew2_1"
            )
        growth.append(outputs // inputs)
    widths = (shape("decoder.enter")[0], *(shape(f"decoder.stages.{stage}.space")[0] for stage in stages))
    channels, width = shape("decoder.enter")[1], shape("encoder.enter")[0]
    precision = precision or TAEHVConfig().precision
    return TAEHVConfig(channels=channels, width=width, widths=widths, growth=tuple(growth), precision=precision)


def _rows(config: TAEHVConfig) -> Iterator[Row]:
    def plain(ours: str, original: str) -> Row:
        return Row(f"{ours}.kernel", {"original": f"{original}.weight"}, "o i h w -> h w i o")

    def conv(ours: str, original: str) -> Iterator[Row]:
        yield Row(f"{ours}.kernel", {"original": f"{original}.weight"}, "o i h w -> 1 h w i o")
        yield Row(f"{ours}.bias", {"original": f"{original}.bias"})

    def blocks(ours: str, part: str, first: int) -> Iterator[Row]:
        for block in range(BLOCKS):
            for number, name in ((0, "inner"), (2, "middle"), (4, "outer")):
                yield from conv(f"{ours}.blocks.{block}.{name}", f"{part}.{first + block}.conv.{number}")

    # The original numbers layers without parameters, too: the activations, the clamp and the repetition of pixels.
    stages, down, up = len(config.growth), BLOCKS + 2, BLOCKS + 3
    yield from conv("encoder.enter", "encoder.0")
    yield from conv("encoder.leave", f"encoder.{2 + down * stages}")
    yield from conv("decoder.enter", "decoder.1")
    yield from conv("decoder.leave", f"decoder.{4 + up * stages}")
    for stage in range(stages):
        ours, first = f"encoder.stages.{stage}", 2 + down * stage
        yield plain(f"{ours}.time", f"encoder.{first}.conv")
        yield plain(f"{ours}.space", f"encoder.{first + 1}")
        yield from blocks(ours, "encoder", first + 2)
        ours, first = f"decoder.stages.{stage}", 3 + up * stage
        yield from blocks(ours, "decoder", first)
        yield plain(f"{ours}.time", f"decoder.{first + BLOCKS + 1}.conv")
        yield plain(f"{ours}.space", f"decoder.{first + BLOCKS + 2}")
