"""Floor 5: the command line, one file per command. Only here are environment variables read and text printed."""
