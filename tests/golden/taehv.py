"""What a TAEHV computes that is written frame by frame in torch, with seeded weights, and how the original names them.

`python -m tests.golden.taehv` (with the `parity` extra) writes the arrays and names that the default suite compares
with. Every layer here turns a series of frames into another, one at a time; nothing knows of chunks or of clips.
Weights and inputs follow from names and shapes alone, so that only outputs are stored.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.wan import normal, pixels

ARRAYS = Path(__file__).with_name("taehv.npz")
SMALL: dict[str, Any] = dict(channels=4, width=8, widths=(16, 12, 8, 10))
REAL: dict[str, Any] = dict(channels=16, width=64, widths=(256, 128, 64, 64))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that follows from its name: activations keep their size, and most pixels come to lie in [0, 1]."""
    numbers = normal(name, shape)
    if name == "decoder.22.bias":
        return 0.5 + 0.1 * numbers
    if name.endswith("bias"):
        return 0.1 * numbers
    gain = 0.3 if name == "decoder.22.weight" else 0.6 if name.endswith("conv.4.weight") else 1.2
    return np.float32(gain * np.prod(shape[1:]) ** -0.5) * numbers


def clip(size: str) -> np.ndarray:
    """A clip to encode, uint8 `[b, 1 + 4 n, h, w, 3]`."""
    return pixels() if size == "small" else pixels()[:1, :5, :16, :24]


def latents(size: str) -> np.ndarray:
    """Latents to decode, some far beyond the bounds: `[b, f, h, w, c]`."""
    return 1.5 * normal("latents", (2, 4, 3, 4, 4) if size == "small" else (1, 2, 2, 3, 16))


def network(channels: int, width: int, widths: tuple[int, ...]):
    """The encoder and decoder in torch, under the original's names."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Each(nn.Module):
        """A function of each frame alone."""

        def __init__(self, function):
            super().__init__()
            self.function = function

        def frames(self, series):
            yield from map(self.function, series)

    class Conv(nn.Conv2d):
        def __init__(self, inputs, outputs, **options):
            super().__init__(inputs, outputs, 3, padding=1, **options)

        def frames(self, series):
            yield from map(self, series)

    class Remember(nn.Module):
        """Sees each frame together with the one before it; before the first there is one of zeros."""

        def __init__(self, size):
            super().__init__()
            self.conv = nn.ModuleDict({"0": Conv(2 * size, size), "2": Conv(size, size), "4": Conv(size, size)})

        def frames(self, series):
            before = None
            for frame in series:
                before = torch.zeros_like(frame) if before is None else before
                update = self.conv["0"](torch.cat((frame, before), dim=1)).relu()
                yield (frame + self.conv["4"](self.conv["2"](update).relu())).relu()
                before = frame

    class Merge(nn.Module):
        """One frame of several; the earliest frame's channels come first."""

        def __init__(self, size, count):
            super().__init__()
            self.conv, self.count = nn.Conv2d(count * size, size, 1, bias=False), count

        def frames(self, series):
            held = []
            for frame in series:
                held.append(frame)
                if len(held) == self.count:
                    yield self.conv(torch.cat(held, dim=1))
                    held = []

    class Grow(nn.Module):
        """Several frames of one, in the same order."""

        def __init__(self, size, count):
            super().__init__()
            self.conv, self.count = nn.Conv2d(size, count * size, 1, bias=False), count

        def frames(self, series):
            for frame in series:
                yield from self.conv(frame).split(frame.shape[1], dim=1)

    def relu():
        return Each(functional.relu)

    encoder = [Conv(3, width), relu()]
    for count in (2, 2, 1):
        encoder += [Merge(width, count), Conv(width, width, stride=2, bias=False), *(Remember(width) for _ in range(3))]
    encoder.append(Conv(width, channels))
    decoder = [Each(lambda frame: 3 * (frame / 3).tanh()), Conv(channels, widths[0]), relu()]
    for inputs, outputs, count in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True):
        decoder += [Remember(inputs) for _ in range(3)]
        decoder.append(Each(lambda frame: functional.interpolate(frame, scale_factor=2, mode="nearest")))
        decoder += [Grow(inputs, count), Conv(inputs, outputs, bias=False)]
    decoder += [relu(), Conv(widths[-1], 3)]
    return nn.ModuleDict({"encoder": nn.ModuleList(encoder), "decoder": nn.ModuleList(decoder)}).eval()


def seeded(**sizes):
    """The network with its seeded weights."""
    import torch

    model = network(**sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def through(layers, video: np.ndarray) -> np.ndarray:
    """Sends a channels-last video through layers."""
    import torch

    with torch.no_grad():
        series = iter(torch.from_numpy(np.ascontiguousarray(video)).permute(1, 0, 4, 2, 3))
        for layer in layers:
            series = layer.frames(series)
        return torch.stack(list(series), dim=1).permute(0, 1, 3, 4, 2).numpy()


def encoded(model, video: np.ndarray) -> np.ndarray:
    """Latents of a uint8 clip, whose last frame is repeated until fours are full."""
    missing = -video.shape[1] % 4
    whole = np.concatenate([video, *[video[:, -1:]] * missing], axis=1)
    return through(model["encoder"], whole.astype(np.float32) / 255)


def decoded(model, video: np.ndarray) -> np.ndarray:
    """Frames of latents in [-1, 1]; the first three of all are dropped."""
    return 2 * through(model["decoder"], video)[:, 3:].clip(0, 1) - 1


def names() -> dict[str, list[int]]:
    """Names and shapes of the published network's tensors."""
    import torch

    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in network(**REAL).state_dict().items()}


def main() -> None:
    """Writes arrays and names."""
    arrays: dict[str, Any] = {"names": np.asarray(json.dumps(names()))}
    for size, sizes in (("small", SMALL), ("real", REAL)):
        model = seeded(**sizes)
        arrays[f"{size}_encoded"] = encoded(model, clip(size))
        arrays[f"{size}_decoded"] = decoded(model, latents(size))
    np.savez_compressed(ARRAYS, **arrays)


if __name__ == "__main__":
    main()
