"""Hugging Face checkpoint -> OpenVINO with int8 weights: ``python -m ... CHECKPOINT TARGET FORMAT THREADS``.

At true sizes this takes 20 GB of memory and 15 GB of temporary disk: the exporter holds the weights in float32.
"""

import subprocess
import sys
from pathlib import Path


def main() -> None:
    folder, target, weight_format = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    partial = target.with_name(target.name + ".partial")
    export = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", folder]
    # Only ids go in and come out: there is no tokenizer to convert.
    export += ["--task", "text-generation-with-past", "--disable-convert-tokenizer", "--weight-format", weight_format]
    status = subprocess.run([*export, str(partial)]).returncode
    if status:
        sys.exit(status)
    partial.rename(target)


if __name__ == "__main__":
    main()
