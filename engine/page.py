"""A web page in one file: HTML made of parts, each of which escapes what is not markup yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; text-size-adjust: 100%; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font: 600 .95rem ui-monospace, Menlo, Consolas, monospace; margin: 0; overflow-wrap: anywhere; }
p, ul, figcaption { max-width: 44rem; }
ul { padding-left: 1.2rem; }
figure { margin: 1rem 0; }
figcaption, summary, th, .notes { color: var(--muted); }
figcaption, table, .notes { font-size: .9rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .5rem 1rem; }
svg { width: 100%; max-width: 34rem; height: auto; overflow: visible; }
svg text { font-family: inherit !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 0 .25rem 1.2rem; text-align: right; vertical-align: top; }
th, td { border-bottom: 1px solid var(--grid); }
th { font-weight: 500; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
.wide th, .wide td:first-child { white-space: nowrap; }
.words td { text-align: left; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem; }
.cards table { width: 100%; margin-top: .25rem; }
.cards td:first-child { width: 8rem; }
"""


class Html(str):
    """Text that is markup already; any other string is escaped when it becomes a part of a page."""


def document(title: str, colours: Mapping[str, tuple[str, str]], *parts: Html) -> str:
    """A whole page. `colours`: name -> (on white, on black), which parts and pictures use as var(--name)."""
    light, dark = (" ".join(f"--{name}: {pair[k]};" for name, pair in colours.items()) for k in (0, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
{STYLE.strip()}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{join(*parts)}
</body>
</html>
"""


def join(*parts: str) -> Html:
    """Parts one after the other, each escaped unless it is markup."""
    return Html("\n".join(part if isinstance(part, Html) else escape(part) for part in parts if part))


def element(tag: str, *parts: str, **attributes: str) -> Html:
    """<tag>parts</tag>; the attribute class is written class_. Empty without parts: what is empty is not shown."""
    given = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items())
    inner = join(*parts)
    return Html(f"<{tag}{given}>{inner}</{tag}>") if inner else Html()


def section(heading: str, *parts: Html) -> Html:
    """A heading and what stands under it; empty without the latter."""
    inner = join(*parts)
    return element("section", element("h2", heading), inner) if inner else inner


def details(summary: str, *parts: Html) -> Html:
    """A part that is folded away at first; empty without content."""
    inner = join(*parts)
    return element("details", element("summary", summary), inner) if inner else inner


def bullets(items: Iterable[str]) -> Html:
    """A list with a bullet for every item."""
    return element("ul", *(element("li", item) for item in items))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "wide") -> Html:
    """Rows of cells under their heads (none: a table without a header); it scrolls where the screen is narrow."""
    body = [element("tr", *(element("td", cell or Html("&nbsp;")) for cell in row)) for row in rows]
    head = element("thead", element("tr", *(element("th", head or Html("&nbsp;"), scope="col") for head in heads)))
    return element("div", element("table", head, element("tbody", *body)), class_=class_) if body else Html()


def figure(pictures: Sequence[Html], caption: str = "") -> Html:
    """Pictures side by side, as many as fit, over one caption."""
    panels = element("div", *pictures, class_="panels")
    return element("figure", panels, element("figcaption", caption)) if panels else panels
