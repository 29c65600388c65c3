"""Batches of clips for training and evaluation, in an order that a seed determines and a checkpoint restores.

The order is laid down over clip numbers alone; each process then reads only its rows of every global batch. So the same
global batches come for any number of processes, and an iterator's state is a counter. The room must not know models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vidar.data.records import ActionSpec
from vidar.data.sources import ClipSource, EpisodeClips, PromptClips, TfdsClips, TrajectoryClips
from vidar.errors import ConfigError, DataError, check_range

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class SyntheticConfig:
    """Random pixels and actions, for benchmarks and tests: neither files nor further packages are needed.

    Attributes:
        height: Pixels.
        width: Pixels.
        actions: Number of discrete actions, 0 the no-op; 0 leaves actions out.
    """

    height: int = 16
    width: int = 16
    actions: int = 5

    def __post_init__(self):
        for name, least in (("height", 1), ("width", 1), ("actions", 0)):
            check_range(name, getattr(self, name), least=least)


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and how they are batched. Without `tfds` and `records`, the clips are synthetic.

    Attributes:
        tfds: A prepared TFDS set: `name`, `name/config` or `name/config:version`.
        directory: TFDS data directory; None is TFDS's own default.
        records: Directory of recorded episodes.
        trajectories: Directory of a teacher's trajectories, which are then the clips; `tfds` or `records` beside them
            serve the evaluation alone.
        prompts: Text file with a prompt on each line, in place of clips: for objectives that generate all that they
            learn from.
        synthetic: Shape of synthetic clips.
        split: Name of the split.
        frames: Pixel frames of a clip.
        stride: Frames from one window of a recorded episode to the next.
        batch: Clips of a global batch, over all processes.
        seed: Seed of the order, and of where long examples are cut.
        shuffle: Whether clips come in random order, anew in each epoch; else they come as stored, cut at the beginning.
        repeat: Whether to go on for ever; else one epoch, without a last incomplete batch.
        threads: Threads that read batches.
        prefetch: Batches read ahead.
        cache_megabytes: Decoded clips stay in memory if all of them fit into this.
    """

    tfds: str | None = None
    directory: str | None = None
    records: str | None = None
    trajectories: str | None = None
    prompts: str | None = None
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    split: str = "train"
    frames: int = 8
    stride: int = 1
    batch: int = 32
    seed: int = 0
    shuffle: bool = True
    repeat: bool = True
    threads: int = 2
    prefetch: int = 8
    cache_megabytes: int = 512

    def __post_init__(self):
        if self.prompts is not None and self.trajectories is not None:
            raise ConfigError(f"prompts={self.prompts!r} and trajectories={self.trajectories!r}: give one of them")
        if self.tfds is not None and self.records is not None:
            raise ConfigError(f"tfds={self.tfds!r} and records={self.records!r}: give one of them")
        for name in ("frames", "stride", "batch", "threads", "prefetch"):
            check_range(name, getattr(self, name), least=1)
        check_range("cache_megabytes", self.cache_megabytes, least=0)
        check_range("seed", self.seed, least=0, below=2**32)


def open_source(config: DataConfig) -> ClipSource:
    """Opens the clips that a config names.

    Args:
        config: Which clips.

    Returns:
        A source with random access, which also tells the clips' size and actions.

    Raises:
        DataError: Missing set, split or file, a truncated file, or clips longer than what is stored.
    """
    cache_bytes = config.cache_megabytes * 2**20
    if config.trajectories is not None:
        return TrajectoryClips(config.trajectories, cache_bytes)
    if config.prompts is not None:
        return PromptClips(config.prompts)
    if config.tfds is not None:
        return TfdsClips(config.tfds, config.directory, config.split, config.frames, cache_bytes)
    if config.records is not None:
        return EpisodeClips(config.records, config.split, config.frames, config.stride, cache_bytes)
    return _SyntheticClips(config)


