"""Reports on data and models: leaks, ranking of backbones, cost, strategy."""
