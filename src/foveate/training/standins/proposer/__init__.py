"""proposer-world: the region proposer of the rendered world."""
