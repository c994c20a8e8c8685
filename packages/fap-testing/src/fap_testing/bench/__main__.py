"""The command ``fap-bench``, also ``python -m fap_testing.bench``."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = ("typer", "rich", "matplotlib")


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from fap_testing.bench.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.exit(f'fap-bench needs {missing}, which is not installed: pip install "fap-testing[bench]"')
    app(prog_name="fap-bench")


if __name__ == "__main__":
    main()
