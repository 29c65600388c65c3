"""Data: the procedural world, recorded episodes, video files, and the pipelines that make batches of them."""

from vidar.data.pipeline import DataConfig as DataConfig
from vidar.data.pipeline import SyntheticConfig as SyntheticConfig
from vidar.data.pipeline import make_dataset as make_dataset
from vidar.data.pipeline import open_source as open_source
