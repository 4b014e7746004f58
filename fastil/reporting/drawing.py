"""What all figures share: how lines look, matplotlib without a display, and writing as PNG or inline SVG."""

import contextlib
import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from fastil import files
from fastil.text import one_line

WIDTH, HEIGHT = 4.2, 3.2  # of a panel, inches
NO_XML = re.compile("[\ufffe\uffff]")  # no XML file may hold these; other such characters are no plain text
REFERENCE = re.compile(r"""(?:href="|url\()#([^")]+)""")
FONTS = re.compile(r" ?font-family: [^;]*;?")  # those of the page
DECIMALS = re.compile(r"(\.\d\d)\d+")
Line = Literal["-", "--", ":", "-."]
# Of a line 2 wide, as matplotlib has them.
DASHES: dict[Line, str] = {"-": "", "--": "7.4 3.2", ":": "2 3.3", "-.": "12.8 3.2 2 3.2"}
COLOURS = ("#3b7fd0", "#d9701e", "#2a9a58", "#d1495b", "#8d63c8", "#93705c", "#cf5ba6", "#2f4b7c", "#8f9022", "#1f98a8")
LINES: dict[str, Line] = {"joint": "--", "finetune": ":"}  # of the reference lines, which are grey
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastil",  # the same bytes for the same figure
    "path.simplify": False,
    "text.parse_math": False,  # names hold dollar signs
}


@dataclass(frozen=True)
class Style:
    """How the lines of a group look."""

    colour: str
    line: Line = "-"

    @property
    def dashes(self) -> str:
        """The stroke-dasharray of SVG."""
        return DASHES[self.line]


def text(words: str) -> str:
    """Names of runs and classes as one plain line that XML can hold."""
    return NO_XML.sub("\ufffd", one_line(words))


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """The settings of all figures, in which they are drawn and written, without warnings of characters that the font
    lacks: these are drawn as boxes."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's own are
        matplotlib.rcParams.update(SETTINGS)  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def new_figure(panels: int, width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, Any]:
    """Return a figure of panels, three to a row, and its axes. It is outside pyplot's registry, so that nothing has to
    be closed and no display is asked for. width, height: of a panel, inches."""
    from matplotlib.figure import Figure

    across, rows = min(panels, 3), -(-panels // 3)
    figure = Figure(figsize=(width * across, height * rows), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def spaced(values: Sequence[float], span: float, most: int = 8) -> list[float]:
    """The values, rising, that can be labelled on an axis of this span, `most` of them at best; the last is one."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or kept[-1] - value >= span / most * 0.99:
            kept.append(value)
    return kept[::-1]


def legend_below(figure: Any, handles: Mapping[str, Any], title: str = "", notes: Sequence[str] = ()) -> None:
    """Put a legend of these artists, by label, and lines of text below the figure, where they hide nothing. The picture
    grows by them (save_figure)."""
    width = figure.get_size_inches()[0]
    characters = int(width * 15)
    labels = [textwrap.fill(text(label), characters - 8) for label in handles]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    legend = figure.legend(
        list(handles.values()), labels, loc="upper left", bbox_to_anchor=(0.02, -0.01), borderaxespad=0, borderpad=0,
        frameon=False,
        ncols=max(1, min(len(labels), characters // (longest + 8))), title=title, alignment="left", fontsize=8,
        title_fontsize=8,
    )  # fmt: skip
    if notes:
        figure.draw_without_rendering()
        bottom = legend.get_window_extent().transformed(figure.transFigure.inverted()).y0
        wrapped = "\n".join(textwrap.fill(text(note), characters + 4) for note in notes)
        figure.text(0.02, bottom - 0.02, wrapped, fontsize=7, va="top")


def make_plain(figure: Any) -> None:
    """Take the control characters out of the names that stand in a figure. Labels of ticks have none (`text`)."""
    from matplotlib.text import Text

    for words in figure.findobj(Text):
        words.set_text("\n".join(text(line) for line in words.get_text().split("\n")))


def save_figure(figure: Any, path: Path, then: str = files.RESUME) -> None:
    """Write it as PNG, with what stands around it. then: what to do once it can be written."""
    make_plain(figure)
    look = {"format": "png", "dpi": 120, "bbox_inches": "tight", "pad_inches": 0.08}
    files.write_atomically(path, lambda file: figure.savefig(file, **look), then)


def as_svg(figure: Any, name: str, label: str, titles: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return a figure as an <svg> element for a page of HTML.

    It names no other file. Black becomes the colour of the page's text. Ids are those that something refers to, and
    those of artists that were given one (set_gid); all begin with `name`, which must be another one for each element of
    a page. label: for those who cannot see it. titles: by id of a line, what each of its markers says on hovering.
    """
    make_plain(figure)
    file = io.StringIO()
    with settings():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    used = {*REFERENCE.findall(file.getvalue()), *(artist.get_gid() for artist in figure.findobj())} - {None}
    for element in [*root.iter()]:
        for child in [child for child in element if _local(child.tag) in ("metadata", "style")]:
            element.remove(child)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if attributes.pop("id", None) in used:
            attributes["id"] = f"{name}-{element.get('id')}"
        if "style" in attributes:
            attributes["style"] = FONTS.sub("", attributes["style"]).replace("#000000", "currentColor")
        if attributes.get("href", "#")[0] != "#":
            attributes["href"] = attributes["href"].replace("\n", "")  # an image, base64
        elif "href" in attributes:
            attributes["href"] = f"#{name}-{attributes['href'][1:]}"
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{name}-")
        if "d" in attributes:
            attributes["d"] = re.sub(r"\s+", " ", DECIMALS.sub(r"\1", attributes["d"])).strip()
        element.tag, element.attrib, element.tail = _local(element.tag), attributes, None
        element.text = element.text if element.tag == "text" else None
    for gid, said in (titles or {}).items():
        (line,) = (element for element in root.iter() if element.get("id") == f"{name}-{gid}")
        for marker, words in zip(line.iter("use"), said, strict=True):
            ElementTree.SubElement(marker, "title").text = text(words)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": text(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace: HTML knows what an <svg> element is."""
    return name.rpartition("}")[2]
