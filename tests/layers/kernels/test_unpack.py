"""The instructions for pairs, which the interpreter has not, carried out here."""

import math
import random
import re
from collections.abc import Callable
from functools import partial
from operator import mul, sub
from typing import Any

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


def in_halves(operation: Callable[[int, int], int], a: int, b: int) -> int:
    low, high = (operation(x, y) & 0xFFFF for x, y in zip(halves(a), halves(b), strict=True))
    return low | high << 16


def of_numbers(operation: Callable[..., Any], dtype: torch.dtype) -> Callable[[int, int], int]:
    def on_bits(a: int, b: int) -> int:
        return int(operation(number(a, dtype), number(b, dtype)).view(torch.int16))

    return partial(in_halves, on_bits)


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & WORD,
    "and.b32": lambda a, b: a & b,
    "mul.lo.u32": lambda a, b: a * b & WORD,
    "mad.lo.u32": lambda a, b, c: a * b + c & WORD,
    "lop3.b32": lop3,
    "min.u16x2": partial(in_halves, min),
    "mul.bf16x2": of_numbers(mul, torch.bfloat16),
    "sub.bf16x2": of_numbers(sub, torch.bfloat16),
    "sub.f16x2": of_numbers(sub, torch.float16),
}


def run(asm: str, num_outputs: int, *inputs: int) -> list[int]:
    registers = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}
    for line in asm.removeprefix("{").removesuffix("}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        # Two names in braces are the halves of a register.
        target, *sources = re.findall(r"\{.*?\}|[^\s,]+", operands)
        values = [value_of(registers, source) for source in sources]
        result = OPERATIONS[name](*values)
        if target.startswith("{"):
            registers |= zip(target[1:-1].split(", "), halves(result), strict=True)
        else:
            registers[target] = result
    return [registers[f"${i}"] for i in range(num_outputs)]


def value_of(registers: dict[str, int], operand: str) -> int:
    if operand.startswith("{"):
        low, high = (registers[half] for half in operand[1:-1].split(", "))
        return low | high << 16
    return registers[operand] if operand in registers else int(operand, 0)


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
            assert found[way] == [signed(half >> 8 * way & 255) for half in halves(word)]


def test_int8_with_zero_points(words: list[int], dtype: torch.dtype) -> None:
    bf16 = dtype == torch.bfloat16
    asm = (unpack.INT8_ZEROS_BF16 if bf16 else unpack.INT8_ZEROS_FP16).value
    for i, word in enumerate(words * 10):
        zeros = (i % 256, (i * 77 + 5) % 256)
        subtracted = torch.tensor(zeros) + (-128 if bf16 else 1024)
        low, high = (int(bits) & 0xFFFF for bits in subtracted.to(dtype).view(torch.int16))
        found = values(run(asm, 2, word, low | high << 16), dtype)
        for way in range(2):
            codes = [signed(half >> 8 * way & 255) + 128 for half in halves(word)]
            assert found[way] == [code - zero for code, zero in zip(codes, zeros, strict=True)]


def signed(byte: int) -> int:
    return byte - (byte >> 7 << 8)


def test_e2m1_bf16(words: list[int]) -> None:
    for i, word in enumerate(words):
        exponents = (2 * i, i + 1)
        pairs = [(exponent + 127 << 7) * 0x10001 for exponent in exponents]
        found = values(run(unpack.E2M1_BF16.value, 4, word, *pairs), torch.bfloat16)
        for way in range(4):
            scaled = [
                value * 2.0 ** (126 - exponent)
                for value, exponent in zip(found[way], exponents, strict=True)
            ]
            assert scaled == [E2M1[half >> 4 * way & 15] for half in halves(word)]


def test_e2m1_fp16(words: list[int]) -> None:
    for word in words:
        found = values(run(unpack.E2M1_FP16.value, 4, word), torch.float16)
        for way in range(4):
            scaled = [value * 2.0**14 for value in found[way]]
            assert scaled == [E2M1[half >> 4 * way & 15] for half in halves(word)]


def test_powers() -> None:
    for exponent in range(256):
        (pair,) = values(run(unpack.POWER_BF16.value, 1, exponent), torch.bfloat16)
        assert pair == [2.0 ** (exponent - 65) if exponent < 193 else math.inf] * 2
