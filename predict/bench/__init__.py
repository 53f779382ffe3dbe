"""paddle-mixtral bench: how fast a model prefills and decodes, and how far that is from what the machine could do."""
