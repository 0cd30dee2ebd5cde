"""llama-world: a small Llama that speaks of the rendered world and answers questions about it."""
