"""The `spar-d2` command, with one module per subcommand."""

import warnings

# fvcore compiles two losses with TorchScript when it is imported, and PyTorch then warns on every start.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=FutureWarning)
