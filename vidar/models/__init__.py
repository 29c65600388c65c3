"""Networks: the DiT, its parts, codecs, and presets."""
