"""Many images at once.

One linear SM3 is serial, so several regular files are measured side by side, one to a thread; a page tree fills all
threads by itself, so trees are measured one after the other, and so are lists with a pipe in them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from csvfast.measure.errors import ParameterError
from csvfast.measure.image import Measurement, Mode, measure_image
from csvfast.measure.source import STDIN, Access, AnyPath, Progress, default_threads, total_size

__all__ = ["measure_images"]


def measure_images(
    paths: Sequence[AnyPath],
    mode: Mode = "linear",
    *,
    access: Access = "read",
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Measures several images; the records come in the order of the paths.

    Args: threads: images measured at once (mode "linear") or workers per image (mode "tree"), None = one per
        processor. progress: over the bytes of all images; called from several threads, one at a time.
    Raises: what `measure_image` raises, for the first image in the order of the paths that failed; the images not
        begun by then are left alone.
    Thread-safety: safe from any thread. The GIL is released while bytes are read and hashed.
    """
    workers = default_threads() if threads is None else threads
    if workers < 1:
        raise ParameterError(f"threads is {workers}; expected 1 or more")
    if sum(path == STDIN for path in paths) > 1:
        raise ParameterError("'-' is given more than once; expected standard input to be used once")
    total = total_size(paths)  # None: some are streams
    lock = threading.Lock()
    done = 0
    stop = threading.Event()

    def measure(path: AnyPath) -> Measurement:
        seen = 0

        def step(count: int, _total: int | None) -> None:
            nonlocal done, seen
            if stop.is_set():
                raise _StoppedError
            if progress is not None:
                with lock:
                    done += count - seen
                    seen = count
                    progress(done, total)

        return measure_image(path, mode, access=access, threads=threads, progress=step)

    # A silent pipe would hold up a thread for ever; the calling thread can be interrupted.
    if mode == "tree" or workers == 1 or len(paths) < 2 or total is None:
        return [measure(path) for path in paths]
    with ThreadPoolExecutor(min(workers, len(paths)), thread_name_prefix="csvfast-image") as executor:
        try:
            futures = [executor.submit(measure, path) for path in paths]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [error for future in futures if future.done() and (error := future.exception()) is not None]
            if failed:
                raise failed[0]
            return [future.result() for future in futures]
        except BaseException:
            # Ctrl-C and errors do not wait for images under way or not begun.
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Ends the measurement of an image whose result nobody wants any more."""
