"""Tables that read well as they are, and better where Markdown is shown."""


def markdown_table(rows: list[list[str]]) -> str:
    """Rows as a table; the first is its head, and every row is as long."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
