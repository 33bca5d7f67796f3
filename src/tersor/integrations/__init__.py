"""tersor inside other libraries. Each file is imported on demand only, since the libraries are extras."""
