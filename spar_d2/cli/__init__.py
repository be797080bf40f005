"""The `spar-d2` command, with one module per subcommand."""
