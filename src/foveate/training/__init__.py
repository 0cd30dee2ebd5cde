"""Recipes (YAML checked by pydantic) and the Hugging Face Trainer wired to them.

`recipes` is light (no torch), `runner` is the door for the command line, `trainer` holds the loop, `sampling` the
randomness that survives a resume, `schedules` the learning-rate curves.
"""
