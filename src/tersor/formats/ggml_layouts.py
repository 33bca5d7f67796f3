"""The drawn layouts of ggml's blocks, for docs/formats.md. Byte offsets in decimal; every multi-byte number is little-endian.

Source: ggml-org/ggml src/ggml-common.h (structs, tables) and src/ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

_NIBBLES_32 = "byte i of qs = value(i+16) << 4 | value(i), i < 16"
_FIFTH_BIT = "bit i of qh (32 bits) = bit 4 of value i"
_K_SCALES = """\
scales: eight 6-bit scales s and minima m of the sub-blocks
  byte j     = s(j+4) bits 5..4 | s(j) bits 5..0        j < 4
  byte 4 + j = m(j+4) bits 5..4 | m(j) bits 5..0
  byte 8 + j = m(j+4) bits 3..0 | s(j+4) bits 3..0
"""
_IQ4 = "L = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113\n"
_E2M1 = "L = 0 1 2 3 4 6 8 12 0 -1 -2 -3 -4 -6 -8 -12 (E2M1, doubled)\n"
_SIGNS_128 = "sign index s of 7 bits stands for 8 signs: bit k of s = value k negative, k < 7; the eighth makes the count even\n"

LAYOUTS = {
    "q4_0": f"""\
32 values, 18 bytes, 4.5 bits/weight       0 d float16 | 2 qs[16]
{_NIBBLES_32}
w = d * (q - 8)
""",
    "q4_1": f"""\
32 values, 20 bytes, 5 bits/weight         0 d float16 | 2 m float16 | 4 qs[16]
{_NIBBLES_32}
w = d * q + m
""",
    "q5_0": f"""\
32 values, 22 bytes, 5.5 bits/weight       0 d float16 | 2 qh[4] | 6 qs[16]
{_NIBBLES_32}; {_FIFTH_BIT}
w = d * (q - 16)
""",
    "q5_1": f"""\
32 values, 24 bytes, 6 bits/weight         0 d float16 | 2 m float16 | 4 qh[4] | 8 qs[16]
{_NIBBLES_32}; {_FIFTH_BIT}
w = d * q + m
""",
    "q8_0": """\
32 values, 34 bytes, 8.5 bits/weight       0 d float16 | 2 qs[32] int8
w = d * q; our code is q + 128
""",
    "q2_k": """\
256 values, 84 bytes, 2.625 bits/weight    0 scales[16] | 16 qs[64] | 80 d float16 | 82 dmin float16
byte b of scales = m(b) << 4 | s(b), for the sub-block of 16 values b = i / 16
value i: bits 2*(i/32 % 4).. of byte 32*(i/128) + i%32 of qs
w = d * s * q - dmin * m
""",
    "q3_k": """\
256 values, 110 bytes, 3.4375 bits/weight  0 hmask[32] | 32 qs[64] | 96 scales[12] | 108 d float16
value i: bits 1..0 = bits 2*(i/32 % 4).. of byte 32*(i/128) + i%32 of qs; bit 2 = bit i/32 of byte i%32 of hmask
scales: sixteen 6-bit s, stored + 32; s(b), b = i / 16
  byte j     = s(j+8) bits 3..0 | s(j) bits 3..0                                                  j < 8
  byte 8 + j = s(j+12) bits 5..4 | s(j+8) bits 5..4 | s(j+4) bits 5..4 | s(j) bits 5..4           j < 4
w = d * (s - 32) * (q - 4)
""",
    "q4_k": f"""\
256 values, 144 bytes, 4.5 bits/weight     0 d float16 | 2 dmin float16 | 4 scales[12] | 16 qs[128]
{_K_SCALES}byte 32*k + i of qs = value(64*k + 32 + i) << 4 | value(64*k + i), k < 4, i < 32; sub-block b = i / 32
w = d * s * q - dmin * m
""",
    "q5_k": f"""\
256 values, 176 bytes, 5.5 bits/weight     0 d float16 | 2 dmin float16 | 4 scales[12] | 16 qh[32] | 48 qs[128]
{_K_SCALES}qs as in q4_k; bit i/32 of byte i%32 of qh = bit 4 of value i
w = d * s * q - dmin * m
""",
    "q6_k": """\
256 values, 210 bytes, 6.5625 bits/weight  0 ql[128] | 128 qh[64] | 192 scales[16] int8 | 208 d float16
value i: bits 3..0 = nibble (i/64 % 2) of byte 64*(i/128) + i%64 of ql
         bits 5..4 = bits 2*(i/32 % 4).. of byte 32*(i/128) + i%32 of qh
w = d * s(i/16) * (q - 32)
""",
    "iq4_nl": f"""\
32 values, 18 bytes, 4.5 bits/weight       0 d float16 | 2 qs[16]
{_NIBBLES_32}
w = d * L[q], {_IQ4}""",
    "iq4_xs": f"""\
256 values, 136 bytes, 4.25 bits/weight    0 d float16 | 2 scales_h uint16 | 4 scales_l[4] | 8 qs[128]
s(b), 6 bits, b = i / 32: bits 3..0 = nibble b%2 of scales_l[b/2]; bits 5..4 = bits 2*b.. of scales_h
byte 16*b + i of qs = value(32*b + 16 + i) << 4 | value(32*b + i), i < 16
w = d * (s - 32) * L[q], {_IQ4}""",
    "tq1_0": """\
