"""What a person sets about a training run, apart from its optimizers.

This module holds plain values only; it must not know how they are used.
"""

from dataclasses import dataclass

from vidar.errors import check_range


@dataclass(frozen=True)
class TrainingConfig:
    """Length, rhythm and limits of a run.

    Attributes:
        steps: Global steps; a step has one or more phases.
        log_every: Steps between two rows of metrics; a row is the mean over these steps.
        save_every: Steps between two checkpoints; the last step is always saved.
        keep: Newest checkpoints that are kept.
        keep_every: Checkpoints whose step this divides are kept for good.
        eval_every: Steps between two evaluations, which also follow the last step; None never evaluates.
        sample_every: Steps between two sample sheets, likewise.
        accumulate: Microbatches that a batch is split into; their gradients are averaged.
        max_nonfinite: A run of this many skipped (non-finite) updates ends the training.
        max_seconds: Ends the training with a checkpoint after this time, on a single process; None for no limit.
        seed: Seed of initial parameters and of everything drawn while training.
        tensorboard: Whether to write TensorBoard events beside `metrics.jsonl`.
    """

    steps: int
    log_every: int = 50
    save_every: int = 1000
    keep: int = 3
    keep_every: int | None = None
    eval_every: int | None = None
    sample_every: int | None = None
    accumulate: int = 1
    max_nonfinite: int = 10
    max_seconds: float | None = None
    seed: int = 0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep", "accumulate", "max_nonfinite"):
            check_range(f"training.{name}", getattr(self, name), least=1)
        for name in ("keep_every", "eval_every", "sample_every"):
            check_range(f"training.{name}", getattr(self, name), least=1)
        check_range("training.max_seconds", self.max_seconds, least=0)
        check_range("training.seed", self.seed, least=0, below=2**32)
