"""The vmrt command line, one module per command group."""