def make_dataset(
    config: DataConfig, process_index: int = 0, process_count: int = 1
) -> "grain.IterDataset[Batch] | SyntheticDataset":
    """Makes the batches of one process.

    Args:
        config: Which clips, and how they are batched.
        process_index: This process, in [0, process_count).
        process_count: Number of processes; each gets an equal run of rows of every global batch, in order.

    Returns:
        An iterable whose iterators have `get_state()` and `set_state(state)`, exact to the batch. Batches are
        dictionaries: `pixels` uint8 `[b, f, H, W, 3]`, or of trajectories `trajectory` float32 `[b, k, f, h, w, c]` and
        once more its last, clean state as `latents`; where the clips have them `actions` (`[b, f]` or `[b, f, k]`),
        `caption` (bytes `[b]`) and `label` (int32 `[b]`); and `index` (int64 `[b]`), the number of each sample in the
        global stream. Of prompts there are captions and index alone.

    Raises:
        ConfigError: The processes do not divide the batch.
        DataError: As `open_source`; or a single epoch is smaller than a batch.
    """
    if config.batch % process_count:
        raise ConfigError(f"batch: {config.batch} is not divisible by {process_count} processes")
    source = open_source(config)
    share = config.batch // process_count
    loader = _Loader(config, source, slice(process_index * share, (process_index + 1) * share))
    if isinstance(source, _SyntheticClips):
        return SyntheticDataset(loader)
    if not config.repeat and len(source) < config.batch:
        raise DataError(f"split {config.split!r} has {len(source)} clips, fewer than one batch of {config.batch}")
    import grain

    numbers = grain.MapDataset.range(len(source)).seed(config.seed)
    if config.shuffle:
        numbers = numbers.shuffle()
    if config.repeat:
        numbers = numbers.repeat()
    batches = numbers.batch(config.batch, drop_remainder=True).map_with_index(loader)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch))


class SyntheticDataset:
    """Iterable over synthetic batches, with the same iterator interface as a `grain.IterDataset`."""

    def __init__(self, loader: "_Loader"):
        self._loader = loader

    def __iter__(self) -> "SyntheticIterator":
        return SyntheticIterator(self._loader)


class SyntheticIterator(Iterator[Batch]):
    """Iterator over synthetic batches whose state is the number of the next one."""

    def __init__(self, loader: "_Loader"):
        self._loader = loader
        self._next = 0

    def __next__(self) -> Batch:
        batch = self._loader(self._next, None)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the iterator stands, as JSON-able values."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where `get_state` was called."""
        self._next = int(state["next_index"])


class _Loader:
    """Reads one process's rows of a global batch."""

    def __init__(self, config: DataConfig, source: ClipSource, rows: slice):
        self._config = config
        self._source = source
        self._rows = rows

    def __call__(self, number: int, clips: np.ndarray | None) -> Batch:
        """Global batch `number` with the given clip numbers; None takes the samples' own numbers."""
        index = np.int64(number) * self._config.batch + np.arange(self._config.batch, dtype=np.int64)
        places = np.zeros(self._config.batch)
        if self._config.shuffle:
            places = np.random.default_rng((self._config.seed, number)).random(self._config.batch)
        wanted = zip((index if clips is None else clips)[self._rows], places[self._rows], strict=True)
        rows = [self._source.clip(int(clip), place) for clip, place in wanted]
        return _stack(rows) | {"index": index[self._rows]}


class _SyntheticClips(ClipSource):
    """Endless random clips."""

    def __init__(self, config: DataConfig):
        shape = config.synthetic
        self.frames, self.size = config.frames, (shape.height, shape.width)
        names = ("none", *(str(action) for action in range(1, shape.actions)))
        self.actions = ActionSpec("discrete", names) if shape.actions else None
        self._seed = config.seed

    def __len__(self) -> int:
        return 2**62

    def clip(self, index: int, place: float) -> dict[str, Any]:
        """As `ClipSource.clip`; the clip follows from the seed and its number."""
        del place
        rng = np.random.default_rng((self._seed, index))
        clip: dict[str, Any] = {"pixels": rng.integers(0, 256, (self.frames, *self.size, 3), dtype=np.uint8)}
        if self.actions is not None:
            clip["actions"] = rng.integers(0, len(self.actions.names), self.frames, dtype=np.int32)
            clip["actions"][0] = 0
        return clip


def _stack(rows: list[dict[str, Any]]) -> Batch:
    arrays = ("pixels", "trajectory", "actions")
    batch = {name: np.stack([row[name] for row in rows]) for name in arrays if name in rows[0]}
    if "trajectory" in batch:
        batch["latents"] = batch["trajectory"][:, -1]
    if "caption" in rows[0]:
        batch["caption"] = np.asarray([row["caption"] for row in rows], np.bytes_)
    if "label" in rows[0]:
        batch["label"] = np.asarray([row["label"] for row in rows], np.int32)
    return batch
