"""The network: its configuration, its weights, its tokenizer."""
