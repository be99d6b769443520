"""The marker segments of a JPEG file (ITU T.81, annex B), from its start to the end of its first image.

Segments are skipped by their length, so that previews inside metadata are not taken for scans of the image, and what
lies behind the image (a motion photograph's film, other files of a memory card) is not looked at.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass

from adc_worker.errors import ImageUnreadable

START_OF_IMAGE = b"\xff\xd8"
END_OF_IMAGE = b"\xff\xd9"

_EOI = 0xD9
_SOS = 0xDA
_STANDALONE = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})  # markers without a length: TEM, SOI, RST0 to RST7
_NOT_FRAMES = frozenset({0xC4, 0xC8, 0xCC})  # DHT, JPG, DAC stand between the codes of the frame headers
_FRAMES = frozenset(range(0xC0, 0xD0)) - _NOT_FRAMES
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_LENGTH_BYTES = 2
_FRAME_BYTES = 6  # of a frame header before its components
_COMPONENT_BYTES = 3
_COMPONENTS_MAX = 4

_ANY_MARKER = re.compile(rb"\xff[\x01-\xfe]")
# In coded data a zero byte hides an 0xFF, and restart markers belong to the scan.
_MARKER_BEHIND_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")

# Chosen: an encoder writes some dozens; 65 536 of them take this parser 0.1 s.
SEGMENTS_MAX = 1 << 16

_SAMPLING_420 = ((2, 2), (1, 1), (1, 1))

Data = mmap.mmap | bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """One marker segment: `start` is the offset of its marker, `body` that of its content, `end` lies behind it.

    A scan's `end` lies behind its header; its coded data follow.
    """

    marker: int
    start: int
    body: int
    end: int


class SegmentCut(Exception):
    """The file ends before its image does; what stands before `usable_bytes` are whole segments and coded data."""

    def __init__(self, usable_bytes: int) -> None:
        super().__init__(usable_bytes)
        self.usable_bytes = usable_bytes


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a file ends early.

    Attributes:
        usable_bytes: how many bytes hold whole segments and coded data.
        has_pixels: whether there is coded data among them.
    """

    usable_bytes: int
    has_pixels: bool


class SegmentBroken(Exception):
    """A segment says of itself that it is shorter than its own length field."""


@dataclass(frozen=True, slots=True)
class JpegStructure:
    """What the segments say about how an image is coded.

    Attributes:
        progressive: whether the frame is progressive.
        sampling: horizontal and vertical sampling factor of each component.
        first_scan_components: number of components in the first scan.
    """

    progressive: bool
    sampling: tuple[tuple[int, int], ...]
    first_scan_components: int

    @property
    def buffered(self) -> bool:
        """Whether a decoder keeps all coefficients until the last scan."""
        return self.progressive or self.first_scan_components < len(self.sampling)

    @property
    def chroma_halved(self) -> bool:
        """Whether it is 4:2:0, of which a decoder keeps half as many coefficients as of 4:4:4."""
        return self.sampling == _SAMPLING_420


def segments(data: Data) -> Iterator[Segment]:
    """Yield the segments of a JPEG's first image, from behind its start up to its end marker.

    Raises:
        SegmentCut: the file ends before the image does.
        SegmentBroken: a segment has no possible length.
        ImageUnreadable: there are more than SEGMENTS_MAX.
    """
    at = len(START_OF_IMAGE)
    pattern = _ANY_MARKER
    for _number in range(SEGMENTS_MAX):
        start = _find(pattern, data, at)
        pattern = _ANY_MARKER
        if start is None:
            raise SegmentCut(len(data))
        marker = data[start + 1]
        body = start + 2
        if marker == _EOI:
            yield Segment(marker, start, body, body)
            return
        if marker in _STANDALONE:
            at = body
            continue
        length_field = data[body : body + _LENGTH_BYTES]
        length = int.from_bytes(length_field)
        at = body + length
        if len(length_field) < _LENGTH_BYTES or at > len(data):
            raise SegmentCut(start)
        if length < _LENGTH_BYTES:
            raise SegmentBroken
        yield Segment(marker, start, body + _LENGTH_BYTES, at)
        if marker == _SOS:
            pattern = _MARKER_BEHIND_SCAN
    raise ImageUnreadable(f"a JPEG of more than {SEGMENTS_MAX} segments")


def _find(pattern: re.Pattern[bytes], data: Data, at: int) -> int | None:
    found = pattern.search(data, at)
    return None if found is None else found.start()


def read_structure(data: Data) -> JpegStructure | None:
    """Read how an image is coded, up to its first scan; None where there is no frame header and scan."""
    progressive = False
    sampling: tuple[tuple[int, int], ...] = ()
    try:
        for segment in segments(data):
            if segment.marker in _FRAMES:
                progressive = segment.marker in _PROGRESSIVE
                sampling = _sampling(data[segment.body : segment.end])
            elif segment.marker == _SOS and sampling:
                components = next(iter(data[segment.body : segment.end]), 0)
                return JpegStructure(progressive, sampling, components)
    except (SegmentCut, SegmentBroken):
        return None
    return None


def _sampling(frame: bytes) -> tuple[tuple[int, int], ...]:
    """Return the factors of each component; the frame header is T.81, B.2.2."""
    components = frame[_FRAME_BYTES:]
    starts = range(0, len(components) - _COMPONENT_BYTES + 1, _COMPONENT_BYTES)
    packed = [components[start + 1] for start in starts][:_COMPONENTS_MAX]
    return tuple((factors >> 4, factors & 0xF) for factors in packed)


def count_scans(data: Data) -> int:
    """Return how many scans the image has, as far as the file goes."""
    scans = 0
    try:
        for segment in segments(data):
            scans += segment.marker == _SOS
    except (SegmentCut, SegmentBroken):
        return scans
    return scans


def has_end(data: Data) -> bool:
    """Whether it is a JPEG that can be followed up to its end marker."""
    if data[: len(START_OF_IMAGE)] != START_OF_IMAGE:
        return False
    try:
        return any(segment.marker == _EOI for segment in segments(data))
    except (SegmentCut, SegmentBroken, ImageUnreadable):
        return False


def find_cut(data: Data) -> Cut | None:
    """Return where the file ends early; None where it does not."""
    pixels_at = len(data)
    try:
        for segment in segments(data):
            if segment.marker == _SOS:
                pixels_at = min(pixels_at, segment.end)
    except SegmentCut as cut:
        return Cut(cut.usable_bytes, cut.usable_bytes > pixels_at)
    except SegmentBroken:
        return None
    return None
