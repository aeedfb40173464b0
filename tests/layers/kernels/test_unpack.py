"""The instructions for pairs, which the interpreter has not, carried out here."""

import random
from collections.abc import Callable

import pytest
import torch

from moezoo.layers.kernels import unpack
from moezoo.layers.quant.groups import pack
from moezoo.layers.quant.mxfp4 import Mxfp4

WORD = 0xFFFFFFFF

CODES = torch.arange(32, dtype=torch.uint8).remainder(16)
E2M1 = Mxfp4(pack(CODES)[None], torch.tensor([[127]], dtype=torch.uint8)).dequantize()[0].tolist()
"""The number of each code, twice."""


def number(bits: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype)


def halves(register: int) -> tuple[int, int]:
    return register & 0xFFFF, register >> 16


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> place & 1) << i for i, place in enumerate(bits))


def difference(a: int, b: int, dtype: torch.dtype) -> int:
    pairs = zip(halves(a), halves(b), strict=True)
    low, high = ((number(x, dtype) - number(y, dtype)).view(torch.int16) for x, y in pairs)
    return int(low) & 0xFFFF | (int(high) & 0xFFFF) << 16


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & WORD,
    "and.b32": lambda a, b: a & b,
    "mul.lo.u32": lambda a, b: a * b & WORD,
    "lop3.b32": lop3,
    "sub.bf16x2": lambda a, b: difference(a, b, torch.bfloat16),
    "sub.f16x2": lambda a, b: difference(a, b, torch.float16),
}


def run(asm: str, num_outputs: int, *inputs: int) -> list[int]:
    registers = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}
    for line in asm.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(num_outputs)]


def values(registers: list[int], dtype: torch.dtype) -> list[list[float]]:
    return [[number(half, dtype).item() for half in halves(r)] for r in registers]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def words() -> list[int]:
    generator = random.Random(0)
    return [0, WORD, 0x80008000, *(generator.getrandbits(32) for _ in range(50))]


def test_int4(words: list[int], dtype: torch.dtype) -> None:
    bf16 = dtype == torch.bfloat16
    asm = (unpack.INT4_BF16 if bf16 else unpack.INT4_FP16).value
    for i, word in enumerate(words):
        zeros = (i % 16, (i + 5) % 16)
        one = 0x4300 if bf16 else 0x6400
        found = values(run(asm, 4, word, one | zeros[0] | (one | zeros[1]) << 16), dtype)
        for way in range(4):
            codes = [half >> 4 * way & 15 for half in halves(word)]
            assert found[way] == [code - zero for code, zero in zip(codes, zeros, strict=True)]


def test_int8(words: list[int], dtype: torch.dtype) -> None:
    asm = (unpack.INT8_BF16 if dtype == torch.bfloat16 else unpack.INT8_FP16).value
    for word in words:
        found = values(run(asm, 2, word), dtype)
        for way in range(2):
            data = [(half >> 8 * way & 255).to_bytes() for half in halves(word)]
            assert found[way] == [int.from_bytes(byte, signed=True) for byte in data]


def test_e2m1(words: list[int], dtype: torch.dtype) -> None:
    bf16 = dtype == torch.bfloat16
    asm = (unpack.E2M1_BF16 if bf16 else unpack.E2M1_FP16).value
    for word in words:
        found = values(run(asm, 4, word), dtype)
        for way in range(4):
            scaled = [value * 2.0 ** (126 if bf16 else 14) for value in found[way]]
            assert scaled == [E2M1[half >> 4 * way & 15] for half in halves(word)]
