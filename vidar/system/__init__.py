"""Composes a system from a config: networks, codec, axes and objective, with every check across axes.

A config names one choice per axis; `compose` turns it into a `System` or says in one line why it cannot be. This room
knows all axes and nothing of drivers or servers.
"""

from vidar.system.compose import OnData as OnData
from vidar.system.compose import System as System
from vidar.system.compose import compose as compose
from vidar.system.compose import streaming_sampler as streaming_sampler
from vidar.system.config import PlanConfig as PlanConfig
from vidar.system.config import SystemConfig as SystemConfig
from vidar.system.config import VideoConfig as VideoConfig
from vidar.system.config import system_config as system_config
from vidar.system.load import is_trained as is_trained
from vidar.system.load import load as load
from vidar.system.load import load_start as load_start
