"""From a prompt, an image, actions or a class to pixels, with vidar's own models and those that others publish.

This room must not know training, command lines or how videos are shown.
"""

from vidar.pipeline.generation import Pipeline as Pipeline
from vidar.pipeline.generation import fitted as fitted
from vidar.pipeline.generation import trained_pipeline as trained_pipeline
from vidar.pipeline.published import Choices as Choices
from vidar.pipeline.published import load_pipeline as load_pipeline
from vidar.pipeline.published import load_text_encoder as load_text_encoder
