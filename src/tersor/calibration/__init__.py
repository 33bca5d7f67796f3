"""What calibration text says about the inputs of linear layers."""
