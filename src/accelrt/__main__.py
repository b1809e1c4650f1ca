"""``python -m accelrt`` is the command line ``accelrt``."""

from accelrt.cli import main

if __name__ == "__main__":
    main()
