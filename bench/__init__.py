"""One script per hot path: python -m bench.NAME. Results go to bench/results/NAME.json."""
