"""What MkDocs calls while it builds the site.

Files of the repository's root become pages, and links to them links to those. Formulas
of docstrings become MathML, which browsers show without a script.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
INLINE = re.compile(r":math:`([^`]+)`")
BOX = "overflow-x: auto; margin: 1em 0"  # scrolls where it is wider than a phone
# A formula in the line of its mark, or below in lines that are indented more.
BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *))*)", re.MULTILINE)


def on_config(config: Any) -> None:
    """Lets Markdown read formulas."""
    config.markdown_extensions.append(Maths())


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages that stand outside of the folder of the docs."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links to files of the root to their pages."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


class Maths(Extension):
    """Formulas as docstrings have them, in Markdown."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  Markdown's name
        """Reads formulas before Markdown sees their backslashes."""
        md.preprocessors.register(Formulas(md), "formulas", priority=28)


class Formulas(Preprocessor):
    """Puts away MathML for each formula."""

    def run(self, lines: list[str]) -> list[str]:
        """Returns lines with places that the formulas come back to."""

        def inline(found: re.Match[str]) -> str:
            return self.put_away(convert(_plain(found[1])))

        def block(found: re.Match[str]) -> str:
            tex = _plain(textwrap.dedent(found[2]).strip())
            rows = rf"\begin{{split}}{tex}\end{{split}}"
            math = convert(rows if "&" in tex else tex, display="block")
            aligned = re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', math)
            place = self.put_away(f'<div style="{BOX}">{aligned}</div>')
            return f"\n{found[1]}{place}\n"

        return INLINE.sub(inline, BLOCK.sub(block, "\n".join(lines))).split("\n")

    def put_away(self, html: str) -> str:
        """Returns the place of this HTML, which Markdown leaves as it is."""
        return self.md.htmlStash.store(html)


def _plain(tex: str) -> str:
    """Returns a formula with its words as text: browsers know no other upright ones."""

    def text(found: re.Match[str]) -> str:
        return rf"\text{{{found[1]}}}".replace(r"\_", "_")

    return re.sub(r"\\math(?:tt|rm)\{([^}]*)\}", text, " ".join(tex.split()))
