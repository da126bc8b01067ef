"""The parts of benchmarks/gpu/run.py; imported with benchmarks/gpu on sys.path."""
