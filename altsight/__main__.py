"""`python -m altsight`: the same as the `altsight` command."""

from altsight.cli import main

if __name__ == "__main__":
    main()
