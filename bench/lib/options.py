"""What the programs here understand as options: lists, numbers, and one line for what they do not."""

import argparse


def name_list(known, what):
    """For names of these only, or of any (None)."""
    def parse(text):
        names = [name for name in text.split(",") if name]
        for name in names:
            if known is not None and name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r} (known: {', '.join(known)})")
        if not names:
            raise argparse.ArgumentTypeError(f"no {what} given")
        return list(dict.fromkeys(names))
    return parse


def number(kind, low, high):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value
    return parse


def count_list(text):
    parse = number(int, 1, 1000)
    return list(dict.fromkeys(parse(part) for part in text.split(",")))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")
