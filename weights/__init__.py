"""Loading checkpoints: where they lie, their tensors, and the model that these make up."""
