"""The commands of `ctl`, one idea a file. Each parses, calls the Python API and renders.

`controller/cli.py` loads the one that is asked for.
"""
