"""Stand-ins for pre-trained parts: a small CLIP and a small T5 that only know the rendered world.

No checkpoint can be assumed on a fresh machine. These two are real `transformers` models, trained by recipes of this
repository, and loaded through the same code as `openai/clip-vit-large-patch14` or `google/flan-t5-xl`.
"""
