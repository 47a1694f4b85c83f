"""``python -m onnxslim_ptq``."""

import sys

from onnxslim_ptq.cli import main

if __name__ == "__main__":
    sys.exit(main())
