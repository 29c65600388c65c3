"""The procedural world: simulation, rendering, captions, the reader of pixels, and its TFDS builder."""

from vidar.data.world.captioned import CAPTIONED as CAPTIONED
from vidar.data.world.captioned import draw_held_out as draw_held_out
from vidar.data.world.captions import ENTERS as ENTERS
from vidar.data.world.captions import Clause as Clause
from vidar.data.world.captions import caption as caption
from vidar.data.world.captions import clauses as clauses
from vidar.data.world.captions import parse as parse
from vidar.data.world.reading import Comparison as Comparison
from vidar.data.world.reading import Reading as Reading
from vidar.data.world.reading import compare as compare
from vidar.data.world.reading import read as read
from vidar.data.world.rendering import render as render
from vidar.data.world.simulation import ACTIONS as ACTIONS
from vidar.data.world.simulation import COLOURS as COLOURS
from vidar.data.world.simulation import KINDS as KINDS
from vidar.data.world.simulation import State as State
from vidar.data.world.simulation import States as States
from vidar.data.world.simulation import WorldConfig as WorldConfig
from vidar.data.world.simulation import initial_state as initial_state
from vidar.data.world.simulation import sample_actions as sample_actions
from vidar.data.world.simulation import simulate as simulate
from vidar.data.world.simulation import step as step
