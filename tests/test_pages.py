"""Pages of the comparison: odd text breaks out of nothing, and they need no other file."""

import html.parser
import re

import pages
import summary

import pytest
from made import CLEAN, edited, run_of, text_of, write


class Cells(html.parser.HTMLParser):
    """The texts of a page's table cells, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.cells = []
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.mark.parametrize("odd", ["a|b<script>", "`x`|*y*", "<b>&amp;\n# z", "$5_$10 [c](d) ~~e~~"])
def test_text_of_the_user_breaks_out_of_no_table_and_no_page(tmp_path, odd):
    name = odd.replace("\n", " ")
    write(run_of(tmp_path, "part1", "part1", dataset=f"folder {name}", command=f"python x '{odd}'"),
          {CLEAN: 0.7}, extra=[(f"audit: {name}", 0.0)])
    write(run_of(tmp_path, "part2", "part1", dataset=f"folder {name}"),
          {("test", f"cifar10c {name}", "3"): 0.5})
    summary.compare(tmp_path)
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    found = Cells(page)
    assert f"cifar10c {name.replace('_', ' ')} (CIFAR-10-C)" in map(str.strip, found.cells)
    assert not {"script", "b", "em", "del"} & set(found.tags)
    assert not re.search('href="(?!#)', page)
    assert f"<title>Results on folder {html.escape(name)}</title>" in page
    for line in (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| cifar10c"):
            assert line.count("|") == 3


def test_every_character_that_some_markup_takes_is_escaped():
    for c in "\\`*<>&|[]#~!$_":
        assert pages.escape(c) == f"&#{ord(c)};"
    assert pages.escape("a_b\nc\td\re") == "a_b c d e"
    for odd in ("a|b", "a`b", "a\nb", "a\rb"):
        assert pages.code(odd) == f"<code>{pages.escape(odd)}</code>"
    assert pages.bullets(["*a*"]) == "- &#42;a&#42;"


def test_surrogates_of_a_record_do_not_cost_the_summary(tmp_path):
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    with edited(tmp_path / "part1.json") as record:
        record["command"] = "python \ud800"
        record["args"] = {"loss": ["?"], "families": 3, "x": "\ud800"}
    assert "part1 (cross-entropy)" in text_of(tmp_path)


def test_the_page_needs_no_other_file_and_leaves_out_missing_figures(tmp_path):
    (tmp_path / "there.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder.png").mkdir()
    text = ("# A & B\n\n| a |\n| --- |\n| n = 1, p < 0.1 |\n\n## C & D\n\n![there](there.png)\n\n"
            "![gone](gone.png)\n\n![gone](folder.png)\n")
    pages.write(tmp_path / "page.html", text)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall('src="([^"]*)"', page) == ["data:image/png;base64,iVBORw=="]
    assert "gone" not in page and "<title>A &amp; B</title>" in page
    assert '<html lang="en">' in page and 'name="viewport"' in page
    assert '<div class="table"><table>' in page
    assert "n&nbsp;=&nbsp;1, p&nbsp;&lt;&nbsp;0.1" in page
    (link,) = re.findall('<nav>.*href="#([^"]*)">C &amp; D</a>.*</nav>', page, re.DOTALL)
    assert f'<h2 id="{link}">' in page
    assert not re.search(r'(href|src)="(?!data:|#)', page)


def test_without_markdown_only_the_page_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "markdown", None)
    (tmp_path / "summary.html").write_text("of former results", encoding="utf-8")
    write(run_of(tmp_path, "part1", "part1"), {CLEAN: 0.7})
    summary.compare(tmp_path)
    assert (tmp_path / "summary.md").exists() and not (tmp_path / "summary.html").exists()
    assert "summary.html: no page (ModuleNotFoundError" in capsys.readouterr().out
