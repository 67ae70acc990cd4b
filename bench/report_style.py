"""How the report's figures look, and how they become SVG inside a page, or PNG.

Text is drawn as text, never as mathematics: names in a record are hostile. The palette is Okabe and
Ito's, which people with any colour vision tell apart; markers differ too.
"""

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from trsp.bench.report_values import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
INK = "#1b1f24"
MUTED = "#6b7480"
GRID = "#e3e7ec"
WARNING = "#a3121f"
_DENSE = ("#1b1f24", "o")
_CONTROL = ("#8a929c", "D")
_PRUNED_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# One more than the colours: pairs repeat after 42.
_PRUNED_MARKERS = ("s", "^", "v", "P", "X", "h", "p")
# Inches: two figures of this width stand side by side.
_WIDEST_HALF = 7
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b6bec8",
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.prop_cycle": "cycler('color', ['#1b1f24'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.unicode_minus": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "trsp",
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Plot:
    """A figure of one record. `name` is that of its file; `caption` says what to read in it."""

    name: str
    title: str
    caption: str
    figure: "Figure"

    @property
    def wide(self) -> bool:
        """Whether it needs the whole width of the page."""
        return bool(self.figure.get_size_inches()[0] > _WIDEST_HALF)


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib in the report's style whatever the user's own settings are, and back."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_STYLE)
        # A name in a script that the font lacks is drawn by the browser's own font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def arm_looks(values: Values) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm."""
    looks = {arm.name: _DENSE if arm.role == "dense" else _CONTROL for arm in values.arms}
    for place, arm in enumerate(values.pruned):
        colour = _PRUNED_COLOURS[place % len(_PRUNED_COLOURS)]
        looks[arm.name] = (colour, _PRUNED_MARKERS[place % len(_PRUNED_MARKERS)])
    return looks


def plain(text: str) -> str:
    """Text that any encoder and font takes: controls, direction marks and surrogates replaced."""
    return "".join("\ufffd" if _is_odd(sign) else sign for sign in text)


def _is_odd(sign: str) -> bool:
    return (
        unicodedata.category(sign) in ("Cc", "Cf", "Cs") and sign not in "\n\t"
    ) or sign in "\ufffe\uffff"


def name_in_figure(text: str, longest: int = 28) -> str:
    """A name short enough for a legend; a leading underscore would hide it there."""
    text = " ".join(plain(text).split())
    short = text if len(text) <= longest else text[: longest - 1] + "\u2026"
    return f" {short}" if short.startswith("_") else short


def to_svg(plot: Plot, prefix: str) -> str:
    """The figure as an SVG element for a page; `prefix` makes its ids differ from others'."""
    file = BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with figure_style():
        plot.figure.savefig(file, format="svg", metadata=nothing)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # A style sheet inside the figure would hold for the whole page.
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
        for name, value in parent.attrib.items():
            if name == "id":
                parent.set(name, f"{prefix}-{value}")
            elif name == f"{{{_XLINK}}}href":
                parent.set(name, value.replace("#", f"#{prefix}-", 1))
            else:
                parent.set(name, value.replace("url(#", f"url(#{prefix}-"))
    for name in ("width", "height", "version"):
        del root.attrib[name]
    width = plot.figure.get_size_inches()[0] * 96
    root.set("role", "img")
    root.set("aria-label", plain(f"{plot.title}. {plot.caption}"))
    root.set("style", f"max-width:{width:.0f}px;stroke-linejoin:round;stroke-linecap:butt")
    return ElementTree.tostring(root, encoding="unicode")


def to_png(plot: Plot) -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    file = BytesIO()
    with figure_style():
        plot.figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
