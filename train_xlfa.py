"""accelerate launch train_xlfa.py CONFIG.yaml [--flag value …]: see `xlfa/training.py`."""

from xlfa.training import run

if __name__ == "__main__":
    run()
