"""t5-world: a small T5 that speaks the rendered world's language."""
