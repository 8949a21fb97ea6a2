"""Measurements with a server in the loop: latency, throughput and memory of one model at several widths."""
