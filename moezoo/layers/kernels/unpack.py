"""Weights of 4 and 8 bits as the first operand of a matrix product, unpacked in registers.

A word has WAYS columns, the first in its lowest bits. A value can stay in the thread that has its
word if the product takes columns in another order: in each CHUNK words the first way of all, then
the next. The other operand must have its columns in that order too, see `interleave`.

Integers of up to 8 bits are exact in bf16 and fp16, and so are their differences. Their bits become
the lowest of a number from 128 in bf16, or from 1024 in fp16, and what stands for zero there is
subtracted; zero points of 8 bits, for which there is no room from 128 on, are subtracted in bf16
after that. A number of E2M1 is put where its exponent begins; a multiplication by a power of two,
its scale's included, makes it right, subnormal or not. In bf16 that is part of the same
instructions.

PAIRS is for NVIDIA GPUs (in bf16 from Hopper on) and words of 16 bits: an instruction works on two
values in a register. Elsewhere, in fp32 and for words of 8 bits plain operations do the same.

Legend: N rows of weights, W words of a row.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(8)
"""Words whose columns are reordered together: half the words that a matrix instruction takes."""

E2M1_SHIFT = tl.constexpr(64)
"""With PAIRS in bf16, products with E2M1 are 2^-64 of what they should be: not every factor would
fit otherwise. Scales from 2^-68 to 2^65 are exact; those beyond give 0, or Inf and NaN."""

OFFSET = (126 - E2M1_SHIFT.value) << 7
"""Number that is added to a scale's exponent, in the exponent field of bf16."""
INFINITY = 0x7F80

INTEGERS = {"bf16": ("0x43004300", "bf16x2"), "fp16": ("0x64006400", "f16x2")}


def _asm(*lines: str) -> tl.constexpr:
    return tl.constexpr(
        "{ .reg .b32 s, t, u, v; .reg .b16 low, high, other; " + " ".join(lines) + " }"
    )


def _int4(dtype: str) -> tl.constexpr:
    """$0..$3 = nibbles of $4, less the zero points in $5."""
    one, pair = INTEGERS[dtype]
    return _asm(
        *(
            f"shr.u32 t, $4, {4 * way}; lop3.b32 t, t, 0x000F000F, {one}, 0xEA; "
            f"sub.{pair} ${way}, t, $5;"
            for way in range(4)
        )
    )


def _int8_bf16(zeros: str = "") -> tl.constexpr:
    """$0, $1 = signed bytes of $2: 128 and seven bits, less 128, or 256 if they are negative; less
    the zero points in `zeros`."""
    return _asm(
        *(
            f"shr.u32 s, $2, {8 * way}; lop3.b32 t, s, 0x007F007F, 0x43004300, 0xEA; "
            f"lop3.b32 u, s, 0x00800080, 0x43004300, 0xEA; sub.bf16x2 ${way}, t, u;"
            + (f" sub.bf16x2 ${way}, ${way}, {zeros};" if zeros else "")
            for way in range(2)
        )
    )


def _int8_fp16(zeros: str = "0x64806480") -> tl.constexpr:
    """$0, $1 = signed bytes of $2, less the zero points: with the sign turned they are 128 more."""
    return _asm(
        f"mov.b32 u, {zeros};",
        *(
            f"shr.u32 s, $2, {8 * way}; lop3.b32 t, s, 0x00FF00FF, 0x64806480, 0x6A; "
            f"sub.f16x2 ${way}, t, u;"
            for way in range(2)
        ),
    )


def _e2m1_bf16() -> tl.constexpr:
    """$0..$3 = nibbles of $4 as E2M1 times 2^-126, those of its low half times the factor $5, those
    of its high half times $6.

    The sign goes to bit 15, the others to bits 6 to 8: one multiplication takes a nibble to both.
    """
    return _asm(
        # Where both are the same register these are no instructions.
        "mov.b32 {low, other}, $5; mov.b32 {other, high}, $6; mov.b32 v, {low, high};",
        "shr.u32 s, $4, 8;",
        *(
            f"and.b32 t, {'s' if way > 1 else '$4'}, {'0x00F000F0' if way % 2 else '0x000F000F'}; "
            f"mul.lo.u32 u, t, {0x104 if way % 2 else 0x1040}; and.b32 u, u, 0x81C081C0; "
            f"mul.bf16x2 ${way}, u, v;"
            for way in range(4)
        ),
    )


