"""Side-by-side measurements with other runtimes: `make bench`, or `python -m benchmarks NAME --help` for one."""
