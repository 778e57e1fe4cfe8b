"""Where the `lorafit` command begins: so small that a Ctrl-C during the first imports still ends as promised."""

from __future__ import annotations

import os
import sys


def read_names_as_utf8() -> None:
    """Starts the process again in Python's UTF-8 mode, where its locale has another encoding for the names of files.

    Recipes are UTF-8; the files that they name must not depend on a locale that can spell neither. Once is enough: an
    interpreter that ignores its environment is left as it is.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Runs the command line; Ctrl-C before it is there, or behind it, is one line and exit 130."""
    try:
        read_names_as_utf8()
        from lorafit.cli import main as run
        from lorafit.machine.collector import put_off_collections

        put_off_collections()
        run()
    except SystemExit:
        import gc
        import signal

        from lorafit.console.exits import end_at_once

        signal.signal(signal.SIGINT, end_at_once)  # what is left is the interpreter's own end
        gc.freeze()  # else it looks through all objects of torch once more, which takes a second
        raise
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped by SIGINT; nothing was left half-written\n")
        sys.exit(130)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, where a yaml.py is not ours
    main()
