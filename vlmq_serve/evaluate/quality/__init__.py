"""The comparison of methods: variants, their measurement, statistics over questions and seeds, tables and a plot."""
