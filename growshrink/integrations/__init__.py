"""Callbacks for the training loops of others; each needs its extra."""
