"""From requests to steps to tokens, on integers alone: nothing here knows Paddle."""
