"""Constants of the cost models for the GPU at hand: measured, fitted, kept in a file, and chosen for a plan."""
