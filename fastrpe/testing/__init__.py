"""What the tests and the benchmarks share: cases, assertions and the numbers that they hold the code to."""
