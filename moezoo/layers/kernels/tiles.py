"""Tile sizes of the grouped matrix products, and the choice of them for a layer.

`plan` looks a layer up in the tables that `moezoo tune` makes: the user's for this GPU, the
package's for this GPU (`tables/NVIDIA_H200.json`), then the package's for its architecture
(`tables/sm_90.json`, measured on one H100). A layer in none of them gets tiles by the number of
rows per expert, with as many stages as shared memory holds.

Tiles decide the order in which a product is summed, so the last bit of a 16-bit result may differ
between token counts; for one token count it never does.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.formats import FP8
from moezoo.layers.kernels.overlap import capability
from moezoo.layers.kernels.sizes import cdiv

P = ParamSpec("P")

TABLES = Path(__file__).parent / "tables"
FAR = 4.0
"""Largest ratio of rows per expert at which a measured plan is better than the rule."""

FEW_ROWS = 64
"""Most rows of a tile that has few, see `Tile.direct` and, for packed weights, `products`."""

INTERPRETER_SHARED_MEMORY = 99 * 1024


@dataclass(frozen=True)
class Tile:
    """The part of a grouped product that one program computes: m rows by n columns.

    `descriptors` reads weights, and the rows between the products, through the bulk copy engine.
    `weights_first` multiplies weights by rows instead of rows by weights: matrix instructions take
    64 of the first and as few as 8 of the second. `tail`, if there is one, is the m of the last
    tile of an expert that has no more rows than that. With `programs_per_sm`, that many programs a
    multiprocessor share out all the tiles, each fetching the next one while it finishes one; 0 is
    a program for each tile. `group_m` row tiles are worked on side by side, so that they find
    weights in L2.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    weights_first: bool = False
    tail: int = 0
    programs_per_sm: int = 0
    group_m: int = 8

    @property
    def persistent(self) -> bool:
        return self.programs_per_sm > 0

    @property
    def flattened(self) -> bool:
        """Whether a program runs through its tiles in one flat loop, prefetching across them."""
        return self.persistent and not self.tail

    @property
    def direct(self) -> bool:
        """Whether a program's place in the grid says which tile it computes, without a loop over
        tiles.

        Programs for few rows a tile are short: what they do before their first load of weights
        counts, and without the loop they need a quarter fewer registers. For more rows the loop
        stays, as without it ptxas lets every matrix instruction of a chain wait for the one before.
        """
        return self.m <= FEW_ROWS and not self.persistent and not self.tail

    def grid(self, max_tiles: int, num_columns: int, device: torch.device) -> tuple[int, ...]:
        """Return the launch grid: `own_tile`'s three dimensions if `direct`, else the number of
        programs that share all tiles."""
        across = cdiv(num_columns, self.n)
        if self.direct:
            side_by_side = min(self.group_m, max_tiles)
            return side_by_side, across, cdiv(max_tiles, max(side_by_side, 1))
        every = max_tiles * across
        if not self.persistent:
            return (every,)
        return (min(every, self.programs_per_sm * multiprocessors(device)),)

    def fitted(
        self, num_parts: int, itemsize: int, device: torch.device, *, bits: int | None = None
    ) -> "Tile":
        """Return this tile with the stages that shared memory holds; k shrinks if it holds none.

        itemsize is the bytes of a number in rows, and in weights without `bits` of their own.
        """
        bits_per_column = 8 * itemsize * self.m + (bits or 8 * itemsize) * num_parts * self.n
        # A little stays free for barriers, for what the compiler itself puts there, and for scales.
        room = shared_memory(device) - (2048 if bits is None else 4096)
        if self.flattened:
            # The finished tile goes through shared memory while the next ones arrive.
            room -= 32 * 1024
        k = self.k
        while bits_per_column * k // 8 > room and k > (16 if bits is None else 64):
            k //= 2
        stages = max(1, min(self.num_stages, room * 8 // (bits_per_column * k)))
        return replace(self, k=k, num_stages=stages)


@dataclass(frozen=True)
class Plan:
    """Tiles of a layer's two products, which have the same m."""

    gated_up: Tile
    down: Tile

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Plan":
        return cls(Tile(**entry["gated_up"]), Tile(**entry["down"]))


_remembering: list[Any] = []


def remembered(plan_: Callable[P, Plan]) -> Callable[P, Plan]:
    """Cache a function that asks `tuned`, until `reload_tables`."""
    cached = lru_cache(4096)(plan_)
    _remembering.append(cached)
    return cached


def plan(
    x: Tensor, w13: Tensor, w2: Tensor, *, num_rows: int, num_experts: int | None = None
) -> Plan:
    """Return the plan for num_rows rows of x [T, H], w13 [E, 2 or 1, I, H] and w2 [E, H, I].

    Weights have x's dtype, or are the data of `BlockFp8`s. The rows are spread over num_experts
    experts, those of other ranks included; by default E. The plan depends on shapes, strides,
    dtype and device, never on what the router chose.
    """
    described = w13.dtype != torch.float32 and can_describe(w13) and can_describe(w2)
    # The rows between the products are ours, and dense.
    described = described and all(size * w2.dtype.itemsize % 16 == 0 for size in w2.shape[1:])
    rows_per_expert = num_rows / (num_experts or w13.shape[0])
    return _plan(x.device, w13.dtype, tuple(w13.shape), described, rows_per_expert)


@remembered
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    described: bool,
    rows_per_expert: float,
) -> Plan:
    num_experts, num_parts, intermediate_size, hidden_size = shape
    sizes: Sizes = (num_experts, hidden_size, intermediate_size)
    if dtype == torch.float32:
        chosen = _fp32_plan(rows_per_expert)
    elif dtype == torch.float8_e4m3fn:
        known = tuned(device, (*sizes, FP8), rows_per_expert) if described else None
        chosen = known or _fp8_plan(rows_per_expert, described)
    elif not described:
        chosen = _pointer_plan(rows_per_expert)
    else:
        chosen = tuned(device, sizes, rows_per_expert) or _descriptor_plan(rows_per_expert)
    return Plan(
        chosen.gated_up.fitted(num_parts, dtype.itemsize, device),
        chosen.down.fitted(1, dtype.itemsize, device),
    )


def _fp32_plan(rows_per_expert: float) -> Plan:
    """Return small tiles: fp32 products run on the ordinary cores, with operands in registers."""
    tile = Tile(16 if rows_per_expert <= 16 else 32, 32, 32, num_warps=4, num_stages=3)
    return Plan(replace(tile, n=16), tile)


def _pointer_plan(rows_per_expert: float) -> Plan:
    if rows_per_expert <= 32:
        tile = Tile(16 if rows_per_expert <= 16 else 32, 64, 128, num_warps=4, num_stages=4)
    elif rows_per_expert <= 64:
        tile = Tile(64, 128, 64, num_warps=4, num_stages=4)
    else:
        tile = Tile(128, 256, 64, num_warps=8, num_stages=3)
    return Plan(replace(tile, n=tile.n // 2), tile)


def _descriptor_plan(rows_per_expert: float) -> Plan:
    """Return the plan with descriptors; measured on one H100 over the shapes of the tables."""
    if rows_per_expert <= 24:
        m = 16 if rows_per_expert <= 12 else 32
        tile = Tile(m, 64, 128, 4, 3, descriptors=True, weights_first=True)
        return Plan(tile, replace(tile, num_stages=4))
    if rows_per_expert <= 48:
        tile = Tile(64, 64, 128, 4, 3, descriptors=True, weights_first=True)
        return Plan(replace(tile, num_stages=2), tile)
    up = Tile(128, 128, 64, 8, 4, descriptors=True, tail=64, group_m=4)
    down = Tile(128, 256, 64, 8, 4, descriptors=True)
    if rows_per_expert <= 100:
        return Plan(up, Tile(128, 128, 64, 4, 3, descriptors=True, tail=64))
    if rows_per_expert <= 200:
        return Plan(up, replace(down, tail=64))
    return Plan(replace(up, tail=32, group_m=8), replace(down, programs_per_sm=1))


def _fp8_plan(rows_per_expert: float, described: bool) -> Plan:
    """Return the plan for fp8: k, and n of the first product, are 128, see `gated_up_fp8`."""
    if rows_per_expert <= 48:
        m = 16 if rows_per_expert <= 12 else 32 if rows_per_expert <= 24 else 64
        up = Tile(m, 128, 128, 8 if m == 64 else 4, 3, descriptors=described, weights_first=True)
        return Plan(up, replace(up, num_stages=4))
    tile = Tile(64, 128, 128, 8, 4, descriptors=described)
    if rows_per_expert <= 100:
        return Plan(tile, replace(tile, num_warps=4))
    tail = replace(tile, m=128, tail=64)
    return Plan(tail, tail)


Sizes = tuple[int, int, int] | tuple[int, int, int, str]
"""(E, H, I), and the quantisation of the weights, if any."""

Table = dict[Sizes, dict[float, Plan]]
"""Sizes -> number of rows per expert -> plan."""


def sizes_of(entry: dict[str, Any]) -> Sizes:
    """Return the sizes of an entry in a table's JSON."""
    sizes = (entry["num_experts"], entry["hidden_size"], entry["intermediate_size"])
    return (*sizes, entry["quantization"]) if "quantization" in entry else sizes


def read_table(path: Path) -> Table:
    """Read a table; raise ValueError, naming the file, unless it is as `moezoo tune` writes it."""
    try:
        return {
            sizes_of(entry): {
                float(plan["rows_per_expert"]): Plan.from_json(plan) for plan in entry["plans"]
            }
            for entry in json.loads(path.read_text())["layers"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of tiles ({error!r}); move it away, or run `moezoo tune` again"
        ) from error


@cache
def _table(device: torch.device) -> Table:
    """Return the package's plans for an architecture, overridden by those for the device, the
    package's and then the user's."""
    major, minor = capability(device)
    table: Table = {}
    for path in (TABLES / f"sm_{major}{minor}.json", TABLES / table_name(device)):
        if path.exists():
            table = _overridden(table, read_table(path))
    try:
        path = user_table(device)
        return _overridden(table, read_table(path)) if path.exists() else table
    except (OSError, RuntimeError, ValueError) as error:
        warnings.warn(f"tiles of `moezoo tune` are not used: {error}", stacklevel=2)
        return table


def _overridden(table: Table, by: Table) -> Table:
    return {sizes: table.get(sizes, {}) | by.get(sizes, {}) for sizes in table.keys() | by.keys()}


def tuned(
    device: torch.device, shape: Sizes, rows_per_expert: float, *, far: float = FAR
) -> Plan | None:
    """Return the plan measured at the nearest number of rows by ratio; None if beyond `far`."""
    plans = _table(device).get(shape, {}) if device.type == "cuda" else {}

    def distance(measured: float) -> float:
        return max(measured / rows_per_expert, rows_per_expert / measured)

    nearest = min(plans, key=distance, default=None)
    if nearest is None or distance(nearest) > far:
        return None
    return plans[nearest]


def reload_tables() -> None:
    """Read the tables again, which a process otherwise does once."""
    _table.cache_clear()
    for cached in _remembering:
        cached.cache_clear()


def user_table(device: torch.device) -> Path:
    """Return the path where `moezoo tune` keeps the plans of a GPU."""
    return Path.home() / ".cache" / "moezoo" / "tiles" / table_name(device)


def table_name(device: torch.device) -> str:
    """Return the file name of a GPU's table, such as NVIDIA_H200.json."""
    return torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_") + ".json"


def can_describe(w: Tensor) -> bool:
    """Whether the bulk copy engine can read w: strides of 16 bytes, a dense last dimension."""
    if w.is_cuda and (torch.version.hip is not None or capability(w.device) < (9, 0)):
        return False
    aligned = all(stride * w.dtype.itemsize % 16 == 0 for stride in w.stride()[:-1])
    return aligned and w.stride(-1) == 1 and w.data_ptr() % 16 == 0


def descriptor(w: Tensor, block: tuple[int, ...]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(w, list(w.shape), list(w.stride()), list(block))


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def swizzle(pid, num_tiles, num_n, GROUP_M: tl.constexpr):
    """The row tile and the column tile of a program: GROUP_M row tiles, then the next column."""
    group = pid // (GROUP_M * num_n)
    group_size = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + (pid % (GROUP_M * num_n)) % group_size
    return tile, (pid % (GROUP_M * num_n)) // group_size


@triton.jit
def load_tile(p_tile, max_tiles):
    """Its expert, its first row, and the end of the expert's rows."""
    return tl.load(p_tile), tl.load(p_tile + max_tiles), tl.load(p_tile + 2 * max_tiles)


@triton.jit
def own_tile(tiles_ptr, max_tiles):
    """The row tile and the column tile of a program in `Tile.grid`'s three dimensions, in the order
    of `swizzle` without its divisions, and what `load_tile` reads there.

    It is read before it is known to be one: those past the last are not written, but there.
    """
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    expert, first_row, end = load_tile(tiles_ptr + tl.minimum(tile, max_tiles - 1), max_tiles)
    return tile, tl.program_id(1), expert, first_row, end
