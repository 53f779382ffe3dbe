"""The installed command: paddle-mixtral predict ..., export ..., serve ..., bench ..."""

import sys

from predict import startup

USAGE = """usage: paddle-mixtral {predict,export,serve,bench} ...

  predict   generate text: python predict/predictor.py
  export    write a static program: python predict/export_model.py
  serve     answer over HTTP, as OpenAI's API does: python predict/server.py
  bench     measure speed, and how far it is from what the machine allows

`paddle-mixtral predict --help`, and so on, list the flags."""


def main() -> int:
    """Entry point; returns the exit status."""
    startup.begin()
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    # Imported when chosen: Paddle takes a second to load, --help should not.
    if command == "predict":
        from predict.predictor import main as run
    elif command == "export":
        from export.export_model import main as run
    elif command == "bench":
        from predict.bench.command import main as run
    elif command == "serve":
        from predict.server import main as run
    else:
        wants_help = command in ("-h", "--help")
        print(USAGE, file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
