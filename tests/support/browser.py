"""Measure a page in a headless browser, if there is one, at a width and in a theme, by a script inside the page."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")

# The page lies in a frame of the wanted width: a browser's window cannot be as narrow as a phone.
FRAME = """<!doctype html><html style="color-scheme: light dark"><meta charset="utf-8"><body style="margin: 0">
<iframe style="width: {width}px; height: {height}px; border: 0" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>{script}</script></body></html>"""

SCRIPT = """
const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const parts = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const contrast = (a, b) => {
  const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
};
addEventListener("load", () => {
  const win = document.querySelector("iframe").contentWindow, doc = win.document;
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(win.getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const overflow = () => doc.documentElement.scrollWidth - doc.documentElement.clientWidth;
  const closed = overflow();
  doc.querySelectorAll("details").forEach(d => { d.open = true; });
  const faint = [];
  let texts = 0;
  const check = (said, colour, element) => {
    texts += 1;
    const found = contrast(parts(colour), behind(element));
    if (!(found >= 4.5)) faint.push([said, found]);
  };
  const walker = doc.createTreeWalker(doc.body, win.NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode())
    if (node.data.trim() && node.parentElement.getClientRects().length)
      check(node.data.trim().slice(0, 40), win.getComputedStyle(node.parentElement).color, node.parentElement);
  let drawn = 0;
  doc.querySelectorAll("svg g[id*='text_'] > g").forEach(g => {
    drawn += 1;
    check(g.parentElement.id, win.getComputedStyle(g).fill, g.closest("figure"));
  });
  const width = doc.documentElement.clientWidth;
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.width, r.height]; };
  document.querySelector("#found").textContent = JSON.stringify({
    width, overflow: [closed, overflow()], faint, texts, drawn,
    dark: win.matchMedia("(prefers-color-scheme: dark)").matches,
    paper: luminance(parts(win.getComputedStyle(doc.body).backgroundColor)),
    headings: [...doc.querySelectorAll("h1, h2, h3")].map(h => h.textContent.trim()),
    figures: [...doc.querySelectorAll("figure")].map(f => ({
      title: f.querySelector("h3").textContent, box: box(f), picture: box(f.querySelector("svg")),
      role: f.querySelector(".picture").getAttribute("role"),
      label: f.querySelector(".picture").getAttribute("aria-label"),
      caption: f.querySelector("figcaption").innerText, rows: f.querySelectorAll("details tbody tr").length,
      marks: f.querySelectorAll("svg path, svg image").length,
      strokes: [...new Set([...f.querySelectorAll("svg path")].map(p => win.getComputedStyle(p).stroke))],
    })),
    wide: [...doc.querySelectorAll("table")].filter(t => box(t)[2] > box(t.parentElement)[2] + 1
      && win.getComputedStyle(t.parentElement).overflowX !== "auto").length,
    tables: doc.querySelectorAll("table").length,
    ids: [...doc.querySelectorAll("[id]")].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i),
    broken: [...doc.querySelectorAll("use, a")].map(e => e.getAttribute("xlink:href") || e.getAttribute("href"))
      .filter(to => !to || !to.startsWith("#") || !doc.getElementById(to.slice(1))),
    loaded: win.performance.getEntriesByType("resource").map(r => r.name).filter(name => !name.startsWith("data:")),
    scripts: doc.scripts.length,
  });
});
"""


def find_browser() -> str | None:
    """Return the path of a Chromium, from the variable CHROME or the PATH; None without one."""
    named = os.environ.get("CHROME")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


def seen(browser: str, page: str, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """Return measurements of a page in the browser: sizes, contrasts, loaded resources, and console errors."""
    file = folder / f"frame-{width}-{dark}.html"
    framed = FRAME.format(width=width, height=900, page=html.escape(page), script=SCRIPT)
    file.write_text(framed, encoding="utf-8")
    command = [
        browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000", "--enable-logging=stderr", "--virtual-time-budget=10000", "--timeout=60000",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []), "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the browser showed nothing: {done.stderr[-2000:]}"
    assert found[1], f"the page was not measured: {done.stderr[-2000:]}"
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured | {"console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}
