"""accelerate launch eval_xlfa.py --model RUN_DIR --task TASK [--flag value …]: see `xlfa/evaluation.py`."""

from xlfa.evaluation import run

if __name__ == "__main__":
    run()
