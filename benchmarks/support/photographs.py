"""The photographs of a benchmark: a few distinct files of each kind, drawn from a seed, served many times."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from adc_worker.desk.sheets import LARGE, TYPICAL, Grain, draw_sheet

DISTINCT = 8
SMALL_SIZE = (1280, 720)  # a tenth of a typical one
TINY_SIZE = (640, 480)
TYPICAL_SIZE, LARGE_SIZE, HUGE_SIZE = (4096, 2160), (4096, 3072), (10_000, 7_500)

KINDS: dict[str, tuple[tuple[int, int], Grain, str, dict[str, object]]] = {
    "typical": (TYPICAL_SIZE, TYPICAL, "jpg", {}),
    "tiny": (TINY_SIZE, TYPICAL, "jpg", {}),
    "small": (SMALL_SIZE, TYPICAL, "jpg", {}),
    "large": (LARGE_SIZE, LARGE, "jpg", {}),
    "huge": (HUGE_SIZE, TYPICAL, "jpg", {}),
    "progressive": (LARGE_SIZE, LARGE, "jpg", {"progressive": True}),
    "png": (TYPICAL_SIZE, TYPICAL, "png", {"compress_level": 1}),
    "tiff": (TYPICAL_SIZE, TYPICAL, "tif", {"compression": "tiff_lzw"}),
    "cmyk": (TYPICAL_SIZE, TYPICAL, "jpg", {}),
}


class Photographs:
    """Draws files on first use and keeps them in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def names(self, kind: str, count: int) -> list[str]:
        """Return `count` file names of a kind; they repeat."""
        distinct = 1 if kind == "huge" else DISTINCT
        files = [self._file(kind, number) for number in range(min(count, distinct))]
        return [files[number % len(files)].name for number in range(count)]

    @staticmethod
    def kind(name: str) -> str:
        return name.partition("-")[0]

    def path(self, name: str) -> Path:
        return self.folder / name

    def _file(self, kind: str, number: int) -> Path:
        size, grain, suffix, options = KINDS[kind]
        file = self.folder / f"{kind}-{number}.{suffix}"
        if not file.exists():
            image = Image.fromarray(draw_sheet(size, number, noise_sigma=grain.noise_sigma).image)
            if kind == "cmyk":
                image = image.convert("CMYK")
            jpeg = {"quality": grain.quality, "subsampling": grain.subsampling} if suffix == "jpg" else {}
            partial = file.with_name(f".{file.name}")
            image.save(partial, Image.registered_extensions()[f".{suffix}"], **jpeg, **options)
            partial.rename(file)
        return file
