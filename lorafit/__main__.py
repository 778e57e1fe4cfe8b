"""Where the `lorafit` command begins: so small that a Ctrl-C during the first imports still ends as promised."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; Ctrl-C before it is there, or behind it, is one line and exit 130."""
    try:
        from lorafit.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped by SIGINT; nothing was left half-written\n")
        sys.exit(130)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, where a yaml.py is not ours
    main()
