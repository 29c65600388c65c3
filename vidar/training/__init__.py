"""The driver: it trains any objective on any batches, and knows nothing of video."""

from vidar.training.config import TrainingConfig as TrainingConfig
from vidar.training.loop import Run as Run
from vidar.training.loop import train as train
from vidar.training.optimizers import OptimizerConfig as OptimizerConfig
from vidar.training.state import TrainState as TrainState
