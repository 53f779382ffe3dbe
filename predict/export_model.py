"""The exporter under the path PaddleNLP's users know; it lives in export/export_model.py."""

import sys

from predict import startup

if __name__ == "__main__":
    startup.begin()  # before Paddle is imported

from export.export_model import main

if __name__ == "__main__":
    sys.exit(main())