def _power_bf16() -> tl.constexpr:
    """$0 = the pair of 2^($1 - 65), Inf from 193 on."""
    return _asm(
        f"mad.lo.u32 s, $1, 0x800080, {OFFSET << 16 | OFFSET}; "
        f"mov.b32 t, {INFINITY << 16 | INFINITY}; min.u16x2 $0, s, t;"
    )


def _e2m1_fp16() -> tl.constexpr:
    """$0..$3 = nibbles of $4 as E2M1 times 2^-14: sign to bit 15, the others to bits 9 to 11."""
    return _asm(
        *(
            (f"shl.b32 s, $4, {9 - 4 * way}; " if way < 3 else "shr.u32 s, $4, 3; ")
            + f"shl.b32 t, $4, {12 - 4 * way}; and.b32 s, s, 0x0E000E00; "
            f"lop3.b32 ${way}, t, 0x80008000, s, 0xEA;"
            for way in range(4)
        )
    )


INT4_BF16, INT4_FP16 = _int4("bf16"), _int4("fp16")
INT8_BF16, INT8_FP16 = _int8_bf16(), _int8_fp16()
INT8_ZEROS_BF16, INT8_ZEROS_FP16 = _int8_bf16("$3"), _int8_fp16("$3")
E2M1_BF16, E2M1_FP16 = _e2m1_bf16(), _e2m1_fp16()
POWER_BF16 = _power_bf16()
INT4_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,r")
INT8_OPERANDS = tl.constexpr("=&r,=&r,r")
INT8_ZEROS_OPERANDS = tl.constexpr("=&r,=&r,r,r")
E2M1_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r")
SCALED_E2M1_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")
POWER_OPERANDS = tl.constexpr("=r,r")
TIMES_BF16 = tl.constexpr("mul.bf16x2 $0, $1, $2;")
TIMES_FP16 = tl.constexpr("mul.f16x2 $0, $1, $2;")


