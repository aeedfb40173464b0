"""What works on this machine, and what is missing."""

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

import moezoo
from moezoo.loaders.memory import free_memory

WORKS, MISSING, BROKEN = "works", "missing", "broken"
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """Result of a check. `state` is "works", "missing" (not everything needs it) or "broken"."""

    subject: str
    state: str
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> bool:
        return any(finding.state == BROKEN for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"broken": self.broken, "findings": [asdict(x) for x in self.findings]}

    def __rich__(self) -> Table:
        table = Table(title="This machine", box=SIMPLE)
        colors = {WORKS: "green", MISSING: "yellow", BROKEN: "red"}
        for name in ("", "", "found", "what to do"):
            table.add_column(name, overflow="fold")
        for x in self.findings:
            # As texts, or rich would take what is in brackets for markup.
            state = Text(x.state, colors[x.state])
            table.add_row(x.subject, state, Text(x.detail), Text(x.advice))
        return table


def examine() -> Diagnosis:
    """Run every check and return the findings; a check that fails is a finding, not an error."""
    findings: list[Finding] = []
    for look in (_software, _extras, _gpus, _triton, _memory, _cache, _model):
        try:
            findings += look()
        except Exception as error:  # whatever is wrong with this machine is what is asked for
            what = f"{type(error).__name__}: {error}"
            findings.append(Finding(look.__name__.strip("_"), BROKEN, what))
    return Diagnosis(tuple(findings))


def _software() -> Iterator[Finding]:
    yield Finding("moezoo", WORKS, f"{moezoo.__version__} in {Path(moezoo.__file__).parent}")
    yield Finding("Python", WORKS, f"{platform.python_version()} ({sys.executable})")
    for package, least, below in (("torch", "2.11", None), ("transformers", "5.17", "6")):
        version = Version(metadata.version(package))
        fits = version >= Version(least) and (below is None or version < Version(below))
        wanted = f"{package}>={least}" + (f",<{below}" if below else "")
        advice = "" if fits else f"pip install '{wanted}'"
        yield Finding(package, WORKS if fits else BROKEN, str(version), advice)


def _extras() -> Iterator[Finding]:
    for package, use, install in (
        ("matplotlib", "plots", "pip install 'moezoo[plots]'"),
        ("lm_eval", "lm-eval", "pip install lm-eval"),
        ("peft", "adapters", "pip install peft"),
    ):
        try:
            yield Finding(package, WORKS, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, MISSING, f"needed for {use} only", install)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        detail = (
            "torch is built for CPUs" if built is None else f"torch for CUDA {built} finds none"
        )
        advice = "install torch for CUDA" if built is None else "look at nvidia-smi and the driver"
        yield Finding("GPU", MISSING, f"{detail}; models run on the CPU", advice)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        detail = f"{properties.name}, {free / GB:.1f} of {total / GB:.1f} GB free, sm {capability}"
        fp8 = (properties.major, properties.minor) >= (8, 9)
        detail += ", fp8" if fp8 else ""
        advice = "" if fp8 else "fp8 experts need Ada, Hopper or newer; int8, int4 and mxfp4 run"
        yield Finding(f"GPU {index}", WORKS, detail, advice)
    if torch.cuda.device_count() > 1:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", WORKS, f"{version}; experts can be divided over the GPUs")


def _triton() -> Iterator[Finding]:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        needed = torch.cuda.is_available()
        state = BROKEN if needed else MISSING
        yield Finding("Triton", state, "not installed; GPUs need it", "pip install triton")
        return
    if not torch.cuda.is_available():
        yield Finding("Triton", WORKS, f"{version}; not used on a CPU")
        return
    from moezoo.layers.moe.routing import softmax_topk

    logits = torch.randn(3, 8)
    ids = softmax_topk(logits.cuda(), 2, renormalize=True)[1].cpu()
    right = torch.equal(ids, softmax_topk(logits, 2, renormalize=True)[1])
    detail = f"{version}; a kernel compiles and runs" if right else f"{version}: wrong results"
    yield Finding("Triton", WORKS if right else BROKEN, detail)


def _memory() -> Iterator[Finding]:
    free = free_memory(torch.device("cpu"))
    yield Finding("memory", WORKS, "unknown" if free is None else f"{free / GB:.1f} GB free")


def _cache() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    folder = Path(HF_HUB_CACHE)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    models = len(list(folder.glob("models--*")))
    detail = f"{folder}: {models} models, {free / GB:.0f} GB free"
    detail += "; offline (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else ""
    yield Finding("hub cache", WORKS, detail)


def _model() -> Iterator[Finding]:
    from transformers import AutoTokenizer

    from moezoo.assets import tiny_model

    model = moezoo.from_pretrained(tiny_model(), progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    (done,) = moezoo.generate(
        model, tokenizer, ["Once upon a time"], max_new_tokens=12, do_sample=False
    )
    detail = f"on {model.device}: Once upon a time{done.text}"
    state = WORKS if done.error is None and done.text.strip() else BROKEN
    yield Finding("the small model", state, detail if done.error is None else done.error)
