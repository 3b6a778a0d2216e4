"""``python -m medrobust`` is the command line."""

from medrobust.cli import main

if __name__ == "__main__":
    main()
