"""Instruments: arrays in, plain results out. One file per instrument; only `report` draws.

An instrument is a function of arrays that returns a frozen dataclass of Python numbers. `command` gives each one a
command, `summary` applies them to a study's runs, `report` shows what `summary` found.
"""
