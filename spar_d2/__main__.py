"""``python -m spar_d2 path/to/train_net.py ARGS...``: runs a script that knows nothing of this package, with it."""

from spar_d2.launcher import main

if __name__ == "__main__":
    main()
