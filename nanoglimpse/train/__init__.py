"""Training: a base model on the synthetic world, and GlimpsePrune for any checkpoint.

The engine's modules are trained unchanged. The trainer only replaces their attention, so that
several questions share one picture, and their cache, since nothing has to be kept.
"""

from nanoglimpse.train.policy import policy_loss, reply_log_probs

__all__ = ["policy_loss", "reply_log_probs"]
