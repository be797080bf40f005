"""The command `spar-d2`: one module for each sub-command."""
