"""The elements of a picture, as SVG: boxes, lines and texts, in colors for a light and for a dark page."""

import html

WIDTH = 800  # of every picture, in pixels; a text of SIZE is read without a zoom
MARGIN = 16
SIZE = 13  # of all texts, in pixels
LETTER = 0.56 * SIZE  # the mean width of a letter in a font without serifs

# Fill of a box on a light and on a dark page. Texts in a box have the color of all texts.
FILLS = {
    "page": ("#ffffff", "#0d1117"),
    "blue": ("#b6d7ff", "#1f4b80"),
    "orange": ("#ffd0a6", "#85461a"),
    "green": ("#b4e6c4", "#1d5c35"),
    "purple": ("#ddc9fb", "#583390"),
    "red": ("#ffc4c0", "#8a2f2b"),
    "teal": ("#9fdcdc", "#1b5d63"),
    "gray": ("#e3e8ee", "#343c46"),
    "lane": ("#f3f5f8", "#171d25"),
}
STROKES = {"line": ("#8c959f", "#6e7681"), "faint": ("#d5dbe2", "#2b323b")}
TEXTS = {"text": ("#1f2328", "#e6edf3"), "soft": ("#57606a", "#9aa4af")}


def width_of(text: str, bold: bool = False) -> float:
    """About the width of a text in pixels, as it is not known which font a browser has."""
    return LETTER * len(text) * (1.12 if bold else 1)


class Drawing:
    """A picture that grows downwards: an element below all others makes it higher."""

    def __init__(self, title: str, description: str) -> None:
        """`title` and `description` are for those who cannot see it; the alt text in a page says the same."""
        self.title, self.description = title, description
        self.elements: list[str] = []
        self.bottom = 0.0

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """A line of text whose letters stand on `y`. `style`: soft, bold, or nothing."""
        style = f' class="{style}"' if style else ""
        anchor = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.elements.append(f'<text x="{x:.1f}" y="{y:.1f}"{anchor}{style}>{html.escape(text)}</text>')
        self.bottom = max(self.bottom, y + SIZE / 2)

    def box(self, x: float, y: float, width: float, height: float, color: str, label: str = "") -> None:
        """A box with a label in its middle."""
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.elements.append(f'<rect {shape} rx="2" class="{color}"/>')
        self.bottom = max(self.bottom, y + height)
        if label:
            self.text(x + width / 2, y + height / 2 + SIZE * 0.35, label, anchor="middle")

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "line") -> None:
        shape = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.elements.append(f'<line {shape} class="{style}"/>')
        self.bottom = max(self.bottom, y1, y2)

    def legend(self, x: float, y: float, entries: dict[str, str]) -> None:
        """Colors with their meanings, in one line."""
        for color, meaning in entries.items():
            self.box(x, y - SIZE + 2, SIZE, SIZE, color)
            self.text(x + SIZE + 6, y, meaning)
            x += SIZE + 6 + width_of(meaning) + 20

    def svg(self) -> str:
        """The file. Its background is that of the page, so texts can be read where a site ignores the dark style."""
        height = self.bottom + MARGIN
        title, description = html.escape(self.title), html.escape(self.description)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
                f'height="{height:.0f}" role="img" aria-labelledby="title description">',
                f'<title id="title">{title}</title>',
                f'<desc id="description">{description}</desc>',
                f"<style>\ntext {{ font: {SIZE}px sans-serif }}\n.bold {{ font-weight: bold }}",
                *_rules(0),
                "@media (prefers-color-scheme: dark) {",
                *_rules(1),
                "}\n</style>",
                f'<rect width="{WIDTH}" height="{height:.0f}" class="page"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


def _rules(page: int) -> list[str]:
    """The style of each class on a light (0) or a dark (1) page."""
    rules = [f".{name} {{ fill: {colors[page]} }}" for name, colors in FILLS.items()]
    rules += [f".{name} {{ stroke: {colors[page]} }}" for name, colors in STROKES.items()]
    return [*rules, f"text {{ fill: {TEXTS['text'][page]} }}", f".soft {{ fill: {TEXTS['soft'][page]} }}"]
