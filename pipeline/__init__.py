"""The control plane of Counterweight: what is to be done, where, in what order, and what became of it."""
