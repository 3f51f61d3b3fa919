"""Take the pictures of docs/tensorboard.md: ``python docs/screenshots.py runs/quickstart``.

It needs a Chromium, and ``pip install -e '.[docs]'``. The page shows these two runs:

    specforge fit --config configs/quickstart.yaml
    specforge fit --config configs/quickstart.yaml --model.optimizer.lr 5.0e-3
"""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from browser import chromium
from PIL import Image

from specforge.training.callbacks.board.charts import ADDRESS

IMAGES = Path(__file__).parent / "images"
CURVES = ADDRESS.partition("#custom_scalars&")[2]
# Unticks "Ignore outliers", as the page tells readers to.
WHOLE_AXES = "localStorage.setItem('_ignoreYOutliers', 'false')"
# Name of the picture, the address's fragment (after #), and the window's width and height.
PICTURES = (
    ("custom-scalars", f"custom_scalars&{CURVES}", 1090, 1130),
    ("acceptance-by-position", "images", 1090, 880),
    ("samples", "text&tagFilter=sample_0", 1090, 740),
    ("hparams", "hparams", 2240, 330),
)


def main(logdir: str) -> None:
    """Take all pictures.

    Args:
        logdir: Folder of the runs, as it is to stand in the pictures.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--port", str(port)]
    server = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        _wait_for_runs(f"http://localhost:{port}/data/runs")
        IMAGES.mkdir(exist_ok=True)
        with chromium() as browser:
            for name, tab, width, height in PICTURES:
                page = browser.new_page(viewport={"width": width, "height": height})
                page.add_init_script(WHOLE_AXES)
                page.goto(f"http://localhost:{port}/#{tab}", wait_until="networkidle")
                page.wait_for_timeout(20_000)  # charts are drawn some time after their data came
                picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
                picture.quantize(64).save(IMAGES / f"tensorboard-{name}.png", optimize=True)
    finally:
        server.terminate()
        server.wait()


def _wait_for_runs(address: str) -> None:
    for _ in range(120):
        time.sleep(0.5)
        try:
            if urlopen(address).read().strip() != b"[]":
                return
        except URLError:
            continue
    raise SystemExit("TensorBoard found no runs within a minute")


if __name__ == "__main__":
    main(sys.argv[1])
