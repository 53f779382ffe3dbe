"""Model configurations and the demo checkpoint: data only."""
