"""Training: a base model on the synthetic world, and GlimpsePrune for any checkpoint.

The modules of the engine train as they are: the trainer only lends them another attention, for
several questions behind one picture, and a cache that keeps nothing.
"""
