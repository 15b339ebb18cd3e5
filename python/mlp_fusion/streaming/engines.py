"""Who does the tasks of a streamed run: threads of this process, of which each keeps the others busy, or Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from mlp_fusion.errors import InputError
from mlp_fusion.store.shards import flush
from mlp_fusion.streaming.tasks import Task
from mlp_fusion.streaming.work import Member, Outcome, Work

#: Called in one thread, with a task whose bytes are on the disk.
Done = Callable[[Task, list[Member]], None]


def run_locally(work: Work, tasks: Sequence[Task], done: Done) -> None:
    """Read the next task and write the last one while one is reduced.

    Raises:
        InputError: as reading, reducing and writing do; nothing is written after that.
    """
    with ThreadPoolExecutor(1, "reading") as reader, _writing(work, done) as write:
        waiting = [(task, reader.submit(work.read, task)) for task in tasks[:1]]
        for number in range(len(tasks)):
            task, future = waiting.pop()
            read = future.result()
            if number + 1 < len(tasks):
                waiting.append((tasks[number + 1], reader.submit(work.read, tasks[number + 1])))
            write(task, work.reduce(task, read))
            del read


@contextmanager
def _writing(work: Work, done: Done) -> Iterator[Callable[[Task, Outcome], None]]:
    """A thread that writes; what goes wrong there is raised here, at the next task or at the end."""
    todo: queue.Queue[tuple[Task, Outcome] | None] = queue.Queue(maxsize=1)
    failed: list[BaseException] = []

    def run() -> None:
        while (item := todo.get()) is not None:
            if failed:
                continue
            try:
                task, outcome = item
                flush(work.write(task, outcome))
                done(task, outcome.rows)
            except BaseException as error:  # noqa: BLE001  (raised in the other thread)
                failed.append(error)
            item = None

    thread = threading.Thread(target=run, name="writing")
    thread.start()

    def write(task: Task, outcome: Outcome) -> None:
        if not failed:
            todo.put((task, outcome))
        if failed:
            raise failed[0]

    try:
        yield write
    finally:
        todo.put(None)
        thread.join()
    if failed:
        raise failed[0]


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
    if ours:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        shared = ray.put(work)
        gpus = 1 if work.device.type == "cuda" else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=retries)(_do)
        names = {remote.remote(shared, task): task for task in tasks}
        waiting = list(names)
        while waiting:
            ready, waiting = ray.wait(waiting)
            for reference in ready:
                done(names[reference], _result(ray, reference))
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


def _do(work: Work, task: Task) -> list[Member]:
    """A whole task, in a worker."""
    outcome = work.reduce(task, work.read(task))
    flush(work.write(task, outcome))
    return outcome.rows


ENGINES: dict[str, Callable[[Work, Sequence[Task], Done], None]] = {"local": run_locally, "ray": run_on_ray}


def order(tasks: Iterable[Task], done: Iterable[str]) -> list[Task]:
    """What is left to do."""
    known = set(done)
    return [task for task in tasks if task.name not in known]
