"""``python -m spar_d2 path/to/train_net.py ARGS...``: run a script of another framework with spar_d2 registered."""

from spar_d2.launcher import main

if __name__ == "__main__":
    main()
