"""The report of `inspect`, and how it is shown as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moezoo.layers.moe.chunks import CHUNK_TOKENS
from moezoo.tools.shares import RankShare

AS_STORED = "as stored"
"""The key in `weight_bytes` for a quantised checkpoint as it is held."""

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Experts:
    """The routed experts, which are the same in every MoE layer."""

    num_experts: int
    per_token: int
    intermediate_size: int
    router: str
    shared_parameters: int
    """Parameters of the shared experts of one layer."""
    workspace_bytes: int
    """What one MoE layer allocates on a GPU for the longest chunk of tokens, at most."""
    formats: tuple[str, ...] = ()
    """Names of the formats that experts stay in; none where they are not quantised."""


@dataclass(frozen=True)
class Report:
    """Report of `inspect`; what could not be found is None or empty."""

    model: str
    model_type: str | None
    architecture: str | None
    checkpoint_bytes: int
    checkpoint_dtypes: Mapping[str, int]
    """Bytes on disk by dtype."""
    checkpoint_files: int
    expert_bytes_on_disk: int
    """Bytes of the tensors whose names say that they belong to routed experts."""
    supported: bool = False
    reason: str | None = None
    """Why moezoo does not run it."""
    stored_as: str | None = None
    """How quantised weights are stored, and which of them stay so in memory."""
    dtype: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    num_layers: int | None = None
    num_moe_layers: int | None = None
    experts: Experts | None = None
    parameters: int | None = None
    """Number of parameters as if none was quantised: scales and zero points do not count."""
    active_parameters: int | None = None
    """Number of parameters that a token passes through: all but the experts it is not sent to."""
    kv_cache_bytes_per_token: int | None = None
    state_bytes_per_sequence: int | None = None
    """Bytes of the states that layers keep instead of keys and values; 0 without such layers."""
    sliding_windows: Mapping[int, int] = field(default_factory=dict)
    """Number of layers whose cache stops growing at a window, by the window."""
    weight_bytes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Bytes of the weights on the fullest rank, by quantisation and then expert-parallel size; the
    first quantisation of a quantised checkpoint is AS_STORED."""
    ranks: Sequence[RankShare] = ()
    """Shares of the ranks, where an expert-parallel size was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON knows (whose object keys are strings)."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        tables = [_memory(self)] if self.weight_bytes else []
        return Group(_facts(self), *tables, *([_ranks(self)] if self.ranks else []))


def _facts(report: Report) -> Table:
    table = Table(title=Text(report.model, "table.title"), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        if value is not None:
            table.add_row(name, Text(str(value)))

    row("architecture", f"{report.architecture} (model_type {report.model_type})")
    row("supported", "yes" if report.supported else f"no: {report.reason}")
    row("quantised", report.stored_as)
    if report.checkpoint_files:
        dtypes = ", ".join(f"{_size(n)} {dtype}" for dtype, n in report.checkpoint_dtypes.items())
        files = "1 file" if report.checkpoint_files == 1 else f"{report.checkpoint_files} files"
        row("on disk", f"{_size(report.checkpoint_bytes)} in {files}: {dtypes}")
        row("of which experts", _size(report.expert_bytes_on_disk))
    if report.parameters is not None and report.active_parameters is not None:
        active = f"{report.active_parameters:,} active per token"
        before = "" if report.stored_as is None else " (before quantisation)"
        row("parameters", f"{report.parameters:,}, {active}{before}")
        dense = (report.num_layers or 0) - (report.num_moe_layers or 0)
        row("layers", f"{report.num_layers}: {report.num_moe_layers} MoE, {dense} dense")
        row("hidden size", report.hidden_size)
        row("vocabulary", report.vocab_size)
        row("context", report.context_length)
    if (experts := report.experts) is not None:
        row("experts", f"{experts.per_token} of {experts.num_experts}")
        row("expert width", experts.intermediate_size)
        row("router", experts.router)
        if experts.shared_parameters:
            row("shared experts", f"{experts.shared_parameters:,} parameters a layer")
        row("layer workspace", f"{_size(experts.workspace_bytes)} per {CHUNK_TOKENS} tokens")
    if report.kv_cache_bytes_per_token is not None:
        row("KV cache", f"{report.kv_cache_bytes_per_token:,} bytes per token")
    if report.state_bytes_per_sequence:
        row("states", f"{report.state_bytes_per_sequence:,} bytes per sequence")
    for window, layers in report.sliding_windows.items():
        row("sliding window", f"{window} tokens in {layers} layers")
    return table


def _memory(report: Report) -> Table:
    """Return the table of weights, in one unit so that seven columns fit an 80-column terminal."""
    sizes = list(next(iter(report.weight_bytes.values())))
    most = max(max(per_rank.values()) for per_rank in report.weight_bytes.values())
    power = max(0, min(4, (len(str(most)) - 2) // 3))
    table = Table(
        title=f"{UNITS[power]} of weights per GPU, by expert-parallel size",
    )
    table.add_column("experts as", no_wrap=True)
    for size in sizes:
        table.add_column(str(size), justify="right", no_wrap=True)
    for name, per_rank in report.weight_bytes.items():
        table.add_row(name, *(_number(per_rank[size] / 1000**power) for size in sizes))
    return table


def _ranks(report: Report) -> Table:
    table = Table(title=f"each of {len(report.ranks)} ranks, as the checkpoint is stored")
    table.add_column("rank", justify="right")
    for name in ("experts", "in memory", "read", "in files to download"):
        table.add_column(name, justify="right")
    for share in report.ranks:
        sizes = share.weight_bytes, share.read_bytes, share.download_bytes
        table.add_row(str(share.rank), str(share.experts), *map(_size, sizes))
    return table


def _number(value: float) -> str:
    """Format with three digits, or all that stand before the point: 9.23, 61.1, 1342."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def _size(nbytes: int) -> str:
    if nbytes < 1_000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in UNITS[1:-1]:
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} {UNITS[-1]}"
