"""HiRED: fewer visual tokens within a budget, for any LLaVA-style model (arXiv 2408.10945)."""