@triton.jit
def zero_points(zeros, FORMAT: tl.constexpr, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """uint8 zero points as `unpack` subtracts them."""
    if FORMAT == "int8" and not (PAIRS and dtype == tl.float16):
        # Of signed codes.
        return (zeros.to(tl.float32) - 128.0).to(dtype if PAIRS else tl.float32)
    elif not PAIRS:
        return zeros.to(tl.float32)
    elif dtype == tl.bfloat16:
        return (zeros.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (zeros.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def no_zero_points(shape: tl.constexpr, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """int4's of 8: a constant, of which the compiler knows that it costs nothing in any layout."""
    if not PAIRS:
        return tl.full(shape, 8.0, tl.float32)
    elif dtype == tl.bfloat16:
        return tl.full(shape, 136.0, tl.bfloat16)
    else:
        return tl.full(shape, 1032.0, tl.float16)


@triton.jit
def _unpack_pairs(
    words, zeros, factor, FORMAT: tl.constexpr, HAS_ZEROS: tl.constexpr, dtype: tl.constexpr
):
    if dtype == tl.bfloat16:
        if FORMAT == "int4":
            return tl.inline_asm_elementwise(
                INT4_BF16, INT4_OPERANDS, [words, zeros], (tl.bfloat16,) * 4, True, 2
            )
        elif FORMAT == "int8" and HAS_ZEROS:
            return tl.inline_asm_elementwise(
                INT8_ZEROS_BF16, INT8_ZEROS_OPERANDS, [words, zeros], (tl.bfloat16,) * 2, True, 2
            )
        elif FORMAT == "int8":
            return tl.inline_asm_elementwise(
                INT8_BF16, INT8_OPERANDS, [words], (tl.bfloat16,) * 2, True, 2
            )
        else:
            return tl.inline_asm_elementwise(
                E2M1_BF16, SCALED_E2M1_OPERANDS, [words, factor], (tl.bfloat16,) * 4, True, 2
            )
    else:
        if FORMAT == "int4":
            return tl.inline_asm_elementwise(
                INT4_FP16, INT4_OPERANDS, [words, zeros], (tl.float16,) * 4, True, 2
            )
        elif FORMAT == "int8" and HAS_ZEROS:
            return tl.inline_asm_elementwise(
                INT8_ZEROS_FP16, INT8_ZEROS_OPERANDS, [words, zeros], (tl.float16,) * 2, True, 2
            )
        elif FORMAT == "int8":
            return tl.inline_asm_elementwise(
                INT8_FP16, INT8_OPERANDS, [words], (tl.float16,) * 2, True, 2
            )
        else:
            return tl.inline_asm_elementwise(
                E2M1_FP16, E2M1_OPERANDS, [words], (tl.float16,) * 4, True, 2
            )


@triton.jit
def _unpack_plain(words, zeros, way: tl.constexpr, FORMAT: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """In fp32."""
    bits = words.to(tl.int32)
    if FORMAT == "int8":
        value = ((bits << (24 - 8 * way)) >> 24).to(tl.float32)
        return value - zeros if HAS_ZEROS else value
    elif FORMAT == "int4":
        return ((bits >> (4 * way)) & 15).to(tl.float32) - zeros
    else:
        code = (bits >> (4 * way)) & 15
        # As an exponent and a mantissa of fp32 they are 2^-126 of what they should be.
        value = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37
        return tl.where(code >= 8, -value, value)


@triton.jit
def factors(scales, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """mxfp4's scales as `unpack` multiplies by them: with PAIRS in bf16 pairs of them, int32."""
    exponent = scales.to(tl.int32)
    if PAIRS and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(POWER_BF16, POWER_OPERANDS, [exponent], tl.int32, True, 1)
    else:
        # The least, 2^-127, is subnormal.
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        factor = bits.to(tl.float32, bitcast=True)
        return factor.to(dtype) if PAIRS else factor


@triton.jit
def _times(a, b, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(TIMES_BF16, "=r,r,r", [a, b], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(TIMES_FP16, "=r,r,r", [a, b], tl.float16, True, 2)


@triton.jit
def _in_chunks(ways, WAYS: tl.constexpr):
    """WAYS tensors [N, W] -> [N, WAYS * W], in the order chunk, way, word"""
    N: tl.constexpr = ways[0].shape[0]
    W: tl.constexpr = ways[0].shape[1]
    if WAYS == 1:
        return ways[0]
    elif WAYS == 2:
        both = tl.reshape(tl.join(ways[0], ways[1]), [N, W // CHUNK, CHUNK, 2])
        return tl.reshape(tl.permute(both, [0, 1, 3, 2]), [N, 2 * W])
    else:
        tl.static_assert(WAYS == 4)
        all = tl.join(tl.join(ways[0], ways[1]), tl.join(ways[2], ways[3]))
        all = tl.reshape(all, [N, W // CHUNK, CHUNK, 2, 2])
        return tl.reshape(tl.permute(all, [0, 1, 4, 3, 2]), [N, 4 * W])


@triton.jit
def unpack(
    words,
    zeros,
    factor,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    dtype: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """words [N, W] -> weights [N, WAYS * W] of dtype, in the order chunk, way, word; if SCALED,
    times the factors.

    zeros and factor, of `zero_points` and `factors`, broadcast to words.
    """
    if PAIRS:
        tl.static_assert(SCALED or FORMAT != "mxfp4")
        ways = _unpack_pairs(words, zeros, factor, FORMAT, HAS_ZEROS, dtype)
        if SCALED and not (FORMAT == "mxfp4" and dtype == tl.bfloat16):
            scaled = ()
            for way in tl.static_range(WAYS):
                if FORMAT == "mxfp4":
                    # Its bits are 2^-14 of what they should be, and no factor has room for that.
                    value = _times(ways[way], tl.full(words.shape, 16384.0, dtype), dtype)
                    scaled += (_times(value, factor, dtype),)
                else:
                    scaled += (_times(ways[way], factor, dtype),)
            return _in_chunks(scaled, WAYS)
        else:
            return _in_chunks(ways, WAYS)
    else:
        ways = ()
        for way in tl.static_range(WAYS):
            value = _unpack_plain(words, zeros, way, FORMAT, HAS_ZEROS)
            if SCALED:
                value *= factor
            ways += (value.to(dtype),)
        return _in_chunks(ways, WAYS)
