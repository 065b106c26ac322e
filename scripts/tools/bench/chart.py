"""The chart: requests per second of the three systems, as an SVG that is readable on light and dark pages."""

from collections.abc import Iterator
from html import escape

from scripts.tools.bench.cases import ISSUE, LOGIN
from scripts.tools.bench.results import CEILING, Results, conventional, ours
from scripts.tools.bench.stores import KINDS

_CONNECTIONS = 64
_WIDTH, _LEFT, _RIGHT = 760, 112, 86
_TOP, _BAR, _GAP, _HEADING = 46, 18, 4, 26

# The chart has its own background, because the colour scheme of the page can differ from that of the browser.
_STYLE = """
    .page { fill: #ffffff }
    text { font: 13px system-ui, sans-serif; fill: #24292f }
    .title { font-weight: 600 } .note { fill: #57606a; font-size: 12px }
    .ceiling { fill: #afb8c1 } .ours { fill: #0969da } .conventional { fill: #bf8700 }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117 } text { fill: #e6edf3 } .note { fill: #8d96a0 }
      .ceiling { fill: #6e7681 } .ours { fill: #4493f8 } .conventional { fill: #d29922 }
    }"""


def chart(results: Results) -> str | None:
    """Return the SVG, or None unless everything in it was measured."""
    groups = []
    for case in (ISSUE, LOGIN):
        for kind in KINDS:
            rates = {}
            for system, label in (("ceiling", CEILING), ("ours", ours(kind)), ("conventional", conventional(kind))):
                series = results.throughput.get((case.name, _CONNECTIONS, label))
                if series is None:
                    return None
                rates[system] = series.rate
            groups.append((f"{case.title[0].upper()}{case.title[1:]}, {kind}", rates))
    body = list(_bars(groups))
    height = _TOP + len(groups) * (_HEADING + 3 * (_BAR + _GAP)) + 10
    title = f"Requests per second on one core, {_CONNECTIONS} connections"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
            f'aria-label="{escape(title)}">',
            f"  <style>{_STYLE}\n  </style>",
            f'  <rect class="page" width="{_WIDTH}" height="{height}" rx="6"/>',
            f'  <text class="title" x="16" y="28">{escape(title)}</text>',
            *body,
            "</svg>\n",
        ]
    )


def _bars(groups: list[tuple[str, dict[str, float]]]) -> Iterator[str]:
    most = max(rate for _, rates in groups for rate in rates.values())
    y = _TOP
    for heading, rates in groups:
        yield f'  <text class="note" x="16" y="{y + 17}">{escape(heading)}</text>'
        y += _HEADING
        for system, rate in rates.items():
            width = max(rate / most * (_WIDTH - _LEFT - _RIGHT), 1)
            label = f"{rate:,.0f}"
            yield f'  <text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{system}</text>'
            yield (
                f'  <rect class="{system}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2">'
                f"<title>{escape(f'{heading}, {system}: {label}')}</title></rect>"
            )
            yield f'  <text x="{_LEFT + width + 8:.1f}" y="{y + 14}">{label}</text>'
            y += _BAR + _GAP
