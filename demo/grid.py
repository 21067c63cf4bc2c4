"""One picture of many, with labelled rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

SMALLEST_CELL = 128
GAP = 6
INK, PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Layout:
    """Positions in pixels: cells are square, labels above and to the left of them."""

    cell: int
    left: int
    top: int

    @classmethod
    def of(cls, side: int) -> Layout:
        """Lay out pictures of ``side`` pixels; pictures under 128 pixels are enlarged."""
        cell = max(side, SMALLEST_CELL)
        return cls(cell, left=max(cell // 2, 104), top=max(cell // 8, 34))

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return the upper left pixel ``(x, y)`` of a cell."""
        return self.left + column * (self.cell + GAP), self.top + row * (self.cell + GAP)

    @property
    def font_size(self) -> int:
        return max(self.cell // 20, 14)


def picture_of(pixels: Tensor) -> Image.Image:
    """Convert ``(3, H, W)`` in [-1, 1] to a picture."""
    rows = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(rows.numpy())


def draw_grid(pictures: Tensor, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Arrange ``(rows, columns, 3, H, W)`` in [-1, 1], square, with a label at each row and column."""
    layout = Layout.of(pictures.shape[-1])
    font = ImageFont.load_default(layout.font_size)
    sheet = Image.new("RGB", layout.corner(len(rows), len(columns)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        x, _ = layout.corner(0, c)
        pen.text((x + layout.cell / 2, layout.top / 2), label, INK, font, anchor="mm")
    for r, label in enumerate(rows):
        _, y = layout.corner(r, 0)
        text = "\n".join(wrap(label, layout.left - 2 * GAP, layout.cell // (layout.font_size + 5), font))
        pen.multiline_text((GAP, y + layout.cell / 2), text, INK, font, anchor="lm")
        for c in range(len(columns)):
            sheet.paste(enlarge(picture_of(pictures[r, c]), layout.cell), layout.corner(r, c))
    return sheet


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture ``side`` pixels wide and high, with edges sharpened after enlarging."""
    if picture.size == (side, side):
        return picture
    return picture.resize((side, side), Image.Resampling.LANCZOS).filter(ImageFilter.UnsharpMask(1.5, 120, 0))


def wrap(text: str, width: int, lines: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break text into at most ``lines`` lines of ``width`` pixels; an ellipsis marks omitted text."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".strip()
        if font.getlength(longer) <= width or not broken[-1]:
            broken[-1] = longer
        else:
            broken.append(word)
    if len(broken) > lines:
        broken = [*broken[: lines - 1], f"{broken[lines - 1]}..."]
    return [shorten(line, width, font) for line in broken]


def shorten(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a line to ``width`` pixels."""
    if font.getlength(line) <= width:
        return line
    while len(line) > 1 and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."
