"""Take the pictures of docs/tensorboard.md: ``python docs/screenshots.py runs/quickstart``.

It needs a Chromium. The page shows these two runs:

    specforge fit --config configs/quickstart.yaml
    specforge fit --config configs/quickstart.yaml --model.optimizer.lr 5.0e-3
"""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image

from specforge.training.callbacks.board.charts import ADDRESS

IMAGES = Path(__file__).parent / "images"
CURVES = ADDRESS.partition("#custom_scalars&")[2]
# Name of the picture, the address's fragment (after #), and the window's width and height.
PICTURES = (
    ("custom-scalars", f"custom_scalars&{CURVES}", 1090, 1010),
    ("acceptance-by-position", "images", 1090, 860),
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
        for name, tab, width, height in PICTURES:
            picture = _picture(f"http://localhost:{port}/#{tab}", width, height)
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


def _picture(address: str, width: int, height: int) -> Image.Image:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("install chromium, for example with: apt install chromium")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
        size = [f"--window-size={width},{height}", f"--screenshot={path}"]
        subprocess.run([browser, *options, *size, address], check=True, capture_output=True, timeout=120)
        return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


if __name__ == "__main__":
    main(sys.argv[1])
