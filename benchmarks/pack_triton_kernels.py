"""Make a wheel of the triton_kernels that vLLM's wheel carries, for the peer of that name.

python -m pip download --no-deps --only-binary=:all: -d /tmp vllm==0.33.0
python benchmarks/pack_triton_kernels.py /tmp/vllm-0.33.0-*.whl FOLDER
"""

import sys
import zipfile
from pathlib import Path

INSIDE = "vllm/third_party/"


def pack(wheel: Path, folder: Path) -> Path:
    version = "0+vllm" + wheel.name.split("-")[1]
    info = f"triton_kernels-{version}.dist-info/"
    target = folder / f"triton_kernels-{version}-py3-none-any.whl"
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        names = [n for n in source.namelist() if n.startswith(f"{INSIDE}triton_kernels/")]
        if not names:
            raise SystemExit(f"{wheel} holds no {INSIDE}triton_kernels")
        files = {name.removeprefix(INSIDE): source.read(name) for name in names}
        metadata = f"Metadata-Version: 2.1\nName: triton_kernels\nVersion: {version}\n"
        files[info + "METADATA"] = metadata.encode()
        tags = "Wheel-Version: 1.0\nGenerator: moezoo\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files[info + "WHEEL"] = tags.encode()
        files[info + "RECORD"] = "".join(
            f"{name},,\n" for name in (*files, info + "RECORD")
        ).encode()
        for name, content in files.items():
            out.writestr(name, content)
    return target


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2])))
