"""Running Mixtral: model, engine, runners and the command lines."""

import warnings

# Paddle says this at every import; it concerns people who compile operators over and over, not people who run them.
warnings.filterwarnings("ignore", message="No ccache found")
