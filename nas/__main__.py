"""`python -m nas`: the command line without the installed script."""

from nas.cli.main import main

if __name__ == "__main__":
    main()
