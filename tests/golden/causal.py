"""A small causal Wan transformer in PyTorch, and what it computes in parallel and generates through a rolling cache.

Written for these tests, from descriptions of Self Forcing (arXiv 2506.08009) and Wan 2.1 (arXiv 2503.20314), in the
plainest form there is: one forward with a mask, and one with a cache that changes in place. It computes in fp64, so
that what another implementation differs by is the other's rounding. `python -m tests.golden.causal` (with the `parity`
extra) writes the arrays that the default suite compares with; weights and inputs follow from names and shapes.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.wan import normal, weight

with contextlib.suppress(ImportError):  # the default suite reads cases, inputs and stored arrays only
    import torch
    import torch.nn.functional as nn

ARRAYS = Path(__file__).with_name("causal.npz")

HEADS, HEAD, LAYERS, MLP, TIME = 2, 24, 3, 96, 64
WIDTH = HEADS * HEAD
LATENT, PATCH = (4, 6, 4), 2
TOKENS = LATENT[0] * LATENT[1] // PATCH**2
ROWS, TEXT, LENGTHS = 2, (16, 32), (9, 5)
TIMES, SHIFT = (1000.0, 750.0, 500.0, 250.0), 5.0


@dataclass(frozen=True)
class Case:
    """How a clip is cut into blocks, and what a block sees.

    Attributes:
        chunk: Frames a block.
        frames: Frames of the clip.
        window: Frames that a block sees, counting itself and the sink; None for all.
        sink: First frames that are always seen.
        first: Whether the first frame is a block of its own.
        switch: Frame at which the prompt changes, or None.
    """

    chunk: int
    frames: int = 12
    window: int | None = None
    sink: int = 0
    first: bool = False
    switch: int | None = None

    def blocks(self) -> list[tuple[int, int]]:
        """First frame and end of every block."""
        sizes = [1] if self.first else []
        sizes += [self.chunk] * ((self.frames - len(sizes)) // self.chunk)
        ends = np.cumsum(sizes)
        return [(int(end) - size, int(end)) for size, end in zip(sizes, ends, strict=True)]


# One forward over all frames. The reference's mask knows no sink.
PARALLEL = {
    "chunk 3": Case(3),
    "chunk 1": Case(1),
    "chunk 3, window 6": Case(3, window=6),
    "chunk 3, window 5": Case(3, window=5),  # sees two of the last block's three frames
    "chunk 1, window 4": Case(1, window=4),
    "first frame alone": Case(3, frames=10, first=True),
}
# Block after block through the rolling cache.
CACHED = {
    "chunk 3": Case(3),
    "chunk 1": Case(1, frames=9),
    "chunk 3, window 6": Case(3, frames=15, window=6),
    "chunk 3, window 6, sink 3": Case(3, frames=18, window=6, sink=3),
    "chunk 3, window 9, sink 3": Case(3, frames=18, window=9, sink=3),
    "chunk 1, window 4, sink 1": Case(1, frames=10, window=4, sink=1),
    "image, window 7, sink 1": Case(3, frames=16, window=7, sink=1, first=True),
    "two prompts": Case(3, switch=6),
}


# ------------------------------------------------------------------------------------------------ weights and inputs


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, as Wan's own files have them."""
    linears = {
        "text_embedding.0": (WIDTH, TEXT[1]),
        "text_embedding.2": (WIDTH, WIDTH),
        "time_embedding.0": (WIDTH, TIME),
        "time_embedding.2": (WIDTH, WIDTH),
        "time_projection.1": (6 * WIDTH, WIDTH),
        "head.head": (PATCH**2 * LATENT[2], WIDTH),
    }
    found = {"patch_embedding.weight": (WIDTH, LATENT[2], 1, PATCH, PATCH), "patch_embedding.bias": (WIDTH,)}
    found |= {"head.modulation": (1, 2, WIDTH)}
    for block in (f"blocks.{number}" for number in range(LAYERS)):
        found |= {f"{block}.modulation": (1, 6, WIDTH)}
        found |= {f"{block}.norm3.{name}": (WIDTH,) for name in ("weight", "bias")}
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            linears |= {f"{attention}.{name}": (WIDTH, WIDTH) for name in "qkvo"}
            found |= {f"{attention}.norm_{name}.weight": (WIDTH,) for name in "qk"}
        linears |= {f"{block}.ffn.0": (MLP, WIDTH), f"{block}.ffn.2": (WIDTH, MLP)}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def text(number: int = 0) -> np.ndarray:
    """States of prompts, zero where padding is."""
    kept = np.arange(TEXT[0])[None, :] < np.roll(LENGTHS, number)[:, None]
    return normal(f"text {number}", (ROWS, *TEXT)) * kept[..., None].astype(np.float32)


