"""Every claim of Twinhead, measured side by side with a named peer: `python -m benchmarks`."""
