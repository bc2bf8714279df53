"""Published benchmarks through lmms-eval 0.7.3, which runs in an environment of its own (`make eval-env`)."""