def noise(step: int, frames: int) -> np.ndarray:
    """Noise that frames start from, and of each re-noising, `[b, f, h, w, c]`."""
    return normal(f"noise {step}", (ROWS, 32, *LATENT))[:, :frames]


def clean(frames: int) -> np.ndarray:
    """Given latents."""
    return normal("clean", (ROWS, frames, *LATENT))


def block_times(case: Case) -> np.ndarray:
    """Times of all frames, `[b, f]`: one for each block, another for each row."""
    drawn = np.random.default_rng(7).permutation(np.linspace(0, 1000, 2 * case.frames, dtype=np.float32))
    time = np.empty((ROWS, case.frames), np.float32)
    for index, (start, end) in enumerate(case.blocks()):
        time[:, start:end] = drawn[2 * index : 2 * index + ROWS, None]
    return time


# ----------------------------------------------------------------------------------------------------- transformer


class Transformer:
    """Latents are `[b, f, h, w, c]`, times `[b, f]` in [0, 1000], tokens `[b, t, d]` by frame, row, column."""

    def __init__(self, dtype: str = "float64"):
        self.dtype = getattr(torch, dtype)
        self.weights = {name: self.tensor(weight(name, shape)) for name, shape in shapes().items()}

    def tensor(self, array: Any) -> Any:
        """An array of numpy's or torch's in the type that is computed in."""
        return torch.as_tensor(array).to(self.dtype)

    def __call__(self, latents: Any, time: Any, prompt: list[Any], attend: Callable[..., Any], start: int = 0) -> Any:
        """Predicts velocities.

        Args:
            latents: Frames.
            time: Their times.
            prompt: From `prompt`.
            attend: Self-attention: block, queries, keys, values → output, all `[b, t, n, d]`.
            start: Place of the first frame in the clip.

        Returns:
            Of the shape of the latents.
        """
        given = self.tensor(latents).permute(0, 4, 1, 2, 3)
        kernel, bias = (self.weights[f"patch_embedding.{name}"] for name in ("weight", "bias"))
        x = nn.conv3d(given, kernel, bias, stride=(1, PATCH, PATCH))
        frames, rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        turn = rotations(start, frames, rows, columns)
        e, e0 = self.embedding(time)
        for number in range(LAYERS):
            x = self.block(number, x, e0, turn, prompt[number], attend)
        shift, scale = (self.weights["head.modulation"] + e[:, :, None]).unbind(2)
        x = self.linear("head.head", by_frame(layer_norm(x), 1 + scale, shift))
        x = x.view(x.shape[0], frames, rows, columns, PATCH, PATCH, -1)
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(latents.shape)

    def block(self, number: int, x: Any, e0: Any, turn: Any, prompt: Any, attend: Callable[..., Any]) -> Any:
        """Self-attention, cross-attention, MLP."""
        name = f"blocks.{number}"
        modulation = self.weights[f"{name}.modulation"] + e0
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)
        own, cross = f"{name}.self_attn", f"{name}.cross_attn"
        hidden = by_frame(layer_norm(x), 1 + scale1, shift1)
        query, key = (rotate(self.normed(own, letter, hidden), turn).to(self.dtype) for letter in "qk")
        value = self.linear(f"{own}.v", hidden).unflatten(-1, (HEADS, HEAD))
        x = x + by_frame(self.linear(f"{own}.o", attend(number, query, key, value).flatten(-2)), gate1)
        hidden = layer_norm(x) * self.weights[f"{name}.norm3.weight"] + self.weights[f"{name}.norm3.bias"]
        mixed = attention(self.normed(cross, "q", hidden), *prompt)
        x = x + self.linear(f"{cross}.o", mixed.flatten(-2))
        hidden = by_frame(layer_norm(x), 1 + scale2, shift2)
        hidden = nn.gelu(self.linear(f"{name}.ffn.0", hidden), approximate="tanh")
        return x + by_frame(self.linear(f"{name}.ffn.2", hidden), gate2)

    def prompt(self, states: np.ndarray) -> list[Any]:
        """Keys and values of a prompt in every block, padding included; they serve as long as the prompt does."""
        hidden = nn.gelu(self.linear("text_embedding.0", self.tensor(states)), approximate="tanh")
        hidden = self.linear("text_embedding.2", hidden)
        names = [f"blocks.{number}.cross_attn" for number in range(LAYERS)]
        values = [self.linear(f"{name}.v", hidden).unflatten(-1, (HEADS, HEAD)) for name in names]
        return [(self.normed(name, "k", hidden), value) for name, value in zip(names, values, strict=True)]

    def embedding(self, time: Any) -> tuple[Any, Any]:
        """What the head adds to its table, `[b, f, d]`, and what the blocks do, `[b, f, 6, d]`."""
        half = TIME // 2
        rate = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.as_tensor(time).double()[..., None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.dtype)
        e = self.linear("time_embedding.2", nn.silu(self.linear("time_embedding.0", waves)))
        return e, self.linear("time_projection.1", nn.silu(e)).unflatten(-1, (6, WIDTH))

    def linear(self, name: str, x: Any) -> Any:
        """An affine map."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normed(self, name: str, letter: str, x: Any) -> Any:
        """Queries or keys, normed over all heads together, `[b, t, n, d]`."""
        x = self.linear(f"{name}.{letter}", x)
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weights[f"{name}.norm_{letter}.weight"]
        return x.unflatten(-1, (HEADS, HEAD))


def layer_norm(x: Any) -> Any:
    """Without parameters."""
    return nn.layer_norm(x, (WIDTH,), eps=1e-6)


def by_frame(x: Any, scale: Any, shift: Any = None) -> Any:
    """Scales, and shifts, the tokens of each frame by its own `[b, f, d]`."""
    frames = x.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]
    return (frames if shift is None else frames + shift[:, :, None]).flatten(1, 2)


def rotations(start: int, frames: int, rows: int, columns: int) -> Any:
    """Unit complex numbers, one for every token and pair of neighbouring channels of a head; time, row, column."""
    sides = torch.arange(start, start + frames), torch.arange(rows), torch.arange(columns)
    third = 2 * (HEAD // 6)
    angles = []
    for place, size in zip(torch.meshgrid(*sides, indexing="ij"), (HEAD - 2 * third, third, third), strict=True):
        frequency = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles.append(place.flatten().double()[:, None] * frequency)
    angle = torch.cat(angles, 1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Any, turn: Any) -> Any:
    """Turns pairs of neighbouring channels, in fp64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def attention(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    """Softmax attention over `[b, t, n, d]`; `mask` says which keys a query sees."""
    score = torch.einsum("bqnd,bknd->bnqk", query, key) / HEAD**0.5
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    return torch.einsum("bnqk,bknd->bqnd", score.softmax(-1), value)


# ------------------------------------------------------------------------------------------------------- mask, cache


def visible(case: Case) -> np.ndarray:
    """Which frames see which: up to the end of their block, and `window` frames back from that end."""
    seen = np.zeros((case.frames, case.frames), bool)
    for start, end in case.blocks():
        seen[start:end, 0 if case.window is None else max(0, end - case.window) : end] = True
    return seen


class Cache:
    """One block's keys and values, in place: a rolling buffer behind a sink, or room for the clip.

    Attributes:
        seen: Frames that the last call attended to.
    """

    def __init__(self, case: Case, dtype: Any):
        self.capacity = (case.window or case.frames) * TOKENS
        self.rolls = case.window is not None
        self.sink = case.sink * TOKENS
        self.keys, self.values = (torch.zeros(ROWS, self.capacity, HEADS, HEAD, dtype=dtype) for _ in range(2))
        self.frames = torch.full((1, self.capacity), -1)
        self.global_end = self.local_end = 0
        self.seen: list[int] = []

    def attend(self, start: int, query: Any, key: Any, value: Any) -> Any:
        """Writes a block's keys and values, which begin at token `start` of the clip, and attends to what is held."""
        new = key.shape[1]
        end = start + new
        buffers = self.keys, self.values, self.frames
        if self.rolls and end > self.global_end and self.local_end + new > self.capacity:
            evicted = self.local_end + new - self.capacity
            for buffer in buffers:
                moved = buffer[:, self.sink + evicted : self.local_end].clone()
                buffer[:, self.sink : self.sink + moved.shape[1]] = moved
            self.local_end -= evicted
        # A block that comes again, for its next step or its clean pass, ends where the last one did.
        self.local_end += end - self.global_end
        self.global_end = end
        own = torch.arange(start, end)[None] // TOKENS
        for buffer, written in zip(buffers, (key, value, own), strict=True):
            buffer[:, self.local_end - new : self.local_end] = written
        held = slice(max(0, self.local_end - self.capacity), self.local_end)
        self.seen = sorted(set(self.frames[0, held].tolist()))
        return attention(query, self.keys[:, held], self.values[:, held])


def cached(model: Transformer, caches: list[Cache], latents: Any, time: float, prompt: list[Any], start: int) -> Any:
    """One forward of a block of frames through the caches."""
    times = torch.full(latents.shape[:2], time, dtype=torch.float32)
    return model(latents, times, prompt, lambda number, *qkv: caches[number].attend(start * TOKENS, *qkv), start)


# --------------------------------------------------------------------------------------------------------- schedule


def grid(shift: float) -> np.ndarray:
    """The scheduler's thousand levels, shifted."""
    u = 1 - np.arange(1000) / 1000
    return shift * u / (1 + (shift - 1) * u)


def warped(times: tuple[float, ...], shift: float) -> np.ndarray:
    """A list of steps, as times on the shifted grid."""
    return np.append(1000 * grid(shift), 0.0)[1000 - np.asarray(times, int)]


def bump(shift: float) -> np.ndarray:
    """Loss weights of the grid's times."""
    weights = np.exp(-2 * ((1000 * grid(shift) - 500) / 1000) ** 2)
    weights = weights - weights.min()
    return weights * len(weights) / weights.sum()


# ---------------------------------------------------------------------------------------------------- what is stored


def parallel(name: str, dtype: str = "float64") -> np.ndarray:
    """Velocities of one forward over given latents, at a level for each block, under the mask."""
    model, case = Transformer(dtype), PARALLEL[name]
    mask = torch.from_numpy(np.kron(visible(case), np.ones((TOKENS, TOKENS), bool)))
    attend = partial(attention, mask=mask)
    velocity = model(clean(case.frames), block_times(case), model.prompt(text()), lambda _, *qkv: attend(*qkv))
    return velocity.numpy()


def streamed(name: str, dtype: str = "float64") -> np.ndarray:
    """Velocities of given latents at time 0, block after block through the caches."""
    model, case = Transformer(dtype), CACHED[name]
    caches, given, prompt = [Cache(case, model.dtype) for _ in range(LAYERS)], clean(case.frames), model.prompt(text())
    parts = [cached(model, caches, given[:, start:end], 0.0, prompt, start) for start, end in case.blocks()]
    return torch.cat(parts, 1).numpy()


def rollout(name: str, dtype: str = "float64") -> tuple[np.ndarray, np.ndarray]:
    """Generates a clip.

    Returns:
        Latents, a given first one included, and which frames each block attends to, bool `[blocks, f]`.
    """
    model, case = Transformer(dtype), CACHED[name]
    caches, prompts = [Cache(case, model.dtype) for _ in range(LAYERS)], [model.prompt(text(n)) for n in range(2)]
    steps = warped(TIMES, SHIFT).astype(np.float32).tolist()
    parts, seen = [], np.zeros((len(case.blocks()), case.frames), bool)
    for index, (start, end) in enumerate(case.blocks()):
        prompt = prompts[case.switch is not None and start >= case.switch]
        forward = partial(cached, model, caches, prompt=prompt, start=start)
        if case.first and not index:
            x = model.tensor(clean(1))
        else:
            x = model.tensor(noise(0, case.frames)[:, start:end])
            for step, time in enumerate(steps):
                if step:
                    fresh = model.tensor(noise(step, case.frames)[:, start:end])
                    x = (1 - time / 1000) * x + time / 1000 * fresh
                x = (x.double() - time / 1000 * forward(x, time=time).double()).to(model.dtype)
                seen[index, caches[0].seen] = True
        forward(x, time=0.0)  # what later blocks see of this one
        seen[index, caches[0].seen] = True
        parts.append(x)
    return torch.cat(parts, 1).numpy(), seen


def arrays() -> dict[str, Any]:
    """Everything that is stored."""
    found = {f"parallel: {name}": parallel(name).astype(np.float32) for name in PARALLEL}
    for name, case in CACHED.items():
        latents, found[f"seen: {name}"] = rollout(name)
        found[f"rollout: {name}"] = latents.astype(np.float32)
        if case.switch is None:
            found[f"streamed: {name}"] = streamed(name).astype(np.float32)
    found |= {f"warped: {shift}": warped(TIMES, shift) for shift in (5, 8)}
    return found | {f"bump: {shift}": bump(shift)[::37] for shift in (5, 8)}


def main() -> None:
    """Writes the arrays."""
    np.savez_compressed(ARRAYS, **arrays())


if __name__ == "__main__":
    main()
