"""`moezoo --version`: the versions that a bug report should name."""

import argparse
from importlib import metadata
from typing import Any

import moezoo


class Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import torch

        print(f"moezoo {moezoo.__version__}")
        print(f"torch {torch.__version__}")
        for package in ("triton", "transformers"):
            try:
                print(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                print(f"{package} not installed")
        for index in range(torch.cuda.device_count()):
            print(f"GPU {index} {torch.cuda.get_device_name(index)}")
        if not torch.cuda.is_available():
            print("GPU none")
        parser.exit()
