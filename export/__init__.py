"""From the dynamic network to an exported, self-describing inference program."""

import ops  # noqa: F401  what it settles must precede the import of Paddle, which modules here import themselves
