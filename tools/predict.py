"""Find products in photos: ``python tools/predict.py img.jpg [more photos, folders, globs]``. Is ``detkit predict``."""

import sys

from detkit.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
