"""Ways to train a denoiser of two times, whose jumps follow the probability-flow ODE: one file for each."""
