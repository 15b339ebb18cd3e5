"""Who does the tasks of a streamed run: threads of this process, on all of its GPUs, or Ray."""

from __future__ import annotations

import contextlib
import queue
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from fusion_kernels import native
from mlp_fusion.errors import InputError
from mlp_fusion.store.shards import flush
from mlp_fusion.streaming.tasks import TASK_BYTES, Task
from mlp_fusion.streaming.work import Member, Work

#: Threads that do tasks side by side: on a CPU at most, and for each GPU where the work itself is done on one.
_MOST_WORKERS, _ON_A_GPU = 8, 3
#: Called in one thread, with a task whose bytes are on the disk.
Done = Callable[[Task, list[Member]], None]


def workers_here(largest: int = 0) -> int:
    """How many tasks this machine's processors do side by side: fewer where one is large.

    Args:
        largest: float32 bytes of the largest task.
    """
    many = min(torch.get_num_threads(), _MOST_WORKERS)
    return max(1, many * TASK_BYTES // max(TASK_BYTES, largest))


def held_here(largest: int = 0) -> int:
    """How many tasks are in memory at once: where they are small, one more than are done, so that somebody reads."""
    return workers_here(largest) + (largest <= TASK_BYTES)


def devices_of(device: torch.device) -> list[torch.device]:
    """Where tasks are reduced: on all GPUs that are like the first, unless `device` says which one, or is none.

    The bits of a task do not depend on which of equal GPUs does it. Of others they might: those are left idle, with a
    warning.
    """
    if device.type != "cuda" or device.index is not None:
        return [device]
    found: dict[tuple[object, ...], list[int]] = {}
    for number in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(number)
        found.setdefault((known.name, known.major, known.minor, known.multi_processor_count), []).append(number)
    (first, *_), (alike, *others) = found.keys(), found.values()
    if others:
        idle = ", ".join(str(number) for numbers in others for number in numbers)
        warnings.warn(
            f"GPUs {idle} are unlike GPU 0 ({first[0]}) and are not used: name one with device, or hide GPU 0",
            stacklevel=2,
        )
    return [torch.device("cuda", number) for number in alike]


def run_locally(work: Work, tasks: Sequence[Task], done: Done) -> None:
    """Do tasks in several threads: while some read or write, others reduce; each on a device of :func:`devices_of`.

    On the CPU, there are as many as torch has threads, up to eight, which share those among them: tasks side by side
    wait less for one another than the parts of one task do. One more waits for the disk meanwhile.

    Raises:
        InputError: as reading, reducing and writing do; what has not begun is left then.
    """
    threads = torch.get_num_threads()
    largest = max((task.nbytes for task in tasks), default=0)
    devices = devices_of(work.device)
    each, computing = _ON_A_GPU, _ON_A_GPU * len(devices)
    if work.device.type == "cpu":
        each, computing = held_here(largest), workers_here(largest)
    workers = each * len(devices)
    # They take turns: whoever has been free for the longest is next.
    free: queue.SimpleQueue[Work] = queue.SimpleQueue()
    for own in [work.on(device) for device in devices] * each:
        free.put(own)

    def do_on_a_free_device(task: Task) -> list[Member]:
        own = free.get()
        try:
            with torch.cuda.device(own.device) if own.device.type == "cuda" else contextlib.nullcontext():
                return do(own, task)
        finally:
            free.put(own)

    _keep_freed_memory()
    pool = ThreadPoolExecutor(workers, "task")
    torch.set_num_threads(max(1, threads // computing))
    # For all of them: torch has one such setting, and what one thread puts back another may still need.
    with native.exact_products():
        try:
            names = {pool.submit(do_on_a_free_device, task): task for task in tasks}
            for future in as_completed(names):
                done(names[future], future.result())
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Have what tasks free used by the next ones, rather than given back to the system and cleared by it again.

    glibc keeps more of blocks as large as the largest that it has seen freed, up to 32 MiB of them.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def run_on_ray(work: Work, tasks: Sequence[Task], done: Done, *, retries: int = 3) -> None:
    """Do every task in a Ray worker, on a file system that all of them share; a task whose worker dies is done again.

    Ray is started on this machine unless it runs, or `RAY_ADDRESS` says where.

    Raises:
        InputError: Ray is not installed, a task fails, or its worker has died `retries` times.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("engine ray needs Ray: pip install 'mlp-fusion[ray]'") from error
    ours = not ray.is_initialized()
    waiting: list[Any] = []
    if ours:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        shared = ray.put(work)
        gpus = 1 if work.device.type == "cuda" else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=retries)(do)
        names = {remote.remote(shared, task): task for task in tasks}
        waiting.extend(names)
        while waiting:
            ready, waiting = ray.wait(waiting)
            for reference in ready:
                done(names[reference], _result(ray, reference))
    except BaseException:
        # Nobody may write when this run has ended.
        for reference in waiting:
            ray.cancel(reference, force=True)
        if waiting:
            ray.wait(waiting, num_returns=len(waiting))
        raise
    finally:
        if ours:
            ray.shutdown()


def _result(ray: Any, reference: Any) -> list[Member]:
    try:
        found: list[Member] = ray.get(reference)
        return found
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
        raise cause from error
    except ray.exceptions.RayError as error:
        raise InputError(f"a worker died again and again ({str(error).splitlines()[0]}): see Ray's logs") from error


def do(work: Work, task: Task) -> list[Member]:
    """A whole task; its rows, when its bytes are on the disk."""
    outcome = work.reduce(task, work.read(task))
    flush(work.write(task, outcome))
    return outcome.rows


ENGINES: dict[str, Callable[[Work, Sequence[Task], Done], None]] = {"local": run_locally, "ray": run_on_ray}
