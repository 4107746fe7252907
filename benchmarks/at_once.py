"""Jobs that start processes, side by side or one after another.

for name, result in at_once({"one": job, "two": another}): ...      an error is a result
found = all_at_once({"one": job, "two": another})                   the first error is raised
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from unsloth_puzzles.bench import child

Result = TypeVar("Result")


def at_once(
    jobs: Mapping[str, Callable[[], Result]], *, together: bool = True
) -> Iterator[tuple[str, Result | child.ChildError]]:
    """(name, what the job returns or the error that it ended with) for each of `jobs`, which start processes.

    Args:
        jobs: By name.
        together: Side by side; otherwise one after another.
    """
    with ThreadPoolExecutor(len(jobs) if together else 1) as pool:
        try:
            futures = {name: pool.submit(job) for name, job in jobs.items()}
            for name, future in futures.items():
                error = future.exception()
                if error is not None and not isinstance(error, child.ChildError):
                    raise error
                yield name, error or future.result()
        except BaseException:  # an interrupt: else the pool would wait for its processes
            pool.shutdown(wait=False, cancel_futures=True)
            child.end_all()
            raise


def all_at_once(jobs: Mapping[str, Callable[[], Result]], *, together: bool = True) -> dict[str, Result]:
    """As `at_once`, the results by name.

    Raises:
        ChildError: Of the first of `jobs` that failed, when all have ended.
    """
    found = dict(at_once(jobs, together=together))
    for one in found.values():
        if isinstance(one, child.ChildError):
            raise one
    return found
