"""What PyTorch's profiler adds to the host's time of a launch: a rehearsal runs under it, a T4 will not.

python -m tools.t4.tracing    prints the seconds per launch, on the GPU and the cores that it may use
"""

import time

LAUNCHES, ROUNDS = 20_000, 3


def seconds_per_launch(launches: int = LAUNCHES, rounds: int = ROUNDS) -> float:
    """The shortest time of `rounds` with the profiler less the shortest without it, over `launches`; 0 at least.

    Raises:
        RuntimeError: There is no CUDA GPU.
    """
    import torch

    number = torch.zeros(1, device="cuda")

    def seconds() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            number.add_(1)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds()  # the first launches load the kernel
    plain, traced = [], []
    for _ in range(rounds):
        plain.append(seconds())
        with torch.autograd.profiler.profile(use_cpu=False, use_device="cuda", use_kineto=True):
            traced.append(seconds())
    return max(0.0, min(traced) - min(plain)) / launches


if __name__ == "__main__":
    print(seconds_per_launch())
