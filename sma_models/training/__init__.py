"""Training: data, tasks and the recipes that bring them together with a model (extra ``train``)."""
