"""One line on stderr that says how far a comparison is; a line for every run where nobody watches."""

import sys
import time


class Progress:
    def __init__(self, program, total):
        self.program = program
        self.total = total
        self.done = 0
        self.began = None
        self.live = sys.stderr.isatty()

    def say(self, text):
        self._show(text, last=True)

    def run(self, text):
        if self.began is None:
            self.began = time.monotonic()
        left = "?"
        if self.done:
            left = f"{(time.monotonic() - self.began) / self.done * (self.total - self.done):.0f} s"
        self._show(f"run {self.done + 1} of {self.total}, {left} left: {text}")
        self.done += 1

    def end(self):
        if self.live:
            sys.stderr.write("\r\033[K")

    def _show(self, text, last=False):
        if self.live:
            sys.stderr.write(f"\r\033[K{self.program}: {text}" + ("\n" if last else ""))
        else:
            sys.stderr.write(f"{self.program}: {text}\n")
        sys.stderr.flush()
