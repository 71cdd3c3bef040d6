"""Names of the entries of a chain's TensorDict, with their shapes; docs/mathematics.md has their meaning.

Root entries describe the state before a step, those under `next` the state that the step reaches.
"""

from typing import Final

X_T: Final = "x_t"  # state, [B, K, *E]
T: Final = "t"  # diffusion time of the state, [B, K, 1]
R: Final = "r"  # second time: where a jump from the state leads, [B, K, 1]
V: Final = "v"  # velocity of the straight path of datum and noise through the state, [B, K, *E]
A: Final = "A"  # coefficient of x0 in the one-step posterior mean at the state, [B, K, 1]
KAPPA: Final = "kappa"  # coefficient of x_t in it, [B, K, 1]
X0: Final = "x0"  # the datum the environment drew, hidden from the denoiser, [B, K, *E]
X0_MEAN: Final = "x0_mean"  # estimate of E[x0 | x_t] that stands in for x0 in rewards, [B, K, *E]; absent: x0
INDEX: Final = "index"  # position along the chain: 0 is the noisiest state, [B, K, 1]
VALID: Final = "valid"  # whether a pair lies on the grid (TD-EDM), [B, K, 1]
COND: Final = "cond"  # condition (label, embedding), [B, K, ...]
IMPORTANCE: Final = "importance"  # weight that corrects for starts drawn unevenly, [B, K, 1]; absent: 1
LOSS: Final = (
    "loss"  # loss of each state before it is multiplied by `importance`, without gradient, [B, K, 1]
)
EVALUATIONS: Final = "evaluations"  # network evaluations that drawing the step took, [B, K, 1]; absent: 0
GROUP: Final = "group"  # index of prompt or pair, [B, K, 1]

NEXT: Final = "next"
REWARD: Final = "reward"  # [B, K, *E] in the reward process, [B, K, 1] in the decision process
TERMINATED: Final = "terminated"  # clean data reached, [B, K, 1]
TRUNCATED: Final = "truncated"  # window cut, [B, K, 1]
DONE: Final = "done"  # either, [B, K, 1]

STATE_VALUE: Final = "state_value"  # A·D(x_t) + κ·x_t, [B, K, *E]
ADVANTAGE: Final = "advantage"

ACTION: Final = "action"
ACTION_LOG_PROB: Final = "action_log_prob"
X0_HAT: Final = "x0_hat"  # clean estimate of the state before the step, [B, K, *E]
TRAINABLE: Final = "trainable"  # whether the step is stochastic, so that it has a log-probability, [B, K, 1]
RENOISE_T: Final = "renoise_t"  # time up to which noise is added to the state that a step reached, [B, K, 1]
NOISE: Final = "noise"  # the noise that is added, [B, K, *E]
