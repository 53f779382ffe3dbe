"""This project's exporter: ``python -m ... CHECKPOINT TARGET FORMAT THREADS``."""

import subprocess
import sys
import tempfile
from pathlib import Path

from predict.model.weights import DEMO

QUANT_TYPE = {"bf16": [], "int8": ["--quant_type", "weight_only_int8"]}


def main() -> None:
    folder, target, weight_format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    partial = target.with_name(target.name + ".partial")
    with tempfile.TemporaryDirectory(dir=target.parent) as complete:
        # The checkpoint has no tokenizer, which only this project asks for, though ids go in and come out.
        for file in [*folder.iterdir(), DEMO / "tokenizer.model"]:
            (Path(complete) / file.name).symlink_to(file.resolve())
        export = [sys.executable, "-m", "predict.main", "export", "--model_name_or_path", complete]
        export += ["--output_path", str(partial), "--dtype", "bfloat16", *QUANT_TYPE[weight_format]]
        status = subprocess.run(export).returncode
    if status:
        sys.exit(status)
    partial.rename(target)


if __name__ == "__main__":
    main()
