"""llava-next-world: a small LLaVA-NeXT that answers questions about rendered scenes."""
