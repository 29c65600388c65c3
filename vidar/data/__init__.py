"""Data: the procedural world, recorded episodes, video files and the pipelines that make batches."""
