"""`python -m hooked_lm.cli`."""

from hooked_lm.cli import main

if __name__ == "__main__":
    main()
