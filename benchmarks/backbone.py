"""Cost of VisionGRU: its scan beside other ways to compute it, and the network beside ViT and ConvNeXt of equal size.

    python benchmarks/backbone.py            # everything but sizes whose predicted time is beyond --limit
    python benchmarks/backbone.py --quick    # three sizes, small scans: about two minutes
    python benchmarks/backbone.py --part scan --out out/benchmarks

The same as `foveate bench backbone`, with the same options; `foveate.methods.vision_gru.cost` does the measuring.
"""

from __future__ import annotations

import sys

from foveate.cli import main

if __name__ == "__main__":
    main(["bench", "backbone", *sys.argv[1:]])
