"""`python -m askewq`, and `accelerate launch -m askewq`."""

from askewq.cli import main

if __name__ == "__main__":
    main()
