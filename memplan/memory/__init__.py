"""The played step: segments recorded once, composed into the run, folded into peaks and replayed on the allocator."""
