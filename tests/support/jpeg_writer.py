"""Writes JPEG files that Pillow does not write: any sampling factors, a scan per component, restart markers.

Each block of 8x8 samples has one value, so that a block is coded in a few bits: no picture to look at, but one of which
every block is known to the decoder.
"""

from __future__ import annotations

import random

Factors = tuple[int, int]  # horizontal and vertical

_BASELINE = 0xC0
_PROGRESSIVE = 0xC2
_QUANTUM = 16  # a step of a block's value is _QUANTUM / 8 in its samples
_LARGEST_VALUE = 50
_CATEGORIES = 12  # of differences: category n has n bits
_END_OF_BLOCK = "0"


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body


def sampled_jpeg(
    width_px: int,
    height_px: int,
    factors: tuple[Factors, ...],
    *,
    restart_blocks: int = 0,
    scan_per_component: bool = False,
    progressive: bool = False,
    seed: int = 0,
) -> bytes:
    """Return a JPEG of random blocks whose components have these sampling factors."""
    dice = random.Random(seed)  # noqa: S311 (no secret)
    count = len(factors)
    frame = bytes([8]) + height_px.to_bytes(2) + width_px.to_bytes(2) + bytes([count])
    for number, (horizontal, vertical) in enumerate(factors):
        frame += bytes([number + 1, horizontal << 4 | vertical, 0])
    parts = [
        b"\xff\xd8",
        segment(0xDB, bytes([0]) + bytes([_QUANTUM] * 64)),
        segment(_PROGRESSIVE if progressive else _BASELINE, frame),
        # Twelve codes of four bits for differences; one code of one bit, for "nothing more in this block".
        segment(0xC4, bytes([0x00, 0, 0, 0, _CATEGORIES, *[0] * 12, *range(_CATEGORIES)])),
        segment(0xC4, bytes([0x10, 1, *[0] * 15, 0])),
    ]
    if restart_blocks:
        parts.append(segment(0xDD, restart_blocks.to_bytes(2)))
    scans = [[number] for number in range(count)] if scan_per_component else [list(range(count))]
    for scan in scans:
        selectors = b"".join(bytes([number + 1, 0]) for number in scan)
        parts.append(segment(0xDA, bytes([len(scan)]) + selectors + bytes([0, 0 if progressive else 63, 0])))
        units = _units(width_px, height_px, factors, scan)
        end_of_block = "" if progressive else _END_OF_BLOCK
        parts.append(_coded(units, len(factors), restart_blocks, end_of_block, dice))
    return b"".join(parts) + b"\xff\xd9"


def _units(width_px: int, height_px: int, factors: tuple[Factors, ...], scan: list[int]) -> list[list[int]]:
    """Return the components of the blocks of each unit of a scan (ITU T.81, A.2)."""
    most_horizontal = max(horizontal for horizontal, _vertical in factors)
    most_vertical = max(vertical for _horizontal, vertical in factors)
    if len(scan) == 1 and len(factors) > 1:
        horizontal, vertical = factors[scan[0]]
        samples_across = -(-width_px * horizontal // most_horizontal)
        samples_down = -(-height_px * vertical // most_vertical)
        return [scan] * (-(-samples_across // 8) * -(-samples_down // 8))
    if len(factors) == 1:
        return [scan] * (-(-width_px // 8) * -(-height_px // 8))
    unit = [number for number in scan for _block in range(factors[number][0] * factors[number][1])]
    across = -(-width_px // (8 * most_horizontal))
    down = -(-height_px // (8 * most_vertical))
    return [unit] * (across * down)


def _coded(
    units: list[list[int]], components: int, restart_blocks: int, end_of_block: str, dice: random.Random
) -> bytes:
    coded = bytearray()
    bits: list[str] = []
    before = [0] * components
    for number, unit in enumerate(units):
        if restart_blocks and number and number % restart_blocks == 0:
            coded += _packed(bits) + bytes([0xFF, 0xD0 + (number // restart_blocks - 1) % 8])
            bits.clear()
            before = [0] * components
        for component in unit:
            value = dice.randint(-_LARGEST_VALUE, _LARGEST_VALUE)
            bits.append(_difference(value - before[component]) + end_of_block)
            before[component] = value
    return bytes(coded + _packed(bits))


def _difference(difference: int) -> str:
    """Return the bits of a difference: its category, and which of the category it is (ITU T.81, F.1.2.1)."""
    category = abs(difference).bit_length()
    if category == 0:
        return f"{category:04b}"
    which = difference if difference > 0 else difference + (1 << category) - 1
    return f"{category:04b}{which:0{category}b}"


def _packed(bits: list[str]) -> bytes:
    joined = "".join(bits)
    joined += "1" * (-len(joined) % 8)
    packed = int(joined or "0", 2).to_bytes(len(joined) // 8)
    return packed.replace(b"\xff", b"\xff\x00")
