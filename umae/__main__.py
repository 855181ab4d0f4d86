"""`python -m umae` and `accelerate launch -m umae`: the command `umae`."""

from command_line_umae import main

if __name__ == "__main__":
    main()
