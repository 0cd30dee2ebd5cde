"""MG-LLaVA: ask about an image or a video seen at three grains, two resolutions and objects (arXiv 2406.17770)."""
