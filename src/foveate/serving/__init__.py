"""The HTTP API and the page of `foveate serve`; its packages are the extra `serve`."""
