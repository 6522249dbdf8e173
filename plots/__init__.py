"""Figures of the paper and of the operator suites, one file each; they read only CSV files under bench/results."""
