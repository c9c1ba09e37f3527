"""The programs: command line, serve, bench, models."""
