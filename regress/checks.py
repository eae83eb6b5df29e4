"""What the checks of the programs in bench/ share: "ok - …" and "not ok - …" lines, and running a program."""

import os
import subprocess

failed = False


def check(what, condition, *, saw=None):
    global failed
    print(("ok - " if condition else "not ok - ") + what, flush=True)
    if not condition:
        failed = True
        print(f"#   saw: {str(saw)[-1500:]}")


def run(*command, **environment):
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=150, env=dict(os.environ, **environment))


def refuses(code, text, *command):
    done = run(*command)
    check(f"{' '.join(command)}: one line that says what is wrong",
          done.returncode == code and text in done.stderr and done.stderr.count("\n") == 1, saw=(done.returncode, done.stderr))


def exit_code():
    return 1 if failed else 0
