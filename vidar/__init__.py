"""vidar: autoregressive video diffusion in JAX, trained at pod scale and streamed in real time."""

from vidar.errors import CheckpointError as CheckpointError
from vidar.errors import ConfigError as ConfigError
from vidar.errors import DataError as DataError
from vidar.errors import DivergenceError as DivergenceError
from vidar.errors import VidarError as VidarError
