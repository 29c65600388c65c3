"""Whether a network makes frames like those of held-out clips, and knows what is told of them."""

from dataclasses import dataclass

from vidar.errors import ConfigError
from vidar.models.dit import DiTConfig
from vidar.models.layers import DiscreteActions


@dataclass(frozen=True)
class Form:
    """What held-out clips look like, and what is told of them.

    Attributes:
        clips: What messages call them.
        size: Height and width of their frames.
        actions: Number of discrete actions.
        classes: Number of classes; None where they have none.
    """

    clips: str
    size: tuple[int, int]
    actions: int
    classes: int | None = None

    def check(self, maker: str, size: tuple[int, int], model: DiTConfig) -> None:
        """Refuses a network that cannot continue such clips.

        Args:
            maker: What messages call it.
            size: Height and width of its frames.
            model: Its config; it may know nothing of actions and classes.

        Raises:
            ConfigError: Its frames are of another size, or it knows other actions or classes.
        """
        if size != self.size:
            raise ConfigError(
                f"{maker}: makes frames of {size[0]}×{size[1]}, {self.clips} has {self.size[0]}×{self.size[1]}: "
                "give a model of that size"
            )
        known = model.actions
        if known is not None and (not isinstance(known, DiscreteActions) or known.count < self.actions):
            raise ConfigError(f"{maker}: does not know the {self.actions} discrete actions of {self.clips}")
        if model.classes not in (None, self.classes):
            raise ConfigError(
                f"{maker}: needs one of {model.classes} classes, {self.clips} tells {self.classes or 'none'}"
            )
