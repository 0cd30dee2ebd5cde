"""DynRefer: describe any region of an image from nested views with dynamic resolution (arXiv 2405.16071)."""
