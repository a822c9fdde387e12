"""`python -m minift ...` is `minift ...`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
