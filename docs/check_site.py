"""Check that the site can be read on a desk and on a phone: ``mkdocs build && python docs/check_site.py site``.

It needs a Chromium, and ``pip install -e '.[docs]'``. No page may be wider than the window, no key or command may break
inside a word, and no command or output may be cut or need scrolling.
"""

from __future__ import annotations

import sys
from pathlib import Path

from browser import chromium

# Width of the window in pixels, and of the longest word that may not break, in characters.
WINDOWS = ((1280, 80), (390, 41))
# Returns what is wrong with the page, a sentence each.
FAULTS = r"""longest => {
  const faults = [], root = document.scrollingElement;
  if (root.scrollWidth > innerWidth) faults.push(`the page is ${root.scrollWidth} pixels wide`);
  for (const code of document.querySelectorAll("code")) {
    const characters = [];
    const texts = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    while (texts.nextNode())
      for (let at = 0; at < texts.currentNode.length; at++) characters.push([texts.currentNode, at]);
    for (const word of code.textContent.matchAll(/\S+/g)) {
      const range = document.createRange();
      const [first, last] = [characters[word.index], characters[word.index + word[0].length - 1]];
      range.setStart(...first);
      range.setEnd(last[0], last[1] + 1);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1 && word[0].length <= longest) faults.push(`${word[0]} is broken`);
    }
  }
  for (const listing of document.querySelectorAll(".language-bash code, .language-text code"))
    if (listing.scrollWidth > listing.clientWidth) faults.push(`cut: ${listing.textContent.trim().split("\n")[0]}`);
  return faults;
}"""


def main(site: str) -> None:
    """Look at all pages of a built site.

    Args:
        site: The folder that ``mkdocs build`` wrote.
    """
    pages = sorted(Path(site).resolve().rglob("index.html"))
    faults = []
    with chromium() as browser:
        for width, longest in WINDOWS:
            tab = browser.new_page(viewport={"width": width, "height": 900})
            for path in pages:
                tab.goto(path.as_uri())
                name = path.parent.relative_to(Path(site).resolve())
                faults += [f"{name} at {width} pixels: {fault}" for fault in tab.evaluate(FAULTS, longest)]
    if faults or not pages:
        raise SystemExit("\n".join(faults) or f"{site}: no pages")
    print(f"{len(pages)} pages, {len(WINDOWS)} widths: nothing is cut or broken")


if __name__ == "__main__":
    main(sys.argv[1])
