"""The small trained model that `make demo`, the notebooks and the tests use."""

from pathlib import Path


def tiny_model() -> Path:
    """Folder of the trained Qwen3-MoE checkpoint in the package (14 MB; its README is the card)."""
    return Path(__file__).parent / "tiny-qwen3-moe"
