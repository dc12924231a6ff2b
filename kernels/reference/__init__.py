"""The operations in plain torch. They run on every device and define what a kernel must compute."""
