"""Work beside the model: on a thread, and on a GPU on a stream of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Background:
    """Does one thing after the other. At the interpreter's end what was started is awaited."""

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moezoo-eplb")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], Result]) -> Future[Result]:
        """Call `work`, which sees what is queued so far on the caller's stream; on a GPU the result
        is there when what it queued is done."""
        before = None
        if self._stream is not None:
            before = torch.cuda.current_stream(self._stream.device).record_event()
        return self._thread.submit(self._run, work, before)

    @torch.inference_mode()
    def _run(self, work: Callable[[], Result], before: torch.cuda.Event | None) -> Result:
        with ExitStack() as stack:
            if self._stream is not None:
                assert before is not None
                stack.enter_context(torch.cuda.stream(self._stream))  # its device as well
                self._stream.wait_event(before)
            result = work()
            if self._stream is not None:
                self._stream.record_event().synchronize()
        return result
