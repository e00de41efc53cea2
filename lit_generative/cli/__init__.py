"""The command ``litgen``. What answers ``--help`` imports no torch."""
