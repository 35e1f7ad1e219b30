"""How much freed memory a process keeps for itself."""

import torch

LARGEST = 32 * 2**20 - 2**16  # bytes; larger pieces glibc takes from the system and gives back each time


def keep_freed_memory() -> None:
    """Has the C library keep up to 64 MiB that are free at the end of its heap, where that is glibc.

    Otherwise it gives most of what a training step has freed back to the system, and the next step pays for each page
    anew: 12,000 to 80,000 page faults, 5% of the time of a step. How much glibc keeps follows the largest piece that
    was freed so far, up to 32 MiB, so one of that size is taken and freed. Nobody writes to it, so it costs nothing.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
