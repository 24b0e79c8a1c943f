"""The STRING family in a small Vision Transformer on MNIST and CIFAR-10: accuracy, time, other resolutions."""
