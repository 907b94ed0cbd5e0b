"""`python -m vmrt.guest_image`: the same as `vmrt guest`, for set-up before `vmrt` is installed."""

import sys

from vmrt.errors import VmrtError

if __name__ == "__main__":
    from vmrt.cli.guest import guest

    try:
        guest(prog_name="python -m vmrt.guest_image")
    except VmrtError as error:
        sys.exit(f"vmrt: {error}")