256 values, 54 bytes, 1.6875 bits/weight   0 qs[48] | 48 qh[4] | 52 d float16
byte = ceil(256 * t / 243), t = 81*q0 + 27*q1 + 9*q2 + 3*q3 + q4 (qh: four trits, 81 down to 3)
qs[i], i < 32: values i, 32+i, 64+i, 96+i, 128+i; qs[32+i], i < 16: 160+i, 176+i, .. 224+i; qh[i]: 240+i, 244+i, 248+i, 252+i
w = d * (q - 1), q in 0..2
""",
    "tq2_0": """\
256 values, 66 bytes, 2.0625 bits/weight   0 qs[64] | 64 d float16
value i: bits 2*(i/32 % 4).. of byte 32*(i/128) + i%32 of qs
w = d * (q - 1), q in 0..2 (3 is read as 2d, never written)
""",
    "mxfp4": f"""\
32 values, 17 bytes, 4.25 bits/weight      0 e | 1 qs[16]
{_NIBBLES_32}
w = 2^(e - 128) * L[q], {_E2M1}""",
    "iq1_s": """\
256 values, 50 bytes, 1.5625 bits/weight   0 d float16 | 2 qs[32] | 34 qh[8] uint16             (decode only)
eight values at a time: grid row index = qs[i/8] | bits 3*(i/8 % 4).. of qh[i/32] (three of them) << 8, of 2048 rows over {-1, 0, 1}
qh bits 14..12 = s, bit 15 = negative shift
w = d * (2*s + 1) * (grid + shift), shift = +-0.125
""",
    "iq1_m": """\
256 values, 56 bytes, 1.75 bits/weight     0 qs[32] | 32 qh[16] | 48 scales[4] uint16           (decode only)
d float16 = the top nibbles of the four scales, the first lowest; s(b), b = i / 16: bits 3*(b%4).. of scales[b/4]
per eight values a nibble of qh: three upper bits of the grid row index, bit 3 = negative shift; the grid of iq1_s
w = d * (2*s + 1) * (grid + shift), shift = +-0.125
""",
    "iq2_xxs": f"""\
256 values, 66 bytes, 2.0625 bits/weight   0 d float16 | 2 qs[8] of 8 bytes, one per 32 values        (decode only)
4 bytes of grid row indices (256 rows over 8, 25, 43), then uint32: 4 sign indices of 7 bits, s in bits 31..28
{_SIGNS_128}w = d * (s + 1/2) / 4 * grid * sign
""",
    "iq2_xs": f"""\
256 values, 74 bytes, 2.3125 bits/weight   0 d float16 | 2 qs[32] uint16 | 66 scales[8]              (decode only)
per eight values: bits 8..0 of qs = grid row index (512 rows over 8, 25, 43), bits 15..9 = sign index
s(b) = nibble b%2 of scales[b/2], b = i / 16
{_SIGNS_128}w = d * (s + 1/2) / 4 * grid * sign
""",
    "iq2_s": """\
256 values, 82 bytes, 2.5625 bits/weight   0 d float16 | 2 qs[32] | 34 signs[32] | 66 qh[8] | 74 scales[8]   (decode only)
per eight values: row index = qs[i/8] | bits 2*(i/8 % 4).. of qh[i/32] << 8 (1024 rows over 8, 25, 43)
bit k of signs[i/8] = value k negative; s(b) = nibble b%2 of scales[b/2], b = i / 16
w = d * (s + 1/2) / 4 * grid * sign
""",
    "iq3_xxs": f"""\
256 values, 98 bytes, 3.0625 bits/weight   0 d float16 | 2 qs[64] | 66 uint32[8], one per 32 values   (decode only)
qs[i/4] = row index of four values (256 rows over 4 12 20 28 36 44 52 62); uint32: 4 sign indices of 7 bits, s in bits 31..28
{_SIGNS_128}w = d * (s + 1/2) / 2 * grid * sign
""",
    "iq3_s": """\
256 values, 110 bytes, 3.4375 bits/weight  0 d float16 | 2 qs[64] | 66 qh[8] | 74 signs[32] | 106 scales[4]  (decode only)
row index of four values = qs[i/4] | bit i/4 % 8 of qh[i/32] << 8 (512 rows over 1 3 5 .. 15); bit i%8 of signs[i/8] = negative
s(b) = nibble b%2 of scales[b/2], b = i / 32
w = d * (2*s + 1) * grid * sign
""",
    "nvfp4": f"""\
64 values, 36 bytes, 4.5 bits/weight       0 d[4] UE4M3, one per 16 values | 4 qs[32]                 (decode only)
byte 8*b + i of qs = value(16*b + 8 + i) << 4 | value(16*b + i), i < 8
w = d / 2 * L[q]; UE4M3: exponent bits 6..3, bias 7, mantissa bits 2..0; 0x7f reads as 0
{_E2M1}""",
    "q1_0": """\
128 values, 18 bytes, 1.125 bits/weight    0 d float16 | 2 qs[16]                                     (decode only)
bit i%8 of byte i/8 of qs: w = d when set, else -d
""",
    "q2_0": """\
64 values, 18 bytes, 2.25 bits/weight      0 d float16 | 2 qs[16]                                     (decode only)
value i: bits 2*(i%4).. of byte i/4 of qs
w = d * (q - 1)
""",
}
