"""``detkit demo``: the whole job on made-up shelf photos, and what to do next with one's own."""

from __future__ import annotations

import time

from rich.console import Console
from rich.panel import Panel

from detkit import assess, checkpoint, config, export, train
from detkit.console import counting, duration
from detkit.data.synth import synthesise
from detkit.errors import UserError
from detkit.files import next_folder
from detkit.runtime import predict
from detkit.runtime.session import Session
from detkit.sources import Where

PHOTOS = 4


def run(console: Console) -> None:
    """Make photos (unless they are there), train, evaluate, export, predict with the ONNX file, and say where it all
    lies. Raises UserError."""
    began = time.perf_counter()
    settings = config.load("ssd_shelf.yaml")
    root = settings.data.root
    _step(console, 1, f"Shelf photos with Pascal-VOC XML: {root}")
    if (root / "ImageSets").is_dir():
        console.print("already there")
    elif root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: exists but is not a data set; move it away, the demo makes it anew")
    else:
        with counting(console, "rendering") as progress:
            synthesise(root, progress=progress)
    _step(console, 2, "Training a small SSD from scratch")
    folder = train.start(settings, console)
    _step(console, 3, "Measuring its best checkpoint")
    where = Where(device=settings.train.device)
    figures = assess.run(str(folder), where, console, assess.Files(json=folder / "figures.json"))
    _step(console, 4, "Exporting to ONNX")
    (model,) = export.run(str(folder), folder / f"{settings.name}.onnx", None, console)
    _step(console, 5, "Finding products with the ONNX file, without torch")
    names = (root / "ImageSets" / "Main" / f"{settings.data.val}.txt").read_text(encoding="utf-8").split()
    photos = [root / "JPEGImages" / f"{name}.jpg" for name in names[:PHOTOS]]
    out = next_folder("predictions/demo-")
    predict.predict(Session(model), [str(photo) for photo in photos], out / "photos", console=console)
    trained = checkpoint.read(checkpoint.find(folder))
    console.print(
        Panel(
            f"Done in {duration(time.perf_counter() - began)}: val mAP50 {figures['mAP50']:.3f}, "
            f"mAP {figures['mAP']:.3f} (epoch {trained.epoch}).\n\n"
            f"The picture      {out / 'photos' / photos[0].name}\n"
            f"The ONNX file    {model}\n"
            f"The run          {folder}  (config, metrics.csv, TensorBoard events, weights)\n\n"
            "Now your own photos, with LabelImg's XML beside them (or in VOC layout):\n"
            "  detkit train --config ssd_mobilenet.yaml --set data.root=PATH\n"
            "  detkit eval\n"
            "  detkit predict PHOTO ...\n"
            "  detkit export",
            title="detkit",
            expand=False,
        ),
        highlight=False,
    )


def _step(console: Console, number: int, title: str) -> None:
    console.print(f"\n[bold]{number}/5  {title}[/bold]", highlight=False)
