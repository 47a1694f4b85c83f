"""The subcommands of the command line, one file each. Heavy imports stay inside functions: ``--help`` is quick."""
