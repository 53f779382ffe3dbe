"""From the dynamic network to an exported, self-describing inference program."""
