"""Draws a terminal's screen as SVG: `tmux capture-pane -e -p | screen.py COLUMNS LINES > screen.svg`.

Run by hand for the pictures of docs/observability. Knows the sixteen colours, bold and reversed, which is all that `msb top` uses.
"""

import re
import sys
from html import escape

COLORS = ["#1b1b1b", "#e05f5f", "#7fc06e", "#d9b44a", "#6a9fd8", "#b07cc6", "#56c8d8", "#d0d0d0"]
BRIGHT = ["#808080", "#ff8080", "#a0e090", "#ffd870", "#90c0ff", "#d8a0f0", "#80e8f8", "#ffffff"]
TEXT, GROUND = COLORS[7], COLORS[0]
WIDTH, HEIGHT = 8.4, 17


def styled(line):
    """The pieces of a line that look alike: (colour, ground, bold, text)."""
    color, ground, bold, reverse = TEXT, None, False, False
    for codes, text in re.findall(r"(?:\x1b\[([\d;]*)m)?([^\x1b]*)", line):
        for code in [int(code or 0) for code in codes.split(";")] if codes else []:
            if code == 0:
                color, ground, bold, reverse = TEXT, None, False, False
            elif code in (1, 22):
                bold = code == 1
            elif code in (7, 27):
                reverse = code == 7
            elif code == 39:
                color = TEXT
            elif code == 49:
                ground = None
            elif 30 <= code <= 37:
                color = COLORS[code - 30]
            elif 90 <= code <= 97:
                color = BRIGHT[code - 90]
            elif 40 <= code <= 47:
                ground = COLORS[code - 40]
        if text:
            yield (ground or GROUND, color, bold, text) if reverse else (color, ground, bold, text)


def main():
    columns, lines = int(sys.argv[1]), int(sys.argv[2])
    width, height = columns * WIDTH + 20, lines * HEIGHT + 20
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
        ' font-family="DejaVu Sans Mono,monospace" font-size="14">'
    )
    print(f'<rect width="100%" height="100%" fill="{GROUND}"/>')
    for number, line in enumerate(sys.stdin.read().split("\n")[:lines]):
        column, top = 0, 10 + number * HEIGHT
        for color, ground, bold, text in styled(line):
            x, wide = 10 + column * WIDTH, len(text) * WIDTH
            if ground:
                print(f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{HEIGHT}" fill="{ground}"/>')
            if text.strip():
                weight = ' font-weight="bold"' if bold else ""
                print(
                    f'<text x="{x:.1f}" y="{top + 13}" fill="{color}"{weight} textLength="{wide:.1f}"'
                    f' xml:space="preserve">{escape(text)}</text>'
                )
            column += len(text)
    print("</svg>")


main()
