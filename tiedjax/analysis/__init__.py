"""Instruments: arrays in, plain results out. One folder per instrument; only the report draws.

An instrument is a function of arrays that returns a frozen dataclass of Python numbers. `command` gives each one a
command, `study.summary` applies them to a study's runs, `study.report` shows what it found.
"""
