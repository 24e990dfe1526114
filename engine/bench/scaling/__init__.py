"""How a layer, or a whole model, scales: the same measurement on more and more ranks of one job."""
