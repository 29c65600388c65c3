"""Live generation: compiled ticks and decoding, sessions, snapshots."""

from vidar.streaming.engine import Engine as Engine
from vidar.streaming.engine import Timing as Timing
