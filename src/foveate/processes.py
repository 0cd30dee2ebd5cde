"""How a program of ours, one that is not a library in somebody else's, treats its process."""

from __future__ import annotations

from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h; the second's largest value is 32 MiB


def hide_weight_bars() -> None:
    """Turns off transformers' bar for each file of weights; that of a download, which takes minutes, stays."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    unwanted = are_progress_bars_disabled()
    disable_progress_bar()  # those of huggingface_hub, too
    if not unwanted:
        enable_progress_bars()


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors free instead of giving it back and faulting it in again for the next ones, which on
    a CPU is a tenth of describing and of training. For programs that are ours alone; elsewhere nothing happens."""
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**30)
