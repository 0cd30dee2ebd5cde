"""VisionGRU: an image backbone whose cost grows linearly with the number of pixels (arXiv 2412.18178)."""
