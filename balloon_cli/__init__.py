"""The command line: thin. With tests, examples and benchmarks the only place that knows both guest and host."""
