"""`accelerate launch cli.py finetune ...`: what a launcher points at."""

from askewq.cli import main

if __name__ == "__main__":
    main()
