"""MG-LLaVA: ask about an image or a video seen at three grains: low resolution, high resolution, objects (arXiv 2406.17770)."""
