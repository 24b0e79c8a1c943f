"""Position encodings in a small Vision Transformer on MNIST and CIFAR-10."""
