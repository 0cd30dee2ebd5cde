"""convnext-world: a small ConvNeXt of the rendered world, for small things and the words on signs."""
