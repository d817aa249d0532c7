"""`python -m nbdurable`: the same as the command `nbdurable`."""

from nbdurable.cli import main

if __name__ == "__main__":
    main()
