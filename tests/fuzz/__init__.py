"""Properties of everything that reads hostile bytes, the files to try them on, and a coverage-guided fuzzer."""
