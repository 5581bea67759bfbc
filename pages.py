"""Markdown in which no text can break the markup, and the same as one self-contained page."""

import base64
import html
import re
from pathlib import Path

import canvas
import checkpoints
import storage

SPECIAL = re.compile(r"[\\`*<>&|\[\]#~!$]|(?<!\w)_|_(?!\w)|[\r\n\t]")  # to Markdown or HTML
IMAGE = re.compile(r'<p><img alt="([^"]*)" src="([^"]*)" */?></p>')
STYLE = """
:root { color-scheme: light dark; --text: #1c2330; --quiet: #5a6475; --back: #fff;
  --stripe: #f5f7fa; --line: #d5dbe5; --accent: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --quiet: #9aa5b5; --back: #14181f;
  --stripe: #1c222b; --line: #38414e; --accent: #7db4f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; color: var(--text);
  background: var(--back); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
p, ul { max-width: 48rem; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav li { display: inline-block; margin-right: 1.2rem; }
nav, figcaption { font-size: .85rem; }
a { color: var(--accent); }
.table { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; color: var(--quiet); font-weight: 600; min-width: 6rem; }
tr:last-child td { border-bottom: 0; }
tr:nth-child(even) td { background: var(--stripe); }
td:first-child, th:first-child { position: sticky; left: 0; min-width: 9rem;
  background: var(--back); }
tr:nth-child(even) td:first-child { background: var(--stripe); }
.table:first-of-type td:nth-child(2) { min-width: 14rem; }
code { font-size: .88em; color: var(--accent); }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--quiet); }
@media (max-width: 40rem) { body { font-size: 15px; } table { font-size: .8rem; }
  th, td { padding: .3rem .5rem; }
  td:first-child, th:first-child { min-width: 7.5rem; max-width: 42vw; } }
@media (max-width: 40rem) { .table:first-of-type thead { display: none; }
  .table:first-of-type :is(table, tbody, tr, td) { display: block; max-width: none; width: auto; }
  .table:first-of-type td { border: 0; position: static; padding: .1rem .6rem; }
  .table:first-of-type tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .table:first-of-type tr:nth-child(even) { background: var(--stripe); } }
@media print { nav { display: none; } body { max-width: none; padding: 0; font-size: 10pt; }
  .table { overflow: visible; border: 0; } table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; min-width: 0; } td:first-child, th:first-child { min-width: 0; }
  tr, figure { break-inside: avoid; } h2 { break-after: avoid; } }
"""


# ---- Markdown -----------------------------------------------------------------------------------


def escape(text):
    """Text escaped so that Markdown, its tables and HTML show it as it is, on one line."""
    readable = str(text).encode("utf-8", "replace").decode()
    return SPECIAL.sub(lambda found: " " if found[0].isspace() else f"&#{ord(found[0])};", readable)


def plain(text):
    """What `escape` was given, for the terminal and for CSV files."""
    return html.unescape(text)


def code(text):
    """A command as code, also where it holds backticks, pipes or line ends."""
    if re.search(r"[`|\r\n]", text):
        return f"<code>{escape(text)}</code>"
    return f"`{text.encode('utf-8', 'replace').decode()}`"


def markdown_table(header, lines, left=1):
    """A Markdown table of Markdown cells; the first `left` columns to the left, numbers right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    rows = [" | ".join(map(str, line)) for line in (header, rule, *lines)]
    return "\n".join(f"| {row} |" for row in rows)


def bullets(sentences):
    return "\n".join(f"- {escape(text)}" for text in sentences) or "Nothing."


# ---- the page -----------------------------------------------------------------------------------


def write(path, text):
    """Writes Markdown as an HTML page that needs no other file. A failure costs only the page.

    An earlier page, which shows former results, goes then.  Figures are read from the page's
    folder; one that is missing is left out.
    """
    try:
        storage.write_text(path, page(text, Path(path).parent))
    except Exception as error:  # Markdown is not installed, or any other: the .md is there
        print(f"{path}: no page ({canvas.reason(error)}); the .md has the same text")
        checkpoints.remove([Path(path)], "as the page of an earlier summary")


def page(text, folder):
    """The HTML of `write`."""
    import markdown

    def figure(found):
        path = folder / found[2]
        if not path.is_file():
            return ""
        data = base64.b64encode(path.read_bytes()).decode()
        return (f'<figure><img alt="{found[1]}" src="data:image/png;base64,{data}">'
                f"<figcaption>{found[1]}</figcaption></figure>")

    converter = markdown.Markdown(extensions=["tables", "sane_lists", "toc"],
                                  extension_configs={"toc": {"toc_depth": "2-2", "marker": ""}})
    heading, end, rest = converter.convert(text).partition("</h1>")
    body = f"{heading}{end}<nav>{converter.toc}</nav>{rest}"
    body = body.replace("<table>", '<div class="table"><table>')
    body = body.replace("</table>", "</table></div>")
    body = body.replace(" %", "&nbsp;%")
    body = re.sub(r"\b([np]) (=|&lt;) ", r"\1&nbsp;\2&nbsp;", body)
    body = IMAGE.sub(figure, body)
    title = plain(text.splitlines()[0].lstrip("# "))
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f"{body}\n</body>\n</html>\n")
