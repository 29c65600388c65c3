"""Visibility: which token may attend to which, as predicates on token metadata.

A predicate says nothing about kernels: it is evaluated on numpy metadata (static masks, segments), on traced metadata
(levels, ring slots of a live session) or inside a kernel (splash). Metadata is per frame: every token of a frame has
the frame's metadata. This room must not know networks, caches or back ends.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

NOISY, CLEAN = 0, 1
STATIC_FIELDS = frozenset({"frame", "chunk", "end", "role"})


@dataclass(frozen=True)
class Layout:
    """Static description of the frames of one stream; hashable.

    Attributes:
        offsets: Each frame's offset from its session's start frame.
        chunks: Each frame's chunk, counted from the stream's first chunk.
        ends: Offset just past the last frame of each frame's chunk.
        roles: `NOISY` or `CLEAN`, per frame.
    """

    offsets: tuple[int, ...]
    chunks: tuple[int, ...]
    ends: tuple[int, ...]
    roles: tuple[int, ...]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.offsets)


def chunk_layout(frames: int, chunk: int, *, independent_first_frame: bool = False, role: int = NOISY) -> Layout:
    """Lays `frames` consecutive frames out in chunks of `chunk` frames.

    Args:
        frames: Number of frames.
        chunk: Frames a chunk; the last chunk may be cut short by `frames`.
        independent_first_frame: Whether the first frame is a chunk of its own: sizes 1, n, n, ...
        role: Role of all frames.

    Returns:
        The layout.
    """
    pad = chunk - 1 if independent_first_frame else 0
    chunks = tuple((frame + pad) // chunk for frame in range(frames))
    ends = tuple(min((index + 1) * chunk - pad, frames) for index in chunks)
    return Layout(tuple(range(frames)), chunks, ends, (role,) * frames)


@dataclass(frozen=True)
class Tokens:
    """Metadata of queries or keys; integer arrays that broadcast against each other.

    Attributes:
        frame: Frame index, relative to whatever both sides share.
        chunk: Chunk index.
        end: Index just past the last frame of the chunk.
        role: `NOISY` or `CLEAN`.
        level: Noise level in [0, 1], or None where it is not known.
        written: Whether a cache slot holds anything, or None where every key does.
    """

    frame: Any
    chunk: Any
    end: Any
    role: Any
    level: Any = None
    written: Any = None

    def expand(self, axis: int) -> "Tokens":
        """Metadata with one broadcast axis inserted at `axis` of every array."""

        def insert(value: Any) -> Any:
            if value is None:
                return None
            return value[(..., None)] if axis == -1 else value[(..., None, slice(None))]

        return Tokens(*(insert(getattr(self, name)) for name in self.__dataclass_fields__))


def tokens_of(layout: Layout, level_bf: Any = None) -> Tokens:
    """Numpy metadata of a layout, one entry a frame."""
    arrays = (np.asarray(values, np.int32) for values in (layout.offsets, layout.chunks, layout.ends, layout.roles))
    return Tokens(*arrays, level=level_bf)


@dataclass(frozen=True)
class Visibility:
    """Base of all predicates: `q & r`, `q | r`, and `sees(query, key)` on broadcastable metadata.

    Attributes:
        reads: Metadata beyond the static layout that the predicate reads.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Whether `query` may attend to `key` (a boolean array of the broadcast shape)."""
        raise TypeError(f"{type(self).__name__} does not define who sees whom")

    def __and__(self, other: "Visibility") -> "Visibility":
        return Both(self, other)

    def __or__(self, other: "Visibility") -> "Visibility":
        return Either(self, other)


@dataclass(frozen=True)
class Both(Visibility):
    """What both predicates allow."""

    kind: ClassVar[str] = "both"
    left: Visibility = field(default_factory=Visibility)
    right: Visibility = field(default_factory=Visibility)

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Metadata that either side reads."""
        return self.left.reads | self.right.reads

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Logical and of both sides."""
        return self.left.sees(query, key) & self.right.sees(query, key)


@dataclass(frozen=True)
class Either(Visibility):
    """What one of the predicates allows."""

    kind: ClassVar[str] = "either"
    left: Visibility = field(default_factory=Visibility)
    right: Visibility = field(default_factory=Visibility)

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Metadata that either side reads."""
        return self.left.reads | self.right.reads

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Logical or of both sides."""
        return self.left.sees(query, key) | self.right.sees(query, key)


@dataclass(frozen=True)
class Bidirectional(Visibility):
    """Every token sees every token of the sequence."""

    kind: ClassVar[str] = "bidirectional"

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """True everywhere."""
        return (query.chunk >= 0) & (key.chunk >= 0)


@dataclass(frozen=True)
class ChunkCausal(Visibility):
    """A chunk sees itself and the chunks before it (Self Forcing's block-causal mask)."""

    kind: ClassVar[str] = "chunk_causal"

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Keys of the query's chunk or of an earlier one."""
        return key.chunk <= query.chunk


@dataclass(frozen=True)
class Window(Visibility):
    """A query sees the sink and the last frames up to the end of its own chunk, `size` frames in all.

    Attributes:
        size: Frames a query may see, counting sink, past and its own chunk.
        sink: First frames of the session that are always in view.
    """

    kind: ClassVar[str] = "window"
    size: int
    sink: int = 0

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Sink frames, and frames no further back than the window measured from the end of the query's chunk."""
        return (key.frame >= query.end - (self.size - self.sink)) | (key.frame < self.sink)


@dataclass(frozen=True)
class TeacherForcing(Visibility):
    """Clean frames beside noisy ones: a noisy chunk sees the clean chunks before it and itself; clean sees clean.

    Source: the teacher-forcing mask of Self Forcing (arXiv 2506.08009), clean half before noisy half.
    """

    kind: ClassVar[str] = "teacher_forcing"

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Clean keys of the past (own chunk only for clean queries), noisy keys of the query's own chunk."""
        clean_key = key.role == CLEAN
        clean_query = query.role == CLEAN
        past = key.chunk < query.chunk
        own = key.chunk == query.chunk
        return (clean_key & (past | (own & clean_query))) | (~clean_key & ~clean_query & own)


@dataclass(frozen=True)
class Identity(Visibility):
    """Clean (reference) frames see only themselves, noisy frames see everything (MarDini, arXiv 2410.20280)."""

    kind: ClassVar[str] = "identity"

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Own frame for clean queries, all for noisy ones."""
        return (query.role != CLEAN) | ((key.frame == query.frame) & (key.role == CLEAN))


@dataclass(frozen=True)
class KeyRange(Visibility):
    """How many chunks back a query sees depends on its level (MAGI-1, arXiv 2505.13211).

    Attributes:
        bounds: Descending level bounds, one fewer than `ranges`: a query at a level ≥ bounds[i] uses ranges[i].
        ranges: Chunks in view including the query's own, from the noisiest stage to the cleanest.
    """

    kind: ClassVar[str] = "key_range"
    reads: ClassVar[frozenset[str]] = frozenset({"level"})
    bounds: tuple[float, ...]
    ranges: tuple[int, ...]

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Keys of the last `range(level)` chunks."""
        reach = self.ranges[0] + 0 * query.chunk
        for bound, upper, lower in zip(self.bounds, self.ranges[:-1], self.ranges[1:], strict=True):
            reach = reach + (lower - upper) * (query.level < bound).astype("int32")
        return query.chunk - key.chunk < reach


@dataclass(frozen=True)
class Without(Visibility):
    """Nobody past a session's first frames sees them: they may be unlike all others, as an image's latent is.

    Attributes:
        frames: How many first frames are hidden.
    """

    kind: ClassVar[str] = "without"
    reads: ClassVar[frozenset[str]] = frozenset({"written"})  # which slot of a cache holds them changes as it runs
    frames: int

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Keys past the hidden frames, or any for a query among them."""
        return (key.frame >= self.frames) | (query.frame < self.frames)


@dataclass(frozen=True)
class Written(Visibility):
    """Only cache slots that hold something."""

    kind: ClassVar[str] = "written"
    reads: ClassVar[frozenset[str]] = frozenset({"written"})

    def sees(self, query: Tokens, key: Tokens) -> Any:
        """Written keys, for every query."""
        return key.written & (query.chunk == query.chunk)


def frame_mask(visibility: Visibility, query: Tokens, key: Tokens) -> Any:
    """Boolean mask between frames.

    Args:
        visibility: The predicate.
        query: Metadata with arrays of shape `[..., q]`.
        key: Metadata with arrays of shape `[..., k]`.

    Returns:
        Boolean array `[..., q, k]`: numpy for numpy metadata, traced otherwise.
    """
    return visibility.sees(query.expand(-1), key.expand(-2))


def leaks(visibility: Visibility, layout: Layout) -> bool:
    """Whether a frame can depend on a frame of a later chunk, directly or through other frames of deeper layers.

    Args:
        visibility: A predicate on the static layout, or one that also reads levels (taken at their most open).
        layout: Frames of one stream.

    Returns:
        True when a cache of past keys would not be valid under this predicate.
    """
    tokens = tokens_of(layout, np.ones((layout.frames,)) if "level" in visibility.reads else None)
    # A path to a later chunk, however many layers it takes, has a step to a later chunk: looking at steps is enough.
    step = np.asarray(frame_mask(visibility, tokens, tokens), bool)
    chunk = np.asarray(layout.chunks)
    return bool(np.any(step & (chunk[None, :] > chunk[:, None])))
