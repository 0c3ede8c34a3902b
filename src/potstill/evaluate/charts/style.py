"""The colors and letter sizes of every picture: readable on a phone and on slides."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, LIGHT_INK, GRID = "#1f2328", "#59636e", "#e6e8eb"
ACCENT, GRAY = "#0b6e99", "#9aa4ae"
COLORS = ("#0b6e99", "#c8553d", "#588157", "#8e5ea2", "#b08900", "#6e7781")  # different in hue and in lightness
DPI = 160
TITLE, TEXT, SMALL = 14.0, 11.5, 9.5  # points


def style_panel(panel: Axes) -> None:
    """A light grid behind the data, no frame above and to the right, and large numbers."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(LIGHT_INK)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=LIGHT_INK, labelsize=TEXT, length=0)


def add_title(figure: Figure, title: str) -> None:
    """A title at the left edge, if there is one."""
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=TITLE, fontweight="bold", color=INK)
