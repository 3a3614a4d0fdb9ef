# Finds products in photos, without detkit:  python @FILE@ photo.jpg [more photos]
# Needs:  pip install numpy onnxruntime pillow
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

MODEL = Path(__file__).with_name(@MODEL@)
CLASSES = @CLASSES@
WIDTH, HEIGHT = @WIDTH@, @HEIGHT@  # of the canvas, in pixels
LETTERBOX = @LETTERBOX@  # whether a photo keeps its shape on it
FILL = (@FILL@)  # RGB of what it leaves free
SCORE = @SCORE@  # lowest that is shown

session = ort.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


def to_canvas(photo):
    """The photo on the canvas, and how many of its pixels one of the canvas is, across and down."""
    scale_x, scale_y = WIDTH / photo.width, HEIGHT / photo.height
    if LETTERBOX:
        scale_x = scale_y = min(scale_x, scale_y)
    size = max(1, round(photo.width * scale_x)), max(1, round(photo.height * scale_y))
    canvas = Image.new("RGB", (WIDTH, HEIGHT), FILL)
    canvas.paste(photo.resize(size, Image.Resampling.BILINEAR))
    return np.asarray(canvas), photo.width / size[0], photo.height / size[1]


def detect(photos):
    """What is in each of the photos (Pillow images): (class, score, x1, y1, x2, y2), in pixels of the photo."""
    photos = [ImageOps.exif_transpose(photo).convert("RGB") for photo in photos]
    canvases, across, down = zip(*map(to_canvas, photos))
    batch = np.ascontiguousarray(np.stack(canvases).transpose(0, 3, 1, 2))  # uint8 [photos, 3, HEIGHT, WIDTH]
    outputs = session.run(["boxes", "scores", "labels"], {"images": batch})
    for photo, x, y, boxes, scores, labels in zip(photos, across, down, *outputs):
        boxes = np.clip(boxes * [x, y, x, y], 0, [photo.width, photo.height] * 2)
        real = (scores >= max(SCORE, 1e-9)) & (boxes[:, :2] < boxes[:, 2:]).all(1)  # a score of 0 is padding
        yield [
            (CLASSES[label], float(score), *box.tolist())
            for box, score, label in zip(boxes[real], scores[real], labels[real])
        ]


for path in sys.argv[1:]:
    for name, score, *box in next(detect([Image.open(path)])):
        print(path, name, f"{score:.4f}", *(f"{side:.2f}" for side in box), sep="\t")
