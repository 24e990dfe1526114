"""What an MoE layer means: configuration, routing, weights, the runner, models and commands."""
