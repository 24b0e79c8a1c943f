"""Softmax attention and Performers in a small Vision Transformer: accuracy and time, also against the length."""
