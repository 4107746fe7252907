"""What a T4 would take at least: a prediction from its datasheet, never a measurement and never in the scorecard."""

# NVIDIA T4 datasheet (https://www.nvidia.com/en-us/data-center/tesla-t4/)
BANDWIDTH = 320e9  # bytes/s
MEMORY_GIB = 14.5  # what all processes can use of the 16 GB, their CUDA contexts included
ALLOCATOR_GIB = 13.6  # of that, what is left for PyTorch's allocator beside one context
CONTEXT_GIB = 0.7  # of a process, with the libraries that it loads
# Turing whitepaper: 40 multiprocessors x 4 schedulers, each issuing one instruction of a warp (32 threads) per clock.
# The datasheet's 8.1 TFLOP/s are 40 x 64 multiply-adds per clock, hence a boost clock of 1.59 GHz.
THREAD_INSTRUCTIONS = 40 * 4 * 32 * 1.59e9  # instructions of single threads per second

# CUDA C++ Programming Guide, throughput of native instructions, compute capability 7.5: results per clock and SM.
SHUFFLES = 40 * 32 * 1.59e9  # of a lane, per second
CONVERSIONS = 40 * 16 * 1.59e9  # between types of different width, per second

LABEL = "predicted for a T4 from its datasheet, not measured"


def t4_seconds(*, bytes: float = 0, instructions: float = 0) -> float:
    """Seconds that work takes at least on a T4: a lower bound, in which everything overlaps.

    Args:
        bytes: Bytes moved.
        instructions: Of single threads, summed.

    Returns:
        The larger of the two times.

    Raises:
        ValueError: An amount is negative or NaN.
    """
    for name, amount in (("bytes", bytes), ("instructions", instructions)):
        if not amount >= 0:
            raise ValueError(f"{name} must be a number that is not negative, got {amount!r}")
    return max(bytes / BANDWIDTH, instructions / THREAD_INSTRUCTIONS)
