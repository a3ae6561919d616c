"""Draws the panels of the Grafana dashboard as an SVG, from what a real Prometheus answers to their queries.

Used by the whole-system test of metrics when it is asked to make the picture of the documentation:
`dashboard.py DASHBOARD.json PROMETHEUS-URL SECONDS OUT.svg`. It stores nothing else.
"""

import json
import sys
import time
import urllib.parse
import urllib.request
from xml.sax.saxutils import escape

COLUMN, ROW, GAP = 40, 26, 8
COLOURS = ["#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#b877d9", "#e02f44", "#8ab8ff", "#37872d"]


def ask(url, path, **fields):
    body = urllib.parse.urlencode(fields).encode()
    return json.load(urllib.request.urlopen(f"{url}/api/v1/{path}", body))["data"]["result"]


def number(value, unit):
    if unit == "percentunit":
        return f"{value * 100:.0f} %"
    if unit in ("bytes", "Bps"):
        for name in ("B", "KiB", "MiB", "GiB"):
            if abs(value) < 1024 or name == "GiB":
                return f"{value:.4g} {name}" + ("/s" if unit == "Bps" else "")
            value /= 1024
    suffix = {"s": " s", "iops": " io/s", "pps": " p/s"}.get(unit, "")
    return f"{value:.3g}{suffix}"


def legend(target, series):
    text = target.get("legendFormat", "")
    for key, value in series["metric"].items():
        text = text.replace("{{" + key + "}}", value)
    return text or series["metric"].get("sandbox_name", "")


def words(x, y, text, size=11, colour="#ccccdc", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


def stat(panel, url, end, x, y, width, height):
    out, shown = [], []
    for target in panel["targets"]:
        for series in ask(url, "query", query=query(target), time=end):
            shown.append((legend(target, series), float(series["value"][1])))
    for at, (name, value) in enumerate(shown):
        middle = x + width * (at + 0.5) / len(shown)
        text = number(value, panel["fieldConfig"]["defaults"].get("unit"))
        out.append(words(middle, y + height * 0.6, text, 26, COLOURS[0], "middle"))
        out.append(words(middle, y + height * 0.8, name, 12, anchor="middle"))
    return out


def timeseries(panel, url, begin, end, x, y, width, height):
    unit = panel["fieldConfig"]["defaults"].get("unit")
    lines = []
    for target in panel["targets"]:
        for series in ask(url, "query_range", query=query(target), start=begin, end=end, step=1):
            points = [(at, float(value)) for at, value in series["values"]]
            lines.append((legend(target, series), points))
    left, top, right, bottom = x + 62, y + 30, x + width - 10, y + height - 34
    most = max([value for _, points in lines for _, value in points] + [0]) or 1
    out = []
    for step in range(4):
        level = bottom - (bottom - top) * step / 3
        out.append(f'<line x1="{left}" y1="{level:.1f}" x2="{right}" y2="{level:.1f}" stroke="#2c3235"/>')
        out.append(words(left - 6, level + 4, number(most * step / 3, unit), 10, anchor="end"))
    edge = left
    for at, (name, points) in enumerate(lines):
        colour = COLOURS[at % len(COLOURS)]
        path = " ".join(
            f"{left + (right - left) * (when - begin) / (end - begin):.1f},{bottom - (bottom - top) * value / most:.1f}"
            for when, value in points
        )
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if edge + 7 * len(name) < right:
            out.append(words(edge, y + height - 10, name, 11, colour))
            edge += 7 * len(name) + 16
    out.append(words(right, bottom + 14, f"{end - begin:.0f} s", 10, anchor="end"))
    return out


def query(target):
    return target["expr"].replace("$sandbox", ".*").replace("$__rate_interval", "10s")


def main(dashboard, url, seconds, out):
    with open(dashboard, encoding="utf-8") as file:
        dashboard = json.load(file)
    end = time.time()
    begin = end - float(seconds)
    parts, lowest = [], 0
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN + GAP, place["y"] * ROW + GAP
        width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        lowest = max(lowest, y + height)
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="#181b1f" stroke="#2c3235"/>')
        parts.append(words(x + 10, y + 18, panel["title"], 13))
        if panel["type"] == "stat":
            parts += stat(panel, url, end, x, y, width, height)
        else:
            parts += timeseries(panel, url, begin, end, x, y, width, height)
    size = f'width="{24 * COLUMN + GAP}" height="{lowest + GAP}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Inter, Helvetica, Arial, sans-serif">'
    with open(out, "w", encoding="utf-8") as file:
        file.write("\n".join([head, '<rect width="100%" height="100%" fill="#111217"/>', *parts, "</svg>", ""]))


if __name__ == "__main__":
    main(*sys.argv[1:])
