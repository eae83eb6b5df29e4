"""The one error that bench/compare reports as a line without a traceback."""


class BenchError(Exception):
    pass
