"""Names of the entries of a chain's TensorDict; design and shapes: docs/mathematics.md.

Root entries describe the state left, those under `next` the state reached.
"""

from typing import Final

X_T: Final = "x_t"  # state, [B, K, *E]
T: Final = "t"  # diffusion time of the state, [B, K, 1]
A: Final = "A"  # coefficient of x0 in the one-step posterior mean at the state, [B, K, 1]
KAPPA: Final = "kappa"  # coefficient of x_t in it, [B, K, 1]
X0: Final = "x0"  # the datum the environment drew, hidden from the denoiser, [B, K, *E]
INDEX: Final = "index"  # position along the chain: 0 is the noisiest state, [B, K, 1]
VALID: Final = "valid"  # whether a pair lies on the grid (TD-EDM), [B, K, 1]
COND: Final = "cond"  # condition (label, embedding), [B, K, ...]
IMPORTANCE: Final = "importance"  # weight that undoes an uneven law of starts, [B, K, 1]; absent: 1
LOSS: Final = "loss"  # what a loss found for the state, before importance; no gradient, [B, K, 1]
GROUP: Final = "group"  # index of prompt or pair, [B, K, 1]

NEXT: Final = "next"
REWARD: Final = "reward"  # [B, K, *E] in the reward process, [B, K, 1] in the decision process
TERMINATED: Final = "terminated"  # clean data reached, [B, K, 1]
TRUNCATED: Final = "truncated"  # window cut, [B, K, 1]
DONE: Final = "done"  # either, [B, K, 1]

STATE_VALUE: Final = "state_value"  # A·D(x_t) + κ·x_t, [B, K, *E]
VALUE_TARGET: Final = "value_target"  # the same units
TD_ERROR: Final = "td_error"  # target - value
ADVANTAGE: Final = "advantage"

ACTION: Final = "action"
ACTION_LOG_PROB: Final = "action_log_prob"
REF_LOG_PROB: Final = "ref_log_prob"
X0_HAT: Final = "x0_hat"  # clean estimate made at the state left, [B, K, *E]
TRAINABLE: Final = "trainable"  # whether the step is stochastic, so that it has a log-probability, [B, K, 1]
