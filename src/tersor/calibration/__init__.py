"""What calibrated methods learn from: samples of tokens, what a model's layers read on them, and whether that is enough."""
