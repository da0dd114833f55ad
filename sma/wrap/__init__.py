"""Other people's modules: which layout they take, and how they are called on the active tokens."""
