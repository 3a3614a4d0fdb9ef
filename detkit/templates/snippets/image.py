# Finds products in photos, without detkit:  python @FILE@ photo.jpg [more photos]
# Needs:  pip install numpy onnxruntime pillow
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

MODEL = Path(__file__).with_name(@MODEL@)
CLASSES = @CLASSES@
SCORE = @SCORE@  # lowest that is shown

session = ort.InferenceSession(MODEL, providers=["CPUExecutionProvider"])

for path in sys.argv[1:]:
    photo = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))  # uint8 [height, width, 3]
    boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"image": photo})  # in pixels of the photo
    for box, score, label in zip(boxes, scores, labels):
        if score >= SCORE:
            print(path, CLASSES[label], f"{score:.4f}", *(f"{side:.2f}" for side in box), sep="\t")
