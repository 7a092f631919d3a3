"""`python -m hooked_lm`: the command line."""

from hooked_lm.cli import main

if __name__ == "__main__":
    main()
