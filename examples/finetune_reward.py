"""Tune a denoiser for a black-box reward, DDPO against SDPO: digits become sevens by a classifier's probability.

python examples/finetune_reward.py                              # three methods, three seeds, on two cores
python examples/finetune_reward.py reward.target=3 'seeds=[1]'
python examples/finetune_reward.py 'compare=[]' recipe=sdpo model.path=runs/... reward=ink heldout_reward=none
python examples/finetune_reward.py resume=runs/...              # continue a single run where it stopped

With `compare` (the default) the same command continues where it stopped: finished runs are kept. Where model.path is
null, a small denoiser is trained first, and kept beside `out` for the next time. It is `python -m diffrl finetune`.
"""

from diffrl.__main__ import run

if __name__ == "__main__":
    run("finetune")
