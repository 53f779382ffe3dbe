"""Running Mixtral: model, engine, runners and the command lines."""

import ops  # noqa: F401  what it settles must precede the import of Paddle, which modules here import themselves
