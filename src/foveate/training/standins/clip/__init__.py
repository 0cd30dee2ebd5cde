"""clip-world: a small CLIP of the rendered world."""
