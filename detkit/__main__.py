"""``python -m detkit``."""

from detkit.cli import main

if __name__ == "__main__":
    main()
