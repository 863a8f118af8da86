"""What lasts on a disk: runs, their checkpoints and their metrics."""
