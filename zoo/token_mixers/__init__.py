"""Causal mixers of tokens, one file per paper: each holds the mixer, its configuration and the paper's sizes."""
