"""From an experiment card to a run. This is the only room where the driver meets video; it knows no command lines."""

from vidar.training.experiment.config import RunConfig as RunConfig
from vidar.training.experiment.config import load_run_config as load_run_config
from vidar.training.experiment.run import abstract_run as abstract_run
from vidar.training.experiment.run import make_run as make_run
from vidar.training.experiment.run import portable_dict as portable_dict
from vidar.training.experiment.run import system_dict as system_dict
