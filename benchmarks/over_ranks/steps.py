"""Steps of decoding as an engine takes them, from a cache of random keys and values."""

import statistics

import torch
from torch import Tensor

from moezoo.causal_lm import MoECausalLM
from moezoo.device import HostCopies
from moezoo.generation.engine import Engine
from moezoo.generation.pages import num_pages
from over_ranks.job import Job

DRAWN = 64
"""Number of steps whose tokens are drawn beforehand; later steps repeat them."""


class Steps:
    """An engine whose rows have context / 2 tokens each, the same on every rank.

    The next tokens are random too: those that a model of random weights writes soon repeat
    themselves, and would go to few experts.
    """

    def __init__(self, job: Job, model: MoECausalLM, *, rows: int, context: int) -> None:
        self.job, self.model = job, model
        self.engine = Engine(model.decoder, num_rows=rows, context=context)
        self._length = context // 2
        self._pages = num_pages(context)
        for row in range(rows):
            self.engine.assign(row, range(row * self._pages, (row + 1) * self._pages))
        self._taken = 0

    @torch.no_grad()
    def begin(self, rows: int, *, alike: bool) -> None:
        """Start with a number of rows, with the same tokens on all ranks or different ones."""
        for i, layer in enumerate(self.engine.cache.layers):
            generator = torch.Generator(self.job.device).manual_seed(i)
            for stored in layer:
                if stored is not None:
                    stored.normal_(generator=generator)
        generator = torch.Generator().manual_seed(0 if alike else 1 + self.job.rank)
        # For all rows, so that the first ones have the same whatever their number.
        shape = DRAWN, self.engine.num_rows
        drawn = torch.randint(self.model.config.vocab_size, shape, generator=generator)
        self._drawn = drawn[:, :rows].to(self.job.device)
        self._rows = rows
        self.engine.stop(range(self.engine.num_rows))
        self.engine.start(range(rows), [self._length] * rows, self._drawn[0])

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Run a step and return its logits, valid until the next step. Rows do not grow."""
        engine, rows = self.engine, self._rows
        logits = engine.step(rows, engine.greedy)
        self._taken += 1
        engine.lengths[:rows] -= 1
        engine.ids[:rows] = self._drawn[self._taken % DRAWN]
        return logits

    def seconds(self, rows: int, *, alike: bool, steps: int = 32, repeats: int = 3) -> float:
        """Return the seconds of a step on the slowest rank.

        The host reads each step's tokens while the next one runs, as generation does.
        """
        steps, repeats = (2, 1) if self.job.small else (steps, repeats)
        self.begin(rows, alike=alike)
        self.step()  # captures it
        taken = []
        seen = HostCopies(self.engine.ids)

        def step() -> None:
            nonlocal seen
            self.step()
            seen.wait()
            seen = HostCopies(self.engine.ids)

        for _ in range(repeats):
            self.job.together()
            taken.append(self.job.seconds(step, steps))
        return self.job.largest(statistics.median(taken))
