"""The page in a real browser, both themes: it is laid out, and nothing is cut off or fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pronghorn.report import build

from .made_up import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

MEASURE = """<pre id="measured"></pre><script>
const wide = [...document.querySelectorAll("figure, p, .tiles, h1")].filter(e => e.scrollWidth > innerWidth).length;
const cut = [...document.querySelectorAll("figure svg")].filter(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].some(t => { const b = t.getBoundingClientRect();
    return b.left < box.left - 2 || b.right > box.right + 2 || b.top < box.top - 2 || b.bottom > box.bottom + 2; });
}).length;
document.getElementById("measured").textContent = JSON.stringify({wide, cut,
  page: document.documentElement.scrollWidth > innerWidth, figures: document.querySelectorAll("figure svg").length,
  small: [...document.querySelectorAll("figure svg text")].filter(t => t.getBoundingClientRect().height < 8).length,
  requests: performance.getEntriesByType("resource").length});
</script>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_laid_out_without_overflow(tmp_path: Path, width: int) -> None:
    page = build(write_run(tmp_path / "run")).read_text()
    measured = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", MEASURE + "</body>")
    (tmp_path / "measured.html").write_text(measured)
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000", "--dump-dom",
            (tmp_path / "measured.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout)
    assert found is not None
    assert found.group(1) == '{"wide":0,"cut":0,"page":false,"figures":8,"small":0,"requests":0}'
