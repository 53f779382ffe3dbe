"""Running Mixtral: model, engine, runners and the command lines."""
