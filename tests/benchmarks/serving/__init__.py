"""What the engine gains and costs under a server's load; README.md says what is measured and how."""
