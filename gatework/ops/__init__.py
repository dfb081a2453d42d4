"""The fast algorithms that several parts share, as pure functions on tensors."""
