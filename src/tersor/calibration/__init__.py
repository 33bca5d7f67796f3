"""Calibration: text -> token windows; what the inputs of every linear layer look like, one block at a time, in bounded memory."""
