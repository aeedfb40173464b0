"""Process groups for the balancers' hosts, separate from those of the model."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.parallel.mesh import Mesh


@dataclass(frozen=True)
class Channels:
    """Two CPU process groups, each used by one thread, so that all ranks use it in one order."""

    votes: dist.ProcessGroup
    """For the thread that runs the model."""
    plans: dist.ProcessGroup
    """For the thread in the background."""

    @classmethod
    def open(cls, mesh: Mesh) -> "Channels":
        """Open the channels of an expert group; all ranks of the job call this.

        Raises `RankError` where one does not.
        """
        with mesh.together("loading experts"):
            pass  # wait here for slower ranks, as making a group does not wait for long

        def group() -> dist.ProcessGroup:
            return dist.new_group(
                list(mesh.group_ranks),
                timeout=timedelta(seconds=mesh.parallel.timeout),
                backend="gloo",
                use_local_synchronization=True,
            )

        with mesh.named_faults("opening the channels of EPLB"):
            return cls(group(), group())


class Vote:
    """An asynchronous vote, which all ranks begin at the same step: whether all say yes."""

    def __init__(self, yes: bool, group: dist.ProcessGroup | None) -> None:
        self._answer: Tensor = torch.tensor([int(yes)])
        self._work = None
        if group is not None:
            self._work = dist.all_reduce(
                self._answer, dist.ReduceOp.MIN, group=group, async_op=True
            )

    def wait(self) -> bool:
        """Wait for the votes of all ranks, and return whether all said yes."""
        if self._work is not None:
            self._work.wait()
        return bool(self._answer)
