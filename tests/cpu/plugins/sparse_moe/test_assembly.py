"""The inline assembly, which the interpreter leaves out, run for every input by an interpreter of its own."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from step35_trt.kernels.plugin import load

products = load("sparse_moe", "products")
BF16 = ml_dtypes.bfloat16


def halves(function):
    def apply(a, b):
        with np.errstate(invalid="ignore"):
            return function(a.view(BF16), b.view(BF16)).astype(BF16).view(np.uint32)

    return apply


def prmt(a, b, selector):
    sources = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    digits = [int(selector[0]) >> 4 * i & 15 for i in range(4)]
    assert max(digits) < 8
    return np.ascontiguousarray(sources[:, digits]).view(np.uint32)[:, 0]


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "cvt.u32.u16": lambda a: a & np.uint32(0xFFFF),
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "sub.bf16x2": halves(np.subtract),
    "mul.bf16x2": halves(np.multiply),
}


def run(assembly, results, *operands):
    """Each result as pairs of bf16."""
    count = len(operands[0])
    registers = {f"${results + i}": operand for i, operand in enumerate(operands)}
    for line in assembly.value.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, rest = line.strip().split(None, 1)
        target, *sources = (part.strip() for part in rest.split(","))
        values = [registers[s] if s in registers else np.full(count, int(s, 0), np.uint32) for s in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"].view(BF16).reshape(count, 2).astype(np.float32) for i in range(results)]


def test_every_word_of_nibbles():
    low = np.arange(1 << 16, dtype=np.uint32)
    high = low[::-1].copy()
    parts = run(products.NIBBLES, 4, low | high << np.uint32(16))
    for j, part in enumerate(parts):
        for side, word in enumerate((low, high)):
            code = (word >> np.uint32(4 * j) & np.uint32(15)).astype(np.float32)
            np.testing.assert_array_equal(part[:, side], code - 8)


def number(byte):
    """What the format makes of a byte: 480 where e4m3 has NaN."""
    value = byte.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.where(np.isnan(value), np.where(byte < 128, 480, -480), value)


def test_every_e4m3_in_every_place():
    byte = np.arange(256, dtype=np.uint32)
    others = [np.random.default_rng(i).permutation(byte) for i in range(3)]
    places = [byte, *others]
    word = places[0] | places[1] << np.uint32(8) | places[2] << np.uint32(16) | places[3] << np.uint32(24)
    first, second = run(products.E4M3, 2, word)
    found = [first[:, 0], first[:, 1], second[:, 0], second[:, 1]]
    for value, place in zip(found, places, strict=True):
        np.testing.assert_array_equal(value, number(place))
    (pair,) = run(products.E4M3_PAIR, 1, places[0] | places[1] << np.uint32(8))
    for side in (0, 1):
        np.testing.assert_array_equal(pair[:, side], number(places[side]))
